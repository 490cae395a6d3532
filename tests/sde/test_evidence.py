"""The three-way check: evidence by Gaussian process, by square-root filter, and by every draw of the linear guide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import stats

import genkit.noise as gn
import genkit.sde as gs


pytestmark = pytest.mark.usefixtures("x64")

HURSTS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9)
EXACT_A = (-6.769129, -5.206844, -3.610276, -0.583110, 1.358501, 1.011110, -2.855691)
EXACT_C = (-12.995510, -12.258614, -11.007374, -7.954311, -5.353215, -4.723090, -5.842529)
TWO_A = (-8.434398, -6.100838, -3.988397, -0.583110, 1.304513, 1.548848, 1.293366)


def series(name):
    if name == "a":
        ts = np.arange(1, 11) / 10
        return gs.Observed(ts, np.sin(3 * ts), gs.GaussianNoise(0.1)), 0.0, 1.0, 1.0
    ts = np.array([0.13, 0.37, 0.41, 0.9, 1.6, 1.75, 2.4])
    return gs.Observed(ts, np.cos(ts) - 1, gs.GaussianNoise(0.1)), 1.5, 0.7, 2.4


def model(name, hurst, step="path_mean", lift=None):
    _, theta, sigma, horizon = series(name)
    lift = gn.ma_fbm() if lift is None else lift
    return gs.FractionalSDE(gs.OrnsteinUhlenbeck(theta), gs.Constant(sigma), lift, hurst, horizon, step=step)


@pytest.mark.slow
def test_gaussian_process_evidence_is_the_reference():
    a, c = series("a")[0], series("c")[0]
    for hurst, wanted_a, wanted_c, two in zip(HURSTS, EXACT_A, EXACT_C, TWO_A, strict=True):
        np.testing.assert_allclose(gs.gp_log_evidence(hurst, a), wanted_a, atol=1e-6)
        np.testing.assert_allclose(gs.gp_log_evidence(hurst, c, theta=1.5, sigma=0.7), wanted_c, atol=1e-6)
        np.testing.assert_allclose(gs.gp_log_evidence(hurst, a, kind="II"), two, atol=1e-6)


@pytest.mark.parametrize("name", ["a", "c"])
def test_filter_is_near_the_process(name):
    observed = series(name)[0]
    wanted = dict(zip(HURSTS, EXACT_A if name == "a" else EXACT_C, strict=True))
    for hurst in HURSTS:
        bound = {0.1: 0.02}.get(hurst, 0.01)
        assert abs(float(gs.kalman(model(name, hurst), observed)) - wanted[hurst]) < bound


def test_filter_of_kind_two_is_near_its_own_process():
    observed = series("a")[0]
    for hurst, wanted in zip(HURSTS[2:], TWO_A[2:], strict=True):
        assert abs(float(gs.kalman(model("a", hurst, lift=gn.ma_fbm(kind="II")), observed)) - wanted) < 0.01


@pytest.mark.slow
def test_published_lift_has_its_published_error():
    observed, errors = series("a")[0], {0.3: 0.016, 0.5: 0.072, 0.7: 0.143, 0.9: 0.918}
    for hurst, wanted in errors.items():
        lift = gn.ma_fbm(kind="I-published")
        gap = abs(float(gs.kalman(model("a", hurst, lift=lift), observed)) - EXACT_A[HURSTS.index(hurst)])
        assert abs(gap - wanted) < 1e-3 + 0.02 * wanted


@pytest.mark.parametrize(
    ("name", "step", "substeps", "bound", "hursts"),
    [
        ("a", "path_mean", 1, 1e-5, HURSTS),
        pytest.param("c", "exact", 1, 1e-5, HURSTS, marks=pytest.mark.slow),
        pytest.param("c", "path_mean", 4, 0.07, HURSTS, marks=pytest.mark.slow),
        pytest.param("c", "exponential", 4, 0.05, HURSTS, marks=pytest.mark.slow),
    ],
)
def test_linear_guide_attains_the_evidence(name, step, substeps, bound, hursts):
    observed = series(name)[0]
    for hurst in hursts:
        sde = model(name, hurst, step)
        guide = gs.LinearGuide(sde, observed, steps_per_interval=substeps)
        kwargs = {"num_particles": 16, "steps_per_interval": substeps, "key": jax.random.key(1)}
        draws = gs.log_weights(sde, guide, observed, **kwargs)
        assert float(draws.std()) < 1e-9  # every draw weighs the evidence of the discretized model
        np.testing.assert_allclose(draws[0], guide.log_evidence, atol=1e-9)
        assert abs(float(draws.mean()) - float(gs.kalman(sde, observed))) < bound


@pytest.mark.slow
def test_closed_form_divergence_has_the_same_mean():
    observed = series("a")[0]
    sde = model("a", 0.3)
    guide = gs.LinearGuide(sde, observed)
    draws = gs.log_weights(sde, guide, observed, num_particles=4000, martingale=False, key=jax.random.key(2))
    stats.assert_mean(draws, float(guide.log_evidence))


@pytest.mark.long
def test_gradients_in_every_parameter():
    observed = series("c")[0]

    def build(p):
        drift = gs.OrnsteinUhlenbeck(p[1])
        return gs.FractionalSDE(drift, gs.Constant(p[2]), gn.ma_fbm(), p[0], 2.4, step="exact")

    def bound(p, key):
        sde = build(p)
        return gs.elbo(sde, gs.LinearGuide(sde, observed), observed, key=key)

    for hurst in (0.3, 0.7):
        p = jnp.array([hurst, 1.5, 0.7])
        slope = jax.jit(jax.grad(lambda p: gs.kalman(build(p), observed)))(p)
        step = 1e-5 * jnp.eye(3)
        value = jax.jit(lambda p: gs.kalman(build(p), observed))
        difference = jnp.stack([(value(p + e) - value(p - e)) / 2e-5 for e in step])
        np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-5)
        keys = jax.random.split(jax.random.key(3), 400)
        stats.assert_mean(jax.jit(jax.vmap(jax.grad(bound), (None, 0)))(p, keys), difference)


def test_missing_rows_are_rows_left_out():
    full = series("c")[0]
    keep = np.array([True, False, True, True, False, True, False])
    y = np.where(keep, np.asarray(full.y)[:, 0], np.nan)
    masked = gs.Observed(full.ts, y, full.likelihood, mask=keep)
    fewer = gs.Observed(full.ts[keep], y[keep], full.likelihood)
    sde = model("c", 0.3, "exact")
    np.testing.assert_allclose(gs.kalman(sde, masked), gs.kalman(sde, fewer), atol=1e-10)
    evidence = [gs.gp_log_evidence(0.3, o, theta=1.5, sigma=0.7) for o in (masked, fewer)]
    np.testing.assert_allclose(evidence[0], evidence[1], atol=1e-10)


@pytest.mark.long
def test_the_bound_and_its_slope_skip_missing_rows():
    full = series("c")[0]
    keep = np.array([True, False, True, True, False, True, False])
    y = np.where(keep, np.asarray(full.y)[:, 0], np.nan)
    masked = gs.Observed(full.ts, y, full.likelihood, mask=keep)
    fewer = gs.Observed(full.ts[keep], y[keep], full.likelihood)
    sde = model("c", 0.3, "exact")
    guide = gs.LinearGuide(sde, masked)
    value, slope = jax.value_and_grad(lambda s: gs.elbo(s, guide, masked, key=jax.random.key(0)), allow_int=True)(sde)
    np.testing.assert_allclose(value, gs.kalman(sde, fewer), atol=1e-9)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slope))


@pytest.mark.slow
def test_the_clock_may_run_at_any_speed():
    """B(Tt) is T^H B(t) in law: rescaled problems have the same evidence."""
    observed, theta, sigma, horizon = series("c")
    values = []
    for speed in (1.0, 50 / 2.4, 0.01 / 2.4):
        other = gs.Observed(np.asarray(observed.ts) * speed, observed.y, observed.likelihood)
        drift, diffusion = gs.OrnsteinUhlenbeck(theta / speed), gs.Constant(sigma / speed**0.3)
        sde = gs.FractionalSDE(drift, diffusion, gn.ma_fbm(), 0.3, horizon * speed)
        bound = gs.elbo(sde, gs.LinearGuide(sde, other), other, key=jax.random.key(0))
        values.append((gs.kalman(sde, other), bound))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-9)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-9)


@pytest.mark.long
def test_float32_is_within_a_thousandth():
    for name in ("a", "c"):
        for hurst in (0.1, 0.3, 0.7, 0.9):
            observed, theta, sigma, horizon = series(name)
            wide = float(gs.kalman(model(name, hurst), observed))
            with jax.enable_x64(False):
                ts, y = np.float32(observed.ts), np.float32(observed.y)
                narrow = gs.Observed(ts, y, gs.GaussianNoise(0.1))
                drift, diffusion = gs.OrnsteinUhlenbeck(theta), gs.Constant(sigma)
                sde = gs.FractionalSDE(drift, diffusion, gn.ma_fbm(), hurst, horizon, step="exact")
                value = gs.kalman(sde, narrow)
                assert value.dtype == jnp.float32
                draws = gs.log_weights(sde, gs.LinearGuide(sde, narrow), narrow, num_particles=8, key=jax.random.key(0))
            np.testing.assert_allclose(value, wide, rtol=1e-3)
            np.testing.assert_allclose(draws, wide, rtol=1e-3)


@pytest.mark.long
def test_coupled_drift_and_joint_observations():
    """A rotation of independent processes: the evidence is that of the processes themselves."""
    ts = np.array([0.2, 0.5, 0.6, 1.0])
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    y = np.stack([np.sin(3 * ts), np.cos(ts)], axis=1)
    rates = np.array([0.5, 2.0])
    plain = gs.FractionalSDE(
        gs.OrnsteinUhlenbeck(rates), gs.Constant(np.array([0.7, 0.7])), gn.ma_fbm(), 0.3, 1.0, x0=np.zeros(2)
    )
    observed = gs.Observed(ts, y, lambda x: dist.MultivariateNormal(turn @ x, 0.01 * np.eye(2)))
    wanted = gs.kalman(plain, observed)
    # the same through the doubling of steps, which does not know that the drift is uncoupled
    jitted = jax.jit(lambda r: gs.kalman(dataclasses.replace(plain, drift=gs.OrnsteinUhlenbeck(r)), observed))
    np.testing.assert_allclose(jitted(rates), wanted, atol=1e-6)
    exact = gs.gp_log_evidence(0.3, observed, theta=rates, sigma=0.7)
    assert abs(float(wanted - exact)) < 0.02


@pytest.mark.slow
def test_uncertain_start_and_vector_index():
    ts = np.array([0.3, 1.0])
    y = np.array([[0.2, 1.0], [0.5, -0.3]])
    law = dist.Normal(jnp.array([0.1, -0.2]), jnp.array([0.5, 0.8]))
    hurst = np.array([0.3, 0.7])
    drift, diffusion = gs.OrnsteinUhlenbeck(0.0), gs.Constant(1.0)
    sde = gs.FractionalSDE(drift, diffusion, gn.ma_fbm(), hurst, 1.0, x0=law)
    observed = gs.Observed(ts, y, gs.GaussianNoise(0.1))
    wanted = 0.0
    for i in range(2):
        cov = np.asarray(gn.fbm_covariance(hurst[i], ts[:, None], ts[None])) + float(law.scale[i]) ** 2
        cov = cov + 0.01 * np.eye(2)
        wanted += jax.scipy.stats.multivariate_normal.logpdf(y[:, i], jnp.full(2, law.loc[i]), cov)
    value = gs.kalman(sde, observed)
    assert abs(float(value - wanted)) < 0.01
    draws = gs.log_weights(sde, gs.LinearGuide(sde, observed), observed, num_particles=4, key=jax.random.key(0))
    np.testing.assert_allclose(draws, value, atol=1e-8)


@pytest.mark.slow
def test_brownian_lift_is_exact():
    observed = series("c")[0]
    sde = model("c", 0.5, "exact", lift=gn.brownian())
    wanted = EXACT_C[HURSTS.index(0.5)]
    np.testing.assert_allclose(gs.kalman(sde, observed), wanted, atol=1e-6)
    guide = gs.LinearGuide(sde, observed)
    np.testing.assert_allclose(gs.elbo(sde, guide, observed, key=jax.random.key(0)), wanted, atol=1e-6)
