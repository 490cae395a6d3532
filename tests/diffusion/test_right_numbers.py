"""What people really write: arrays closed over in jit, half precision, sorted data, networks of another shape."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import genkit as gk


gd = gk.diffusion
LABELS = np.array([0, 1, 1])
MEANS = np.array([[-1.0], [1.0], [3.0]], np.float32)


def labeled(kind, labels):
    if kind == "mixture":
        return gd.MixtureDenoiser(np.ones(3, np.float32), MEANS, np.float32(0.25), labels)
    return gd.EmpiricalDenoiser(MEANS, labels)


# Labeled analytic denoisers inside transformations.


@pytest.mark.parametrize("kind", ["mixture", "empirical"])
@pytest.mark.parametrize("as_labels", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_labeled_denoisers_are_built_under_jit_and_grad(kind, as_labels):
    labels = as_labels(LABELS)
    x, sigma = jnp.array([0.3]), jnp.array(1.0)
    want = labeled(kind, LABELS)(x, sigma, 1)
    np.testing.assert_allclose(jax.jit(lambda x: labeled(kind, labels)(x, sigma, 1))(x), want, rtol=1e-6)
    eager = jax.grad(lambda x: labeled(kind, LABELS)(x, sigma, 1)[0])(x)
    np.testing.assert_allclose(jax.grad(lambda x: labeled(kind, labels)(x, sigma, 1)[0])(x), eager, rtol=1e-6)


def test_traced_labels_need_their_number():
    def build(labels, **options):
        return gd.MixtureDenoiser(np.ones(3), MEANS, 0.25, labels, **options)(jnp.array([0.3]), 1.0, 1)

    with pytest.raises(ValueError, match="Pass `num_labels=`"):
        jax.jit(build)(LABELS)
    got = jax.jit(lambda labels: build(labels, num_labels=2))(LABELS)
    np.testing.assert_allclose(got, build(LABELS), rtol=1e-6)
    with pytest.raises(ValueError, match="`num_labels` must be the number of labels, 2"):
        build(LABELS, num_labels=3)


def test_a_labeled_denoiser_is_trained_by_fit():
    # The means are learned through the exact denoiser that they make, built anew in every step.
    class Learned(gk.Denoiser):
        means: jax.Array

        def __call__(self, x, sigma, cond=None):
            return gd.MixtureDenoiser(np.ones(2), self.means, 0.25, np.array([0, 1]))(x, sigma, cond)

    def draw(key):
        key_label, key_noise = jr.split(key)
        label = jr.bernoulli(key_label, 0.5, (64,)).astype(int)
        return 2.0 * label[:, None] - 1 + 0.5 * jr.normal(key_noise, (64, 1)), label

    phase = gk.Phase(gd.DenoisingScoreMatching(), optax.adam(0.05))
    recipe = gk.Recipe(lambda key: Learned(jnp.zeros((2, 1))), jax.tree_util.Partial(draw), [phase], 150)
    found = gk.fit(recipe, key=jr.key(0)).model.means
    np.testing.assert_allclose(found, [[-1.0], [1.0]], atol=0.15)


def test_known_arrays_are_known_inside_jit():
    levels = jnp.array(0.05)
    weights = jnp.ones(2)
    schedule = gd.VP()

    @jax.jit
    def build(x):
        gd.BrownianNoise(levels, jnp.array(10.0))
        gd.MixtureDenoiser(weights, jnp.zeros((2, 1)), jnp.array(0.1))
        gd.time_uniform(schedule, 4, t_min=0.1, t_max=1.0)
        gd.beta_quantile(4, levels, 10.0, schedule=schedule)
        gd.VE(levels, jnp.array(10.0))
        gd.LikelihoodBound(levels, jnp.array(10.0))
        gd.KineticOptimal.from_data(data)
        return gd.GaussianDenoiser(jnp.zeros(2), cov)(x, levels)

    cov = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    data = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)))
    want = gd.GaussianDenoiser(jnp.zeros(2), cov)(jnp.ones(2), levels)
    np.testing.assert_allclose(build(jnp.ones(2)), want, rtol=1e-6)


# Adaptive draws, sorted data, half precision.


def test_adaptive_draws_do_not_depend_on_the_batch_size():
    data = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    denoiser = gd.EmpiricalDenoiser(data)
    x_init = 20 * jr.normal(jr.key(1), (18, 16))
    flow = gd.probability_flow(0.02, 20.0)
    run = lambda size: gk.sample(flow, denoiser, 18, key=jr.key(0), x_init=x_init, batch_size=size)
    together = run(18)
    apart = run(7)
    np.testing.assert_allclose(apart.value, together.value, atol=1e-6)
    np.testing.assert_array_equal(apart.nfe_logical, together.nfe_logical)
    assert np.all(together.nfe >= together.nfe_logical)


def test_a_path_looks_at_all_of_sorted_data():
    # 5,000 sorted points of two clusters: the first 1,024 alone are one cluster, for which any path is free.
    rng = np.random.default_rng(0)
    x = np.sort(np.concatenate([rng.normal(-3, 0.1, 2500), rng.normal(3, 0.1, 2500)]))[:, None]
    in_order = float(gd.KineticOptimal.from_data(x, num_nodes=64).energy)
    shuffled = float(gd.KineticOptimal.from_data(rng.permutation(x), num_nodes=64).energy)
    assert in_order == pytest.approx(shuffled, rel=0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_power_averages_keep_their_increments(dtype):
    # A parameter that goes from 0 to 1 and stays: the averages of both widths, by the recurrence in float64.
    path = np.minimum(np.arange(1, 1001) / 500, 1.0)

    @jax.jit
    def average(path):
        start = gd.PowerEMA.start(jnp.zeros((), dtype))
        return jax.lax.scan(lambda ema, x: (ema.update(x), None), start, path)[0]

    ema = average(jnp.asarray(path, dtype))
    for width, found in zip((0.05, 0.1), ema.averages, strict=True):
        exponent = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2]).real.max()
        want = 0.0
        for t, x in enumerate(np.asarray(jnp.asarray(path, dtype), np.float64), start=1):
            want += (1 - (1 - 1 / t) ** (exponent + 1)) * (x - want)
        assert found.dtype == jnp.float32
        assert float(found) == pytest.approx(want, abs=1e-5)
    mixed = gd.posthoc_ema([ema], 0.07, model=jnp.zeros((), dtype))
    assert mixed.dtype == dtype


# Refusals.


OBJECTIVES = {
    "denoising": gd.DenoisingScoreMatching(),
    "flow": gd.FlowMatching(),
    "likelihood": gd.LikelihoodBound(0.01, 10.0),
    "variational": gd.VariationalBound(np.array([10.0, 1.0, 0.1])),
}
SHAPES = {
    "one of three": lambda x, *rest: x[:1],
    "scalar": lambda x, *rest: x[0],
    "column": lambda x, *rest: x[:, None],
    "leading axis": lambda x, *rest: x[None],
    "integers": lambda x, *rest: x.astype(int),
}


@pytest.mark.parametrize("net", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_training_refuses_a_network_of_another_shape(objective, net):
    # As many examples as coordinates: broadcasting would hide the mistake.
    with pytest.raises(ValueError, match=r"`model` must return a floating array of the shape of an example, \(3,\)"):
        objective(net, jnp.ones((3, 3)), key=jr.key(0))


@pytest.mark.parametrize("net", [SHAPES["one of three"], SHAPES["scalar"]], ids=["one of three", "scalar"])
@pytest.mark.parametrize("objective", [gd.ImplicitScoreMatching(), gd.SlicedScoreMatching(2)])
def test_score_matching_refuses_a_score_of_another_shape(objective, net):
    with pytest.raises(ValueError, match="`model` must return a floating array of the shape"):
        objective(net, jnp.ones((3, 3)), key=jr.key(0))


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), gd.ImplicitScoreMatching(), gd.SlicedScoreMatching()])
def test_an_empty_batch_is_refused(objective):
    with pytest.raises(ValueError, match="`batch` must be at least one example"):
        objective(gd.GaussianDenoiser(jnp.zeros(2), 1.0), jnp.zeros((0, 2)), key=jr.key(0))


@pytest.mark.parametrize(
    "schedule",
    [gd.EDM(), gd.VE(0.01, 50.0), gd.VP(), gd.SubVP(), gd.CondOT(), gd.Cosine(), gd.Polynomial(), gd.Tabulated(
        np.array([8.0, 2.0, -6.0])), gd.Discrete(gd.ddpm_betas(10)), gd.Shifted(gd.CondOT(), 3.0),
     gd.KineticOptimal(np.zeros_like, num_nodes=16)],
    ids=lambda schedule: type(schedule).__name__,
)  # fmt: skip
def test_a_negative_noise_level_has_no_time(schedule):
    with pytest.raises(ValueError, match="`noise_level` must be non-negative; got -1"):
        schedule.time(-1.0)


def test_teleportation_refuses_negative_levels():
    data = gd.GaussianDenoiser(jnp.zeros(1), 1.0)
    with pytest.raises(ValueError, match="`sigma_from` must be non-negative"):
        gd.teleport(data, jnp.zeros(1), -2.0, 1.0)
    with pytest.raises(ValueError, match="`sigma_to` must be non-negative"):
        gd.teleport(data, jnp.zeros(1), 2.0, -1.0)


def test_a_density_that_is_nan_is_told():
    data = gd.GaussianDenoiser(jnp.zeros(2), 1.0)
    with pytest.raises(ValueError, match="`x` must be finite"):
        gd.log_prob(data, jnp.array([0.0, jnp.nan]), sigma_min=0.1, sigma_max=5.0)
    broken = eqx.tree_at(lambda d: d.mean, data, jnp.array([0.0, jnp.nan]))
    with pytest.warns(UserWarning, match="log-density is NaN"):
        found = gd.log_prob(broken, jnp.zeros(2), sigma_min=0.1, sigma_max=5.0, max_steps=16)
    assert not bool(found.ok)
