"""Objectives without noise, bounds, couplings, learned weights, averages, and samplers with steps of their own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from scipy.optimize import linear_sum_assignment
from stats import assert_mean, assert_variance

import genkit as gk
from genkit.diffusion._objectives._assignment import assignment
from genkit.diffusion._objectives._power_ema import ema_exponent


gd = gk.diffusion
COV = np.array([[1.0, 0.6], [0.6, 0.5]])


def batch_of(size=4000):
    """Data whose sample covariance is exactly COV: then so are the minimizers below."""
    x = np.random.default_rng(0).normal(size=(size, 2))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T
    return x @ np.linalg.cholesky(COV).T


class Linear(eqx.Module):
    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ x


def newton(loss, start):
    """The minimizer of a quadratic: one step."""
    flat = lambda v: loss(v.reshape(start.shape))
    slope, bend = jax.jit(lambda v: (jax.grad(flat)(v), jax.hessian(flat)(v)))(start.ravel())
    return (start.ravel() - jnp.linalg.solve(bend, slope)).reshape(start.shape)


def test_score_matching_without_noise_recovers_the_gaussian_score(x64):
    # A linear score on Gaussian data: the minimizer is minus the inverse covariance.
    x = jnp.asarray(batch_of(400))
    exact = -np.linalg.inv(COV)
    loss = lambda objective: lambda m: objective(Linear(m), x, key=jr.key(1))[0]
    found = newton(loss(gd.ImplicitScoreMatching()), jnp.zeros((2, 2)))
    np.testing.assert_allclose(found, exact, atol=1e-9)
    value = loss(gd.ImplicitScoreMatching())(jnp.asarray(exact))
    assert float(value) == pytest.approx(-0.5 * np.trace(-exact), rel=1e-9)
    # Slices: the square is exact, the divergence is linear in signs, so the minimizer moves by their sampling alone.
    sliced = newton(loss(gd.SlicedScoreMatching(64)), jnp.zeros((2, 2)))
    np.testing.assert_allclose(sliced, exact, atol=0.2)
    gaussian = gd.SlicedScoreMatching(64, reduced=False, directions="gaussian")
    np.testing.assert_allclose(newton(loss(gaussian), jnp.zeros((2, 2))), exact, atol=0.6)


def test_denoising_score_matching_recovers_the_smoothed_score(x64):
    # The same linear model as a denoiser at one noise level: x + sigma^2 s, with the covariance of the noisy data.
    x = jnp.asarray(np.repeat(batch_of(200), 40, axis=0))
    level = 0.5
    objective = gd.DenoisingScoreMatching(dist.Uniform(level, level + 1e-9), gd.EpsWeight())

    def loss(m):
        return objective(lambda x, sigma, cond: x + level**2 * (m @ x), x, key=jr.key(2))[0]

    exact = -np.linalg.inv(COV + level**2 * np.eye(2))
    np.testing.assert_allclose(newton(loss, jnp.zeros((2, 2))), exact, atol=0.12)


def test_bounds_hold_and_are_tight_for_the_exact_model(x64):
    law = gd.GaussianDenoiser(jnp.zeros(2), jnp.asarray(COV))
    x = jnp.asarray(np.tile(batch_of(4000), (100, 1)))
    exact = 0.5 * (2 * (1 + np.log(2 * np.pi)) + np.linalg.slogdet(COV)[1])
    low, high = 0.01, 100.0
    grids = [gd.log_uniform(n, low, high, None) for n in (20, 2000)]

    @jax.jit
    def values(law):
        continuous = gd.LikelihoodBound(low, high)(law, x, key=jr.key(0))
        return continuous, [gd.VariationalBound(grid)(law, x, key=jr.key(1))[0] for grid in grids]

    (bound, parts), (coarse, fine) = values(law)
    np.testing.assert_allclose(bound, parts["diffusion"] + parts["prior"] + parts["decoder"])
    # Tight up to the smallest noise and sampling: each term is 9 times chi-square of two, so 13 / sqrt(400,000) at five
    # standard errors is 0.1.
    assert float(bound) == pytest.approx(exact, abs=0.11)
    assert float(fine) == pytest.approx(exact, abs=0.15)
    assert float(coarse) > exact + 0.5
    # A wrong model loses by the divergence of its law from the data: the bound is one on its own likelihood too.
    wide = gd.GaussianDenoiser(jnp.zeros(2), jnp.asarray(4 * COV))
    cross = 0.5 * (2 * np.log(2 * np.pi) + np.linalg.slogdet(4 * COV)[1] + 2 / 4)
    (worse, _), _ = values(wide)
    assert float(worse) > cross - 0.11


def test_learned_weights_find_the_error_of_every_level(x64):
    # The best u is the logarithm of the weighted error per coordinate: known for Gaussian data.
    law = gd.GaussianDenoiser(jnp.zeros(2), jnp.array(1.0))
    model = gd.WithUncertainty(law, key=jr.key(0))
    objective = gd.LearnedWeighting(gd.DenoisingScoreMatching(dist.LogNormal(0.0, 1.0), gd.EpsWeight()))
    x = jr.normal(jr.key(1), (2048, 2))
    optimizer = optax.adam(2e-2)
    where = lambda m: (m.log_variance.weights, m.log_variance.bias)

    @jax.jit
    def train(params):
        def step(carry, i):
            params, state = carry
            loss = lambda p: objective(eqx.tree_at(where, model, p), x, key=jr.fold_in(jr.key(2), i))[0]
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(600))[0][0]

    trained = eqx.tree_at(where, model, train(where(model)))
    levels = np.array([0.3, 1.0, 3.0])
    found = [float(trained.log_variance(jnp.log(s) / 4)) for s in levels]
    np.testing.assert_allclose(found, np.log(1 / (1 + levels**2)), atol=0.25)


def test_assignments_are_optimal(x64):
    solve = jax.jit(assignment)
    for seed in range(12):
        cost = np.random.default_rng(seed).normal(size=(24, 24))
        if seed % 3 == 0:
            cost = np.round(cost)  # ties
        rows, columns = linear_sum_assignment(cost)
        found = np.asarray(solve(cost))
        assert sorted(found) == list(range(24))
        assert cost[rows, found].sum() == pytest.approx(cost[rows, columns].sum(), abs=1e-9)


def test_couplings_move_the_noise_alone():
    key = jr.key(0)
    x0, noise = jr.normal(jr.fold_in(key, 0), (2, 48, 3)) + jnp.array([[[3.0]], [[0.0]]])
    labels = jnp.arange(48) % 2
    same = gd.IndependentCoupling()(x0, noise, labels, key=jr.key(1))
    np.testing.assert_array_equal(same[1], noise)
    couple = jax.jit(lambda c: c(x0, noise, labels, key=jr.key(1)))
    cost = lambda pair: float(jnp.sum((pair[0] - pair[1]) ** 2))
    free, aware = couple(gd.MinibatchOT()), couple(gd.MinibatchOT(1e6))
    for pair in (free, aware):
        np.testing.assert_array_equal(pair[0], x0)
        np.testing.assert_array_equal(pair[2], labels)
        np.testing.assert_allclose(np.sort(pair[1], axis=0), np.sort(noise, axis=0))
    assert cost(free) < cost(aware) < cost((x0, noise))
    # A large weight keeps every class among itself, optimally.
    best = 0.0
    for label in (0, 1):
        members = np.flatnonzero(np.asarray(labels) == label)
        distance = np.sum((np.asarray(x0)[members, None] - np.asarray(noise)[None, members]) ** 2, -1)
        best += distance[linear_sum_assignment(distance)].sum()
    assert cost(aware) == pytest.approx(best, rel=1e-5)
    objective = gd.FlowMatching(coupling=gd.MinibatchOT())
    law = gd.GaussianDenoiser(jnp.zeros(3), jnp.ones(3))
    assert np.isfinite(jax.jit(lambda x0: objective(law, x0, key=jr.key(3))[0])(x0))


def test_average_of_any_width_after_training(x64):
    # A parameter that moves: the average of a third width, reconstructed and kept along the way.
    path = 1 + np.cumsum(np.random.default_rng(0).normal(size=400)) / 20
    wanted = ema_exponent(0.08)
    direct, snapshots = 0.0, []
    update = jax.jit(lambda ema, x: ema.update(x))
    ema = gd.PowerEMA.start(jnp.zeros(1))
    for i, x in enumerate(path, start=1):
        direct += (1 - (1 - 1 / i) ** (wanted + 1)) * (x - direct)
        ema = update(ema, jnp.full(1, x))
        if i % 25 == 0:
            snapshots.append(ema)
    found = gd.posthoc_ema(snapshots, 0.08, model=jnp.zeros(1))
    assert float(found[0]) == pytest.approx(direct, abs=2e-3)
    # A width that was kept comes back exactly.
    kept = gd.posthoc_ema(snapshots, 0.05, model=jnp.zeros(1))
    np.testing.assert_allclose(kept, ema.averages[0], rtol=1e-6)
    # The definition of the width: the deviation of the weights over time.
    t = np.linspace(0, 1, 200_001)[1:]
    weights = t**wanted / np.sum(t**wanted)
    assert np.sqrt(np.sum(weights * t**2) - np.sum(weights * t) ** 2) == pytest.approx(0.08, rel=1e-3)


# Predictor-corrector and Brownian noise.


def test_corrections_repair_a_coarse_predictor():
    # White data: the exact variance is known. Langevin steps repair what coarse predictor steps miss.
    # Many coordinates, because the size of a step hangs on the norm of its own noise.
    law = gd.GaussianDenoiser(jnp.zeros(64), jnp.array(1.0))
    grid, num = gd.log_uniform(12, 0.1, 20.0, None), 400
    errors = []
    for corrections in (0, 8):
        sampler = gd.predictor_corrector(grid, 0.3, corrections)
        draws = gk.sample(sampler, law, num, key=jr.key(0))
        assert int(draws.nfe[0]) == 11 * (1 + corrections)
        errors.append(abs(float(draws.value.var()) / 1.01 - 1))
    assert errors[1] < 0.5 * errors[0]
    plain = gk.sample(gd.predictor_corrector(grid, 0.16, 0), law, num, key=jr.key(0)).value
    exact = gd.exact_error(gd.reverse_diffusion(grid), law, start="white")
    assert_variance(plain, exact.variance, gaussian=True)


def test_a_draw_does_not_depend_on_its_batch():
    law = gd.GaussianDenoiser(jnp.zeros(3), jnp.array([4.0, 1.0, 0.1]))
    grid = gd.karras(6, 0.05, 10.0)
    x_init = 10 * jr.normal(jr.key(1), (8, 3))
    run = lambda norm, size: (
        gk.sample(gd.predictor_corrector(grid, norm=norm), law, 8, key=jr.key(0), x_init=x_init, batch_size=size).value
    )
    np.testing.assert_allclose(run("sample", 8), run("sample", 4), rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(run("batch", 8) - run("batch", 4)).max()) > 1e-3


# diffrax's tree splits keys of its own more than once.
@pytest.mark.slow
@pytest.mark.key_reuse
def test_one_brownian_path_for_every_step_count():
    law = gd.GaussianDenoiser(jnp.zeros(3), jnp.array([4.0, 1.0, 0.1]))
    x_init = 10 * jr.normal(jr.key(1), (64, 3))

    def draws(steps, brownian):
        table = gd.ancestral(gd.log_uniform(steps + 1, 0.05, 10.0, None))
        sampler = gk.Sampler(table, noise=gd.BrownianNoise(0.05, 10.0)) if brownian else table
        return gk.sample(sampler, law, 64, key=jr.key(0), x_init=x_init).value

    apart = lambda brownian: float(jnp.sqrt(jnp.mean((draws(64, brownian) - draws(128, brownian)) ** 2)))
    # Draws of more steps stay near; fresh noise moves them by their own standard deviation.
    assert apart(True) < 0.1 < 0.7 < apart(False)


@pytest.mark.key_reuse  # as above
def test_the_noise_of_a_brownian_path_has_the_law_of_the_table():
    law = gd.GaussianDenoiser(jnp.zeros(2), jnp.array([1.0, 0.25]))
    table = gd.sa(gd.karras(8, 0.05, 10.0, final=None), 2)
    x_init = jnp.zeros((3000, 2))
    x_init = 10 * jr.normal(jr.key(1), x_init.shape)
    draws = gk.sample(
        gk.Sampler(table, noise=gd.BrownianNoise(0.05, 10.0)), law, 3000, key=jr.key(0), x_init=x_init
    ).value
    exact = gd.exact_error(table, law, start="white")
    assert_variance(draws, exact.variance, gaussian=True)
    assert_mean(draws, 0.0, sd=np.sqrt(exact.variance))


@pytest.mark.key_reuse  # as above
def test_noise_stays_when_guidance_is_given_in_the_call():
    law = gd.MixtureDenoiser(jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.1), labels=jnp.array([0, 1]))
    table, noise, guidance = gd.ancestral(gd.karras(5, 0.05, 10.0)), gd.BrownianNoise(0.05, 10.0), gk.guidance.cfg(2.0)
    run = lambda sampler, **given: gk.sample(sampler, law, 4, cond=1, key=jr.key(0), **given).value
    inside = run(gk.Sampler(table, guidance, noise=noise))
    np.testing.assert_array_equal(run(gk.Sampler(table, noise=noise), guidance=guidance), inside)
    assert float(jnp.abs(run(table, guidance=guidance) - inside).max()) > 0.01


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gd.SlicedScoreMatching(0), "num_slices"),
        (lambda: gd.SlicedScoreMatching(1, directions="uniform"), "directions"),
        (lambda: gd.LikelihoodBound(1.0, 0.5), "sigma_min"),
        (lambda: gd.LikelihoodBound(0.0, 0.5), "sigma_min"),
        (lambda: gd.VariationalBound(gd.karras(4, 0.1, 1.0)), "grid"),
        (lambda: gd.LearnedWeighting(3.0), "base"),
        (lambda: gd.WithUncertainty(lambda x, s, c: x), "key"),
        (lambda: gd.MinibatchOT(-1.0), "condition_weight"),
        (lambda: assignment(jnp.ones((2, 3))), "cost"),
        (lambda: assignment(jnp.full((2, 2), jnp.nan)), "cost"),
        (lambda: ema_exponent(0.5), "width"),
        (lambda: gd.posthoc_ema([], 0.1, model=jnp.zeros(1)), "snapshots"),
        (lambda: gd.PowerEMA.start(jnp.zeros(1), (0.1, 0.1)), "widths"),
        (lambda: gd.predictor_corrector(gd.karras(4, 0.1, 1.0), snr=0.0), "snr"),
        (lambda: gd.predictor_corrector(gd.karras(4, 0.1, 1.0), norm="max"), "norm"),
        (
            lambda: gk.Sampler(gd.heun(gd.karras(4, 0.1, 1.0), (1.0, 0.0, 9.0, 1.0)), noise=gd.BrownianNoise(0.1, 1.0)),
            "table",
        ),
        (lambda: gd.BrownianNoise(1.0, 0.1), "sigma_min"),
    ],
)
def test_wrong_input(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()
