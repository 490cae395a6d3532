"""One guided prediction of every method against its formula in numpy, float64; sums, gates, operations, merging."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.tools import CLASSES, gd, gg, mixture, parts, predict, states

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")


def close(value, expected, rtol=1e-10):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=rtol, atol=1e-12)


def dot(a, b):
    return np.sum(a * b, axis=1, keepdims=True)


def length(a):
    return np.sqrt(dot(a, a))


# Linear sums.


def test_linear_sums():
    _, c, u, away = parts(other=2)
    close(predict(gg.negative(3.0, 2))[0], away + 3 * (c - away))
    rest = gg.compose({2: 1.5, 0: -0.5})
    close(predict(rest)[0], u + 1.5 * (away - u) - 0.5 * (parts(other=0)[3] - u))
    weak = gd.GaussianDenoiser(jnp.zeros(3), jnp.asarray(2.0, float))
    x, ours = states()[0], lambda x: x * 2 / (2 + 0.64)
    model = jax.tree_util.Partial(lambda y, sigma, cond=None: 0.5 * y)
    strong = 0.5 * np.asarray(x)
    guided, _, _, tally = predict(gg.autoguide(_anyway(weak), 2.5), model)
    close(guided, ours(np.asarray(x)) + 2.5 * (strong - ours(np.asarray(x))))
    assert tally.executed.tolist() == [2] * 5
    close(predict(gg.perturbed(_anyway(weak), 0.7), model)[0], strong + 0.7 * (strong - ours(np.asarray(x))))


def _anyway(denoiser):
    """A denoiser that takes a condition and does not use it."""
    return jax.tree_util.Partial(lambda net, x, sigma, cond=None: net(x, sigma), denoiser)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (lambda: gg.Ramp(1.0, 5.0), 1 + 4 * 2 / 7),
        (lambda: gg.Ramp(1.0, 5.0, power=2.0), 1 + 4 * (2 / 7) ** 2),
        (lambda: gg.PowerCosine(5.0, power=0.5), 1 + 4 * (1 - np.cos(np.pi * (2 / 7) ** 0.5)) / 2),
        (lambda: gg.FunctionOfSigma(jnp.exp), np.exp(0.8)),
        (lambda: gg.CFGPlusPlus(0.6), 0.6 / (1 - 0.5 / 0.8)),
        (lambda: np.arange(8.0) ** 2, 4.0),
    ],
)
def test_scales_that_change(weight, expected):
    _, c, u, _ = parts()
    close(predict(gg.cfg(weight()))[0], u + expected * (c - u))


def test_one_step_of_cfgpp_renoises_with_the_unconditional_noise():
    x, c, u, _ = parts()
    guided = np.asarray(predict(gg.cfgpp(0.6))[0])
    after = guided + 0.5 / 0.8 * (x - guided)
    close(after, u + 0.6 * (c - u) + 0.5 * (x - u) / 0.8)


def test_perpneg():
    _, c, u, away = parts(other=2)
    p, q = c - u, away - u
    across = q - dot(q, p) / dot(p, p) * p
    guided, _, _, tally = predict(gg.perpneg(4.0, 2, strength=0.8))
    close(guided, u + 4 * (p - 0.8 * across))
    assert tally.executed.tolist() == [3] * 5
    off = predict(gg.perpneg(3.0, 2, strength=0.0))
    close(off[0], u + 3 * p)
    assert off[3].executed.tolist() == [2] * 5 and predict(gg.perpneg(0.0, 2))[3].executed.tolist() == [1] * 5


# Directions.


def apg(c, u, w, eta=0.0, radius=np.inf, momentum=0.0, past=0.0):
    m = c - u + momentum * past
    g = m * np.minimum(1, radius / length(m))
    along = dot(g, c) / dot(c, c) * c
    return c + (w - 1) * (g - along + eta * along), m


def test_apg():
    _, c, u, _ = parts()
    expected, first = apg(c, u, 5.0, 0.3, 0.4, -0.6)
    guidance = gg.apg(5.0, eta=0.3, norm_threshold=0.4, momentum=-0.6)
    value, carry, _, _ = predict(guidance)
    close(value, expected)
    # The second step, at the same place, starts from what the first remembered; its corrector writes nothing.
    expected, second = apg(c, u, 5.0, 0.3, 0.4, -0.6, first)
    again, memory, _, _ = predict(guidance, carry=carry)
    close(again, expected)
    close(memory[0], second)
    value, unchanged, _, _ = predict(guidance, carry=carry, corrector=True)
    close(value, expected)
    close(unchanged[0], first)
    close(predict(gg.apg(5.0, norm_rms=0.2))[0], apg(c, u, 5.0, 0.0, 0.2 * np.sqrt(3))[0])


def test_apg_without_its_parts_is_cfg():
    _, c, u, _ = parts()
    close(predict(gg.apg(4.0, eta=1.0, norm_threshold=np.inf, momentum=0.0))[0], u + 4 * (c - u))
    close(predict(gg.apg(1.0, momentum=-0.5))[0], c)
    assert predict(gg.apg(1.0, momentum=-0.5))[3].executed.tolist() == [1] * 5


def test_the_projection_is_orthogonal():
    _, c, u, _ = parts()
    value = np.asarray(predict(gg.apg(7.0))[0])
    g = c - u
    across = g - dot(g, c) / dot(c, c) * c
    close(dot(value, value), dot(c, c) + 36 * dot(across, across))


def test_damping():
    _, c, u, _ = parts()
    guidance = gg.Direction(gg.Slot("uncond", cond="null"), gg.ExponentialDamping(2.0), 10.0)
    close(predict(guidance)[0], c + 9 * np.exp(-2 * length(c - u) / length(u)) * (c - u))


def test_directions_of_zero_length_have_gradients():
    model = jax.tree_util.Partial(lambda x, sigma, cond=None: 0.0 * x)
    loss = lambda scale: jnp.sum(predict(gg.apg(scale, norm_threshold=0.1, momentum=-0.5), model)[0])
    assert float(jax.grad(loss)(jnp.asarray(3.0))) == 0.0


# Operations behind.


def test_operations_behind():
    _, c, u, _ = parts()
    d = u + 6 * (c - u)
    ratio = c.std(axis=1, keepdims=True) / d.std(axis=1, keepdims=True)
    close(predict(gg.rescale(gg.cfg(6.0), 0.7))[0], 0.7 * d * ratio + 0.3 * d)
    close(predict(gg.cfg(6.0) >> gg.NormCap())[0], d * np.minimum(1, length(c) / length(d)))
    edge = np.maximum(1.0, np.quantile(np.abs(d), 0.6, axis=1, keepdims=True))
    close(predict(gg.dynamic_threshold(gg.cfg(6.0), 0.6))[0], np.clip(d, -edge, edge) / edge)
    # At scale 0 the plain prediction has no weight, but rescaling compares with it.
    value, _, _, tally = predict(gg.rescale(gg.cfg(0.0), 1.0))
    close(value, u * c.std(axis=1, keepdims=True) / u.std(axis=1, keepdims=True))
    assert tally.executed.tolist() == [2] * 5
    assert predict(gg.dynamic_threshold(gg.cfg(0.0), 0.9))[3].executed.tolist() == [1] * 5


def test_operations_on_the_plain_prediction():
    _, c, _, _ = parts()
    clipped, _, _, tally = predict(gg.dynamic_threshold(quantile=0.6, limit=0.5))
    edge = np.maximum(0.5, np.quantile(np.abs(c), 0.6, axis=1, keepdims=True))
    close(clipped, np.clip(c, -edge, edge) * 0.5 / edge)
    close(predict(gg.rescale(None, 0.7))[0], c)
    assert tally.executed.tolist() == [1] * 5


# Sums.


def test_sums_add_what_each_part_changes_and_merge_equal_evaluations():
    _, c, u, away = parts(other=2)
    p, q = c - u, away - u
    across = q - dot(q, p) / dot(p, p) * p
    three = gg.cfg(2.0) + gg.apg(3.0) + gg.negative(1.5, 2) + gg.perpneg(2.0, 2)
    value, _, _, tally = predict(three)
    expected = u + 2 * (c - u) + (apg(c, u, 3.0)[0] - c) + 0.5 * (c - away) + (u + 2 * (p - across) - c)
    close(value, expected)
    assert tally.executed.tolist() == [3] * 5, "with the condition, without, and with label 2"
    # A post-operation behind a sum acts once.
    close(predict(three >> gg.NormCap())[0], expected * np.minimum(1, length(c) / length(expected)))


def test_sums_merge_the_evaluations_of_one_network():
    net = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    weak = jax.tree_util.Partial(lambda net, x, sigma, cond=None: net(x), net)
    both = gg.autoguide(weak, 2.0) + gg.perturbed(weak, 0.5)
    value, _, _, tally = predict(both)
    x, c, _, _ = parts()
    close(value, c + 1.5 * (c - np.asarray(jax.vmap(net)(jnp.asarray(x)))))
    assert tally.executed.tolist() == [2] * 5
    arrays = jax.tree.leaves(eqx.filter(both, eqx.is_array))
    assert len(arrays) == 2 + 2, "the weights once, and two scales"


def test_a_part_that_is_off_changes_nothing():
    _, c, u, _ = parts()
    value, _, _, tally = predict(gg.cfg(3.0) + gg.negative(1.0, 2))
    close(value, u + 3 * (c - u))
    assert tally.executed.tolist() == [2] * 5
    with pytest.raises(TypeError):
        gg.cfg(2.0) + 1.0
    with pytest.raises(TypeError):
        gg.cfg(2.0) >> gg.cfg(1.0)


# Gates.


def test_gates():
    _, c, u, _ = parts()
    inner = gg.cfg(3.0) + gg.apg(2.0)
    on, off = predict(gg.step_adaptive(inner, 3)), predict(gg.step_adaptive(inner, 2))
    close(on[0], u + 3 * (c - u) + apg(c, u, 2.0)[0] - c)
    close(off[0], c)
    assert [on[3].executed.tolist(), off[3].executed.tolist()] == [[2] * 5, [1] * 5]
    close(predict(gg.policy(gg.cfg(3.0), np.arange(8) == 2))[0], u + 3 * (c - u))
    assert predict(gg.policy(gg.cfg(3.0), np.arange(8) != 2))[3].executed.tolist() == [1] * 5


# Gradients.


def test_exact_classifier_guidance_is_cfg():
    law = mixture()
    log_prob = jax.tree_util.Partial(
        lambda law, x, sigma, cond: law.log_density(x, sigma, cond) - law.log_density(x, sigma) - np.log(CLASSES), law
    )
    _, c, u, _ = parts()
    for scale in (0.0, 1.0, 3.0):
        value, _, _, tally = predict(gg.classifier(log_prob, scale))
        close(value, u + scale * (c - u))
        assert tally.executed.tolist() == [1] * 5
    # In a sum it adds its direction, at no further evaluation.
    value, _, _, tally = predict(gg.cfg(2.0) + gg.classifier(log_prob, 0.5))
    close(value, u + 2.5 * (c - u))
    assert tally.executed.tolist() == [2] * 5


def test_loss_guidance_of_a_gaussian():
    # Prior N(0, 1), measurement y of standard deviation tau: everything linear.
    y, tau, sigma = 1.5, 0.5, 0.8
    model = jax.tree_util.Partial(lambda x, sigma, cond=None: x / (1 + sigma**2))
    loss = lambda x0: jnp.sum((x0 - y) ** 2) / (2 * tau**2)
    x = np.asarray(states()[0])
    d, gain = x / (1 + sigma**2), 1 / (1 + sigma**2)
    misfit = (d - y) / tau**2
    close(predict(gg.loss_guidance(loss, 0.7), model)[0], d - 0.7 * sigma**2 * gain * misfit)
    close(predict(gg.loss_guidance(loss, 0.7, through="prediction"), model)[0], d - 0.7 * sigma**2 * misfit)
    # DPS moves the state after a DDIM step by zeta times the gradient over the root of the squared misfit.
    square = lambda x0: jnp.sum((x0 - y) ** 2)
    guided = np.asarray(predict(gg.loss_guidance(square, 0.3, step="dps"), model)[0])
    after = guided + 0.5 / sigma * (x - guided)
    close(after, d + 0.5 / sigma * (x - d) - 0.3 * 2 * gain * (d - y) / length(d - y))


def test_loss_over_draws_is_the_soft_minimum():
    # With enough draws the average of exp(-loss) of a Gaussian is a Gaussian of larger variance.
    y, tau, sigma, spread = 0.2, 1.0, 0.8, 0.5
    model = jax.tree_util.Partial(lambda x, sigma, cond=None: x / (1 + sigma**2))
    loss = lambda x0: (x0[0] - y) ** 2 / (2 * tau**2)
    guidance = gg.loss_guidance(loss, 1.0, through="prediction", num_draws=20_000, spread=spread)
    x = np.asarray(states()[0])
    d = x / (1 + sigma**2)
    variance = tau**2 + spread**2 * sigma**2 / (1 + sigma**2)
    change = np.asarray(predict(guidance, model)[0]) - d
    # The gradient's standard error is below spread * sigma / sqrt(20000) / tau^2 = 0.0022 for these misfits.
    np.testing.assert_allclose(change[:, 0], -(sigma**2) * (d[:, 0] - y) / variance, atol=5 * 0.0022)
    assert not change[:, 1:].any()


def test_a_gradient_that_is_not_finite_spares_the_others():
    bad = lambda x, sigma, cond: jnp.where(cond == 1, jnp.nan, 1.0) * jnp.sum(x)
    value, _, reports, _ = predict(gg.classifier(bad, 1.0))
    _, _, u, _ = parts()
    assert reports["classifier_failed"].tolist() == [False, True, False, False, False]
    close(value, u + 0.64 * (np.arange(5) != 1)[:, None])


# Gradient-free classifier guidance.

LOGITS = np.array([[2.0, 1.0, 0.5, 0.0], [0.0, 3.0, 1.0, 0.5], [3.0, 0.0, 1.0, 0.0], [9.0, 0.0, 0.0, 30.0], [0.0] * 4])


def gfcg(**kwargs):
    """Logits by the number of the example, which its prediction tells."""
    _x, c, _, _ = parts()
    which = lambda x0: jnp.argmin(jnp.sum((jnp.asarray(c) - x0) ** 2, axis=1))
    return gg.gfcg(lambda x0: jnp.asarray(LOGITS)[which(x0)], 5.0, **kwargs)


@pytest.mark.parametrize("confusion", ["1-p", "ratio", "rival", "odds"])
def test_gfcg(confusion):
    model = mixture()
    x, c, _, _ = parts()
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    own = p[np.arange(5), np.arange(5) % 4]
    rivals = np.where(np.eye(4)[np.arange(5) % 4] == 1, -1, p)
    r, best = rivals.argmax(1), rivals.max(1)
    q = {"1-p": 1 - own, "ratio": best / (own + best), "rival": best, "odds": best / own}[confusion]
    extra = np.minimum(q, 4) if confusion == "odds" else 4 * q
    reference = np.asarray(jax.vmap(lambda y, k: model(y, 0.8, k))(jnp.asarray(x), jnp.asarray(r)))
    value, _, reports, tally = predict(gfcg(confusion=confusion))
    close(value, c + extra[:, None] * (c - reference))
    close(reports["scale"], 1 + extra)
    confused = q > 0.2
    value, _, _, tally = predict(gfcg(confusion=confusion, skip_below=0.2), skip="compact")
    close(value, c + np.where(confused, extra, 0)[:, None] * (c - reference))
    np.testing.assert_array_equal(tally.logical, 1 + confused)


def test_gfcg_falls_back():
    model = mixture()
    x, c, u, _ = parts()
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    q = 1 - p[np.arange(5), np.arange(5) % 4]
    value, _, _, tally = predict(gfcg(skip_below=2.0 / 3, base_scale=1.5))
    calm = q <= 2 / 3
    assert calm.any() and not calm.all() and tally.executed.tolist() == [2] * 5
    close(np.asarray(value)[calm], (c + 0.5 * (c - u))[calm])
    weak = jax.tree_util.Partial(lambda x, sigma, cond=None: 0.1 * x + 0.01 * cond)
    value = predict(gfcg(skip_below=2.0 / 3, base_scale=1.5, weak=weak))[0]
    close(np.asarray(value)[calm], (c + 0.5 * (c - 0.1 * x - 0.01 * (np.arange(5) % 4)[:, None]))[calm])
    # The likeliest of all as reference; none where it is the class itself.
    value, _, _reports, _ = predict(gfcg(reference="top"))
    top = p.argmax(1)
    against = np.where(
        (top == np.arange(5) % 4)[:, None],
        u,
        np.asarray(jax.vmap(lambda y, k: model(y, 0.8, k))(jnp.asarray(x), jnp.asarray(top))),
    )
    close(value, c + 4 * q[:, None] * (c - against))


def test_a_classifier_that_fails_spares_the_others():
    _, c, _, _ = parts()
    which = lambda x0: jnp.argmin(jnp.sum((jnp.asarray(c) - x0) ** 2, axis=1))
    logits = jnp.asarray(LOGITS).at[2, 1].set(jnp.nan)
    value, _, reports, tally = predict(gg.gfcg(lambda x0: logits[which(x0)], 5.0))
    healthy = predict(gfcg())[0]
    assert reports["classifier_failed"].tolist() == [False, False, True, False, False]
    others = np.arange(5) != 2
    close(np.asarray(value)[others], np.asarray(healthy)[others])
    close(np.asarray(value)[2], c[2])
    assert tally.logical.tolist() == [2, 2, 1, 2, 2]


# Stateless guidance as a denoiser.


def test_guided_denoisers():
    _, c, u, _ = parts()
    x, cond = states()
    guided = gg.Guided(mixture(), gg.interval(gg.cfg(3.0), 0.1, 2.0) >> gg.NormCap())
    d = u + 3 * (c - u)
    value = jax.jit(jax.vmap(lambda y, k: guided(y, 0.8, k)))(x, cond)
    close(value, d * np.minimum(1, length(c) / length(d)))
    assert guided.shape == (3,) and guided.num_labels == 4
    for stateful in (gg.apg(3.0), gg.adaptive(gg.cfg(2.0)), gg.cfg(2.0) + gg.apg(3.0)):
        with pytest.raises(ValueError, match=r"stateless.*rejected steps.*carries state"):
            gg.Guided(mixture(), stateful)
    for gridded in (gg.cfgpp(0.6), gg.cfg([1.0, 2.0]), gg.interval(gg.cfg(2.0) + gg.cfgpp(0.6), 0.1, 1.0)):
        with pytest.raises(ValueError, match="noise level alone"):
            gg.Guided(mixture(), gridded)
    with pytest.raises(ValueError, match="no fixed steps"):
        gg.Guided(mixture(), gg.reflect(mixture()))
    with pytest.raises(ValueError, match="condition to guide towards"):
        guided(x[0], 0.8)
    assert isinstance(guided, gk.Denoiser)


def test_guided_denoisers_may_forget_but_need_no_grid():
    _, c, u, _ = parts()
    x, cond = states()
    guided = gg.Guided(mixture(), gg.apg(3.0, momentum=-0.5, eta=1.0), forget=True)
    value = jax.jit(jax.vmap(lambda y, k: guided(y, 0.8, k)))(x, cond)
    close(value, c + 2 * (c - u))  # the first step, in which there is nothing to remember
    with pytest.raises(ValueError, match="noise level alone"):
        gg.Guided(mixture(), gg.cfgpp(0.6), forget=True)


def test_guided_denoisers_have_a_flow_but_no_likelihood():
    guided = gg.Guided(mixture(), gg.cfg(2.0))
    with pytest.raises(ValueError, match="score of no noisy data distribution"):
        gk.diffusion.log_prob(guided, jnp.zeros(3), sigma_min=0.1, sigma_max=10.0, cond=1)
    draws = gk.sample(gk.diffusion.probability_flow(0.1, 10.0), guided, 2, cond=1, key=jax.random.key(0))
    assert bool(draws.info["ok"].all())
