"""Simulation: laws of paths, order of the steps, memory, and what the drivers refuse."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
import stats

import genkit.noise as gn
import genkit.sde as gs
from genkit.sde._start import cut


CHEAP = gn.ma_fbm(5, 0.05, 1e3)


def ou(theta=1.0, sigma=0.7, hurst=0.3, horizon=1.0, lift=CHEAP, **kwargs):
    return gs.FractionalSDE(gs.OrnsteinUhlenbeck(theta), gs.Constant(sigma), lift, hurst, horizon, **kwargs)


def paths(sde, ts, num, **kwargs):
    return jax.vmap(lambda k: gs.simulate(sde, ts, key=k, **kwargs).x)(jr.split(jr.key(5), num))


@pytest.mark.parametrize("kind", ["I", "II", "I-published"])
def test_noise_has_the_covariance_of_the_lift(kind):
    lift = gn.ma_fbm(5, 0.05, 1e3, kind=kind)
    ts = np.array([0.2, 0.5, 2.0, 4.0])
    sde = gs.FractionalSDE(lambda t, x: 0 * x, gs.Constant(1.0), lift, jnp.array([0.3, 0.8]), 4.0)
    x = paths(sde, ts, 20_000)
    for i, hurst in enumerate((0.3, 0.8)):
        wanted = 4.0 ** (2 * hurst) * lift.covariance(hurst, ts[:, None] / 4, ts[None] / 4)
        stats.assert_covariance(x[..., i], wanted)
    stats.assert_mean(x[:, :, 0] * x[:, :, 1], 0.0)


@pytest.mark.parametrize("step", ["path_mean", "exponential", pytest.param("exact", marks=pytest.mark.slow)])
def test_fractional_ou_from_zero(step):
    ts = np.array([0.5, 1.0, 2.0])
    sde = ou(1.0, 1.0, 0.7, 2.0, lift=gn.ma_fbm(), step=step)
    x = paths(sde, ts, 20_000, max_step=None if step == "exact" else 0.1)[..., 0]
    wanted = gn.fou_covariance(0.7, ts[:, None], ts[None], 1.0)
    stats.assert_covariance(x, wanted)


@pytest.mark.long
def test_varying_index_agrees_with_a_constant_one_and_with_its_own_variance():
    ts = np.array([0.25, 0.5, 1.0])
    zero = lambda t, x: 0 * x
    varying = gs.FractionalSDE(zero, gs.Constant(1.0), CHEAP, lambda t: 0.3 + 0.4 * t, 1.0)
    x = paths(varying, ts, 20_000, max_step=0.125)[..., 0]
    variance = [float(CHEAP.covariance(0.3 + 0.4 * t, t, t)) for t in ts]
    stats.assert_variance(x, np.array(variance), gaussian=True)
    constant = gs.FractionalSDE(zero, gs.Constant(1.0), CHEAP, lambda t: jnp.full((), 0.7), 1.0)
    y = paths(constant, ts, 20_000)[..., 0]
    stats.assert_covariance(y, CHEAP.covariance(0.7, ts[:, None], ts[None]))


@pytest.mark.long
@pytest.mark.key_reuse  # the same key again, on purpose
@pytest.mark.usefixtures("x64")
def test_multiplicative_noise_is_stratonovich_and_of_first_order():
    """dX = X o dB has X = exp(B): compared along the same noise (same key)."""

    def error(num):
        scalar = gs.FractionalSDE(lambda t, x: 0 * x, lambda t, x: x, CHEAP, 0.7, 1.0, x0=1.0)
        plain = gs.FractionalSDE(lambda t, x: 0 * x, gs.Constant(1.0), CHEAP, 0.7, 1.0)
        keys = jr.split(jr.key(1), 200)
        ts = np.linspace(0, 1, num + 1)
        x = jax.vmap(lambda k: gs.simulate(scalar, ts, key=k).x[-1, 0])(keys)
        b = jax.vmap(lambda k: gs.simulate(plain, ts, key=k).x[-1, 0])(keys)
        return float(jnp.sqrt(jnp.mean((x / jnp.exp(b) - 1) ** 2)))

    errors = [error(n) for n in (16, 64)]
    assert errors[1] < errors[0] / 3  # order 1 or better at H = .7
    assert errors[1] < 0.01


def test_one_compilation_serves_every_number(compilations):
    ts = np.linspace(0.1, 1.0, 10)
    gs.simulate(ou(1.0), ts, key=jr.key(0)).x.block_until_ready()
    with compilations() as count:
        gs.simulate(ou(2.0, 0.3, 0.4, 2.0), ts, key=jr.key(1)).x.block_until_ready()
    assert count() == 0


@pytest.mark.slow
@pytest.mark.key_reuse  # the same key again, on purpose
def test_jit_and_eager_agree():
    ts = np.linspace(0.1, 1.0, 10)
    eager = gs.simulate(ou(), ts, key=jr.key(0)).x
    closed = jax.jit(lambda k: gs.simulate(ou(), ts, key=k).x)(jr.key(0))
    np.testing.assert_allclose(eager, closed, atol=1e-6)
    traced = eqx.filter_jit(lambda s, k: gs.simulate(s, ts, key=k).x)(ou(), jr.key(0))  # tables in the program
    np.testing.assert_allclose(eager, traced, atol=2e-3)
    times = eqx.filter_jit(lambda t, k: gs.simulate(ou(), t, steps_per_interval=2, key=k).x)
    finer = gs.simulate(ou(), ts, steps_per_interval=2, key=jr.key(0)).x
    np.testing.assert_allclose(times(jnp.asarray(ts), jr.key(0)), finer, atol=2e-3)


def test_steps_that_do_not_divide_into_blocks():
    ts = np.array([0.0, 0.31, 1.0])
    sde = ou()
    x = gs.simulate(sde, ts, max_step=1 / 1030, key=jr.key(0)).x  # 1031 steps: 32 blocks and a rest
    assert x.shape == (3, 1)
    assert x[0, 0] == 0
    assert bool(jnp.isfinite(x).all())
    slope = jax.grad(lambda s: gs.simulate(sde, ts, x0=jnp.array([s]), max_step=1 / 1030, key=jr.key(0)).x[-1, 0])(0.0)
    np.testing.assert_allclose(slope, np.exp(-1), rtol=1e-4)


@pytest.mark.slow
def test_a_hundred_thousand_steps_in_constant_memory():
    """A path costs the noise of one block, however many steps follow; only the shared step times grow with them."""

    def memory(num, batch, run=False):
        paths = jax.jit(jax.vmap(lambda k: gs.simulate(ou(), np.array([1.0]), max_step=1 / num, key=k).x))
        compiled = paths.lower(jr.split(jr.key(0), batch)).compile()
        assert not run or bool(jnp.isfinite(compiled(jr.split(jr.key(0), batch))).all())
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    per_path = [(memory(num, 34, run=num == 100_000) - memory(num, 2)) / 32 for num in (100_000, 200_000)]
    assert 0 < per_path[1] <= 1.01 * per_path[0]
    assert per_path[0] < 100_000  # bytes: 250 steps of noise take about 20,000, all of them more than two million


@pytest.mark.slow
def test_gradients_keep_the_states_between_blocks_alone():
    """Backward memory of a path grows with the root of the number of steps: states between blocks, and one block."""

    def memory(num, batch):
        end = lambda rate, k: gs.simulate(ou(rate), np.array([1.0]), max_step=1 / num, key=k).x[0, 0]
        slopes = jax.jit(jax.vmap(jax.grad(end), (None, 0)))
        analysis = slopes.lower(1.0, jr.split(jr.key(0), batch)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    per_path = [(memory(num, 34) - memory(num, 2)) / 32 for num in (4_096, 65_536)]
    assert 0 < per_path[1] < 1.1 * 4 * per_path[0]  # 16 times as many steps
    assert per_path[1] < 65_536  # not even a byte a step, where the states alone would take 24


# The start: a law with bounds, observations at time 0.

BOUNDED = {
    "Uniform": (dist.Uniform(jnp.array([-1.0]), 1.0), (-1, 1), lambda x: 0.5 + 0 * x),
    "HalfNormal": (dist.HalfNormal(1.0), (0, 12), lambda x: np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)),
    "Exponential": (dist.Exponential(1.0), (0, 40), lambda x: np.exp(-x)),
    "LogNormal": (
        dist.LogNormal(0.0, 1.0),
        (1e-9, 60),
        lambda x: np.exp(-(np.log(x) ** 2) / 2) / (x * np.sqrt(2 * np.pi)),
    ),
    "Gamma": (dist.Gamma(2.0), (0, 60), lambda x: x * np.exp(-x)),
}


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("Uniform", 1.5),
        *(pytest.param(name, seen, marks=pytest.mark.slow) for name in BOUNDED for seen in (0.2, -2.0)),
        *(pytest.param(name, 1.5, marks=pytest.mark.slow) for name in BOUNDED if name != "Uniform"),
    ],
)
def test_a_start_with_bounds_stays_inside_and_weighs_the_evidence(name, seen):
    law, (lo, hi), density = BOUNDED[name]
    noise, num = gs.GaussianNoise(0.3), 20_000
    sde = gs.FractionalSDE(lambda t, x: 0 * x, gs.Constant(0.5), gn.brownian(), 0.5, 1.0, x0=law)
    observed = gs.Observed(np.array([1.0]), np.array([seen]), noise)
    guide = gs.LinearGuide(sde, observed)
    out = gs.forecast(sde, guide, observed, np.array([0.0, 1.0]), num_paths=num, key=jr.key(0))
    assert lo <= float(out.x[:, 0].min()) <= float(out.x[:, 0].max()) <= hi
    assert float(out.ess) > 0.6 * num
    grid, var = np.linspace(lo, hi, 1_000_001), 0.5**2 + 0.3**2
    joint = density(grid) * np.exp(-((seen - grid) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)
    evidence = np.trapezoid(joint, grid)
    draws = gs.log_weights(sde, guide, observed, num_particles=num, key=jr.key(1))
    stats.assert_mean(jnp.exp(draws) / evidence, 1.0)
    assert float(draws.mean()) < np.log(evidence)
    weight = jnp.exp(out.log_weight) * num
    posterior = np.trapezoid(grid * joint, grid) / evidence
    stats.assert_mean(weight * (out.x[:, 0, 0] - posterior), 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_cut_of_a_normal_is_its_truncation():
    """Quantiles and slopes against differences, for bounds near and far on either side."""
    inf = np.inf
    lower, upper = jnp.array([-inf, 0.0, -inf, -1.0, 3.0, -9.0]), jnp.array([inf, inf, 1.0, 1.0, inf, -8.0])
    mean, sd = jnp.full(6, 0.3), jnp.full(6, 0.7)
    t = jnp.linspace(-4, 4, 17)[:, None]
    x, log_slope = jax.vmap(lambda t: cut(mean + sd * t, mean, sd, lower, upper))(t)
    slope = jax.vmap(jax.jacfwd(lambda t: cut(mean + sd * t, mean, sd, lower, upper)[0]))(t)[..., 0]
    np.testing.assert_allclose(x[:, 0], mean[0] + sd[0] * t[:, 0], atol=1e-9)
    assert bool(((x > lower) & (x < upper)).all())
    np.testing.assert_allclose(jnp.log(slope / sd), log_slope, atol=1e-6)
    law = dist.TruncatedNormal(0.3, 0.7, low=-1.0, high=1.0)
    np.testing.assert_allclose(law.cdf(x[:, 3]), jax.scipy.stats.norm.cdf(t[:, 0]), atol=1e-9)
    slopes = jax.jacfwd(lambda m, s: cut(mean + sd, m, s, lower, upper)[0], argnums=(0, 1))(mean, sd)
    assert all(bool(jnp.isfinite(s).all()) for s in slopes)


@pytest.mark.parametrize("lift", [gn.brownian(), pytest.param(CHEAP, marks=pytest.mark.slow)])
def test_evidence_of_time_zero_alone(lift):
    observed = gs.Observed(np.array([0.0]), np.array([0.1]), gs.GaussianNoise(0.1))
    for x0, mean, sd in ((0.0, 0.0, 0.1), (dist.Normal(jnp.array([0.2]), 0.5), 0.2, np.hypot(0.5, 0.1))):
        wanted = jax.scipy.stats.norm.logpdf(0.1, mean, sd)
        np.testing.assert_allclose(gs.kalman(ou(hurst=0.5, lift=lift, x0=x0), observed), wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["path_mean", "exact"])
def test_guides_of_time_zero_alone(step):
    observed = gs.Observed(np.array([0.0]), np.array([0.1]), gs.GaussianNoise(0.1))
    sde = ou(step=step, x0=dist.Normal(jnp.array([0.2]), 0.5))
    wanted = jax.scipy.stats.norm.logpdf(0.1, 0.2, np.hypot(0.5, 0.1))
    for guide in (gs.LinearGuide(sde, observed), gs.NeuralGuide(sde, observed, width=4, key=jr.key(0))):
        np.testing.assert_allclose(gs.elbo(sde, guide, observed, key=jr.key(1)), wanted, rtol=1e-5)
    out = gs.forecast(sde, gs.LinearGuide(sde, observed), observed, np.array([0.0, 1.0]), num_paths=500, key=jr.key(2))
    assert abs(float(out.mean[0, 0]) - (0.1 / 0.01 + 0.2 / 0.25) / (1 / 0.01 + 1 / 0.25)) < 5 * 0.1 / np.sqrt(500)


@pytest.mark.slow
@pytest.mark.key_reuse  # diffrax's VirtualBrownianTree consumes its key twice
def test_diffrax_terms_of_a_traced_model():
    sde = ou(lift=gn.ma_fbm(2, 0.1, 10.0))

    def end(sde, key):
        terms, y0 = gs.as_terms(sde, key=key)
        out = diffrax.diffeqsolve(terms, diffrax.Heun(), 0.0, 1.0, 1 / 20, y0)
        assert out.ys is not None
        return out.ys[0]

    np.testing.assert_allclose(eqx.filter_jit(end)(sde, jr.key(0)), end(sde, jr.key(0)), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.key_reuse  # diffrax's VirtualBrownianTree consumes its key twice
def test_diffrax_terms_have_the_same_law():
    sde = ou(1.0, 0.7, 0.7, 1.0, lift=gn.ma_fbm(3, 0.1, 20.0))

    def end(key):
        terms, y0 = gs.as_terms(sde, key=key)
        out = diffrax.diffeqsolve(terms, diffrax.Heun(), 0.0, 1.0, 1 / 100, y0)
        assert out.ys is not None
        return out.ys[0][-1, 0]

    ours = paths(sde, np.array([1.0]), 20_000, max_step=0.1)[:, 0, 0]
    theirs = jax.jit(jax.vmap(end))(jr.split(jr.key(3), 4_000))
    stats.assert_variance(theirs, float(jnp.var(ours)), gaussian=True)


# Wrong input: each names the argument.


def test_refuses_wrong_models():
    drift, one = gs.OrnsteinUhlenbeck(1.0), gs.Constant(1.0)
    cases = [
        ("hurst", lambda: gs.FractionalSDE(drift, one, CHEAP, 1.2, 1.0)),
        ("hurst", lambda: gs.FractionalSDE(drift, one, CHEAP, 0.0, 1.0)),
        ("hurst", lambda: gs.FractionalSDE(drift, one, CHEAP, jnp.array([0.3, 0.4]), 1.0, x0=jnp.zeros(3))),
        ("hurst", lambda: gs.FractionalSDE(drift, one, gn.brownian(), 0.7, 1.0)),
        ("horizon", lambda: gs.FractionalSDE(drift, one, CHEAP, 0.5, -1.0)),
        ("drift", lambda: gs.FractionalSDE(lambda t, x: jnp.zeros(3), one, CHEAP, 0.5, 1.0)),
        ("diffusion", lambda: gs.FractionalSDE(drift, lambda t, x: jnp.ones(3), CHEAP, 0.5, 1.0)),
        ("diagonal", lambda: gs.FractionalSDE(drift, lambda t, x: jnp.eye(2), CHEAP, 0.5, 1.0, x0=jnp.zeros(2))),
        ("path_mean", lambda: ou(step="path-mean")),
        ("lift", lambda: gs.FractionalSDE(drift, one, cast(Any, gn.ma_fbm), 0.5, 1.0)),
        ("init", lambda: gs.LearnedHurst(1.5)),
    ]
    for match, build in cases:
        with pytest.raises((ValueError, TypeError), match=match):
            build()


@pytest.mark.key_reuse  # the same key again, on purpose
def test_refuses_wrong_times_and_steps():
    key, sde = jr.key(0), ou()
    cases = [
        ("increasing", {"ts": np.array([0.2, 0.1])}),
        ("increasing", {"ts": np.array([0.2, 0.2])}),
        ("horizon", {"ts": np.array([0.5, 1.5])}),
        ("non-negative", {"ts": np.array([-0.5, 0.5])}),
        ("max_step", {"ts": np.array([0.5]), "max_step": 2.0}),
        ("max_step", {"ts": np.array([0.5]), "max_step": -0.1}),
        ("steps_per_interval", {"ts": np.array([0.5]), "steps_per_interval": 0}),
        ("x0", {"ts": np.array([0.5]), "x0": jnp.zeros(3)}),
    ]
    for match, kwargs in cases:
        with pytest.raises(ValueError, match=match):
            gs.simulate(sde, **kwargs, key=key)
    with pytest.raises(ValueError, match="steps_per_interval"):
        jax.jit(lambda t: gs.simulate(sde, t, max_step=0.1, key=key).x)(jnp.array([0.5, 1.0]))


def test_refuses_wrong_observations():
    noise = gs.GaussianNoise(0.1)
    ts, y = np.array([0.5, 1.0]), np.zeros(2)
    cases = [
        ("increasing", lambda: gs.Observed(ts[::-1].copy(), y, noise)),
        ("increasing", lambda: gs.Observed(np.array([0.5, 0.5]), y, noise)),
        ("one row per time", lambda: gs.Observed(ts, np.zeros(3), noise)),
        ("all observations missing", lambda: gs.Observed(ts, y, noise, mask=np.zeros(2, bool))),
        ("mask", lambda: gs.Observed(ts, np.array([0.0, np.nan]), noise)),
        ("scale", lambda: gs.GaussianNoise(-1.0)),
    ]
    for match, build in cases:
        with pytest.raises(ValueError, match=match):
            build()
    late = gs.Observed(np.array([0.5, 1.5]), y, noise)
    with pytest.raises(ValueError, match="horizon"):
        gs.kalman(ou(), late)
    with pytest.raises(ValueError, match="horizon"):
        gs.LinearGuide(ou(), late)
    counts = gs.Observed(ts, y, lambda x: dist.Poisson(jnp.exp(x)))
    for call in (gs.kalman, gs.LinearGuide):
        with pytest.raises(ValueError, match="likelihood"):
            call(ou(), counts)


def test_refuses_what_the_filter_cannot_do_exactly():
    observed = gs.Observed(np.array([0.5, 1.0]), np.zeros(2), gs.GaussianNoise(0.1))
    curved = gs.FractionalSDE(lambda t, x: -(x**3), gs.Constant(1.0), CHEAP, 0.5, 1.0)
    with pytest.raises(ValueError, match="drift"):
        gs.kalman(curved, observed)
    scaled = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), lambda t, x: 1 + t * jnp.ones_like(x), CHEAP, 0.5, 1.0)
    with pytest.raises(ValueError, match="diffusion"):
        gs.kalman(scaled, observed)
    varying = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(1.0), CHEAP, lambda t: 0.5, 1.0)
    with pytest.raises(ValueError, match="hurst"):
        gs.kalman(varying, observed)
    assert bool(jnp.isfinite(gs.kalman(varying, observed, steps_per_interval=4)))


def test_a_blow_up_names_step_and_state():
    explosive = gs.FractionalSDE(lambda t, x: x**3, gs.Constant(0.1), CHEAP, 0.5, 10.0, x0=2.0)
    with pytest.raises(ValueError, match=r"blew up in step \d+ .* state before it \[\S+\]"):
        gs.simulate(explosive, np.array([10.0]), max_step=0.1, key=jr.key(0))
