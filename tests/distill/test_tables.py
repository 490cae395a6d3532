"""The library's gradients lead to the exact optima: Gaussian students of mixtures, and binomial policies."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from distill.helpers import BINOMIAL, FAMILY, TABLES, mixture, student
from jax.scipy.special import gammaln, logsumexp

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")
NAMES = list(FAMILY)
TOLERANCE = np.array([0.03 if name == "softened reverse KL" else 0.02 for name in NAMES])
LEVELS = {"clean": (0.0, 0.0, 0.0, 0.0), "diffused": (0.25, 0.5, 1.0, 2.0)}
STEPS = 400


def pathwise(divergence, model, levels):
    """The loss of the library on the nodes of a quadrature, so that its gradient has no noise.

    With x = m + s z and x_t = x + sigma e, the gradient is linear in the combination b of z and e that x_t does not
    see: two nodes are exact for b, and a trapezoid rule is for the other one.
    """
    a = jnp.linspace(-7.0, 7.0, 160)
    a, b, sigma = (g.ravel() for g in jnp.meshgrid(a, jnp.array([-1.0, 1.0]), levels, indexing="ij"))
    probability = jnp.exp(-(a**2) / 2)
    std = jax.lax.stop_gradient(jnp.exp(model.student.log_std))
    total = jnp.sqrt(std**2 + sigma**2)
    z, noise = (std * a + sigma * b) / total, (sigma * a - std * b) / total
    x = jax.vmap(model.student)(z[:, None])
    weight = probability / jnp.mean(probability)
    batch = gk.distill.NoisyBatch(x, x + (sigma * noise)[:, None], sigma, noise[:, None], None, weight)
    loss = gk.distill.FDistill(divergence, gk.distill.ExactRatio())
    return loss(model, batch, key=jr.key(0))[0]


def score_function(divergence, model, levels):
    """f-DPG on a fixed grid of points, for the divergence that has no pathwise gradient."""
    x = jnp.linspace(-9.0, 9.0, 1201)[:, None]

    def at(level):
        policy = jax.vmap(lambda y: model.student.denoiser().log_density(y, level))(x)
        target = jax.vmap(lambda y: model.teacher.log_density(y, level))(x)
        uniform = jnp.full(x.shape[0], -jnp.log(18.0))
        return gk.distill.fdpg(policy, target, divergence=divergence, proposal_log_prob=uniform, log_z=0.0)

    return jnp.mean(jax.vmap(at)(levels))


@jax.jit
def optimize(theta, teacher, levels):
    """Adam on all divergences at once."""

    def losses(theta):
        rows = []
        for i, make in enumerate(FAMILY.values()):
            model = gk.distill.Distillation(student(theta[i, 0], jnp.exp(theta[i, 1])), teacher)
            rows.append((pathwise if make().pathwise else score_function)(make(), model, levels))
        return jnp.sum(jnp.stack(rows))

    adam = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))

    def step(carry, _):
        theta, state = carry
        updates, state = adam.update(jax.grad(losses)(theta), state)
        return (optax.apply_updates(theta, updates), state), None

    return jax.lax.scan(step, (theta, adam.init(theta)), None, STEPS)[0][0]


@functools.cache
def optima(name, kind):
    """Where the gradients lead; on A, which has several optima, from beside the global one."""
    exact = TABLES[name, kind]
    beside = exact + np.array([0.15, 0.1 * np.sign(exact[:, 1] - 1)[0]])
    start = np.tile([-0.3, 1.0], (len(NAMES), 1)) if name == "B" else beside
    theta = np.stack([start[:, 0], np.log(start[:, 1])], 1)
    found = np.asarray(optimize(jnp.asarray(theta), mixture(name), jnp.asarray(LEVELS[kind])))
    return np.stack([found[:, 0], np.exp(found[:, 1])], 1)


@pytest.mark.parametrize(("name", "kind"), TABLES)
def test_every_divergence_reaches_its_exact_optimum(name, kind):
    error = np.abs(optima(name, kind) - TABLES[name, kind]).max(1)
    worst = dict(zip(NAMES, error.round(4).tolist(), strict=True))
    assert (error <= TOLERANCE).all(), worst


def test_the_ladder_from_mode_seeking_to_covering():
    std = optima("B", "clean")[:, 1]
    assert (np.diff(std) > 0).all(), dict(zip(NAMES, std, strict=True))


def test_noise_turns_the_reverse_kl_from_one_mode_to_both():
    row = NAMES.index("reverse KL")
    assert optima("A", "clean")[row, 1] < 0.7 and optima("A", "diffused")[row, 1] > 1.8


def log_binomial(theta, x):
    choose = gammaln(13.0) - gammaln(x + 1.0) - gammaln(13.0 - x)
    return choose + x * jnp.log(theta) + (12 - x) * jnp.log1p(-theta)


def log_target(x):
    return logsumexp(jnp.stack([jnp.log(0.6) + log_binomial(0.2, x), jnp.log(0.4) + log_binomial(0.75, x)]), axis=0)


def test_fdpg_has_its_root_at_the_exact_policy():
    x = jnp.arange(13.0)
    uniform = jnp.full(13, -jnp.log(13.0))

    @jax.jit
    def slopes(theta):
        def total(theta):
            rows = [
                gk.distill.fdpg(log_binomial(theta[i], x), log_target(x) + 3.0, divergence=make(),
                                proposal_log_prob=uniform, log_z=3.0)
                for i, make in enumerate(FAMILY.values())
            ]  # fmt: skip
            return jnp.sum(jnp.stack(rows))

        return jax.grad(total)(theta)

    below, above = slopes(jnp.asarray(BINOMIAL - 5e-4)), slopes(jnp.asarray(BINOMIAL + 5e-4))
    assert (np.asarray(below) < 0).all() and (np.asarray(above) > 0).all(), (below, above)
    # The estimated normalizer is exact here, where every outcome is drawn once.
    one = lambda z: gk.distill.fdpg(log_binomial(0.3, x), log_target(x) + 3.0, divergence=gk.divergence.LeCam(),
                                    proposal_log_prob=uniform, log_z=z)  # fmt: skip
    np.testing.assert_allclose(one(None), one(3.0), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Jensen-Shannon", "reverse KL"])
def test_fdpg_trains_a_policy(name):
    law = lambda logit: dist.Binomial(total_count=12, logits=logit)
    policy = gk.distill.LawPolicy(law, jnp.asarray(-0.8))
    recipe = gk.distill.policy_recipe(policy, log_target_of_counts, divergence=FAMILY[name](), num_steps=400,
                                      num_draws=512)  # fmt: skip
    fitted = gk.fit(recipe.replace(log_every=400, ema=0.98), key=jr.key(1))
    found = float(jax.nn.sigmoid(fitted.ema.policy.params))
    assert abs(found - BINOMIAL[NAMES.index(name)]) < 0.01
    assert abs(fitted.log["log_z"][-50:].mean() - 3.0) < 0.1


def log_target_of_counts(x):
    return log_target(x.astype(float)) + 3.0


@pytest.mark.slow
def test_fdpg_trains_an_autoregressive_policy_to_the_exact_law():
    # Two tokens, three places: a target over eight sequences that no product of margins is.
    policy = gk.distill.AutoregressivePolicy(2, 3, width=8, key=jr.key(0))
    recipe = gk.distill.policy_recipe(policy, parity, divergence=gk.divergence.SquaredHellinger(), num_steps=500,
                                      num_draws=256)  # fmt: skip
    fitted = gk.fit(recipe.replace(log_every=500), key=jr.key(1))
    words = jnp.asarray([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    exact = jax.nn.softmax(jax.vmap(parity)(words))
    found = jnp.exp(jax.vmap(fitted.model.policy.log_prob)(words))
    np.testing.assert_allclose(jnp.sum(found), 1.0, rtol=1e-10)
    assert 0.5 * float(jnp.sum(jnp.abs(found - exact))) < 0.05


def parity(word):
    return jnp.log(jnp.where(jnp.sum(word) % 2 == 0, 4.0, 1.0)) + 1.5


@pytest.mark.slow
def test_draws_of_a_policy_follow_its_probabilities():
    policy = gk.distill.AutoregressivePolicy(3, 2, width=4, key=jr.key(3))
    wide = jax.tree.map(lambda w: w + 0.5 * jr.normal(jr.key(4), w.shape), policy.head)
    policy = eqx.tree_at(lambda p: p.head, policy, wide)
    words = jnp.asarray([[i, j] for i in range(3) for j in range(3)])
    probability = jnp.exp(jax.vmap(policy.log_prob)(words))
    drawn = policy.sample(4000, key=jr.key(5))
    counts = np.bincount(np.asarray(drawn[:, 0] * 3 + drawn[:, 1]), minlength=9) / 4000
    band = 5.5 * np.sqrt(probability * (1 - probability) / 4000)
    assert (np.abs(counts - probability) < band).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse KL", "Jensen-Shannon", "forward KL"])
def test_distill_reaches_the_optimum_with_draws(name):
    made = gk.distill.distill(
        mixture("B"),
        student(0.0, 1.5),
        divergence=FAMILY[name](),
        ratio=gk.distill.ExactRatio(),
        noise_distribution=dist.Delta(0.0),
        num_steps=2000,
        batch_size=1024,
        ema=0.99,
        key=jr.key(0),
    )
    exact = TABLES["B", "clean"][NAMES.index(name)]
    found = [float(made.ema.mean[0]), float(jnp.exp(made.ema.log_std[0]))]
    np.testing.assert_allclose(found, exact, atol=0.02)
    assert made.history["ess"].shape == (2000,) and made.history["divergence"].shape == (2000,)
