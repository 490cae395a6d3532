"""Schedules: closed forms, derived rates, float32 accuracy at both ends, wrong parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit as gk


d = gk.diffusion
SCHEDULES = {
    "EDM": d.EDM,
    "VE": lambda: d.VE(0.01, 50.0),
    "VP": d.VP,
    "VP, constant rate": lambda: d.VP(2.0, 2.0),
    "SubVP": d.SubVP,
    "CondOT": d.CondOT,
    "Cosine": d.Cosine,
    "Cosine, no offset": lambda: d.Cosine(0.0),
}
each = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
TIMES = np.concatenate([np.geomspace(1e-6, 0.1, 40), np.linspace(0.1, 0.999, 60)])


def exact(name: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Alpha and sigma in extended precision, from the definitions."""
    t = np.asarray(t, np.longdouble)
    one = np.longdouble(1)
    if name.startswith("VP") or name == "SubVP":
        low, high = (np.longdouble(2.0), np.longdouble(2.0)) if "constant" in name else (one / 10, np.longdouble(20))
        integral = low * t + (high - low) * t**2 / 2
        signal = np.exp(-integral / 2)
        return signal, -np.expm1(-integral) if name == "SubVP" else np.sqrt(-np.expm1(-integral))
    if name == "VE":
        return np.ones_like(t), one / 100 * np.longdouble(5000) ** t
    if name == "CondOT":
        return 1 - t, t
    if name == "EDM":
        return np.ones_like(t), t
    s = np.longdouble(0) if "no offset" in name else np.longdouble("0.008")
    half_pi = np.arccos(np.longdouble(0))
    angle, first = half_pi * (t + s) / (1 + s), half_pi * s / (1 + s)
    alpha = np.sin(half_pi * (1 - t) / (1 + s)) / np.cos(first)
    return alpha, np.sqrt(np.sin(angle - first) * np.sin(angle + first)) / np.cos(first)


@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_keeps_relative_accuracy_everywhere(name):
    t = TIMES.astype(np.float32)
    alpha, sigma = exact(name, t)
    schedule = SCHEDULES[name]()
    # A few ulps, plus what the exponent's size (at most 10) costs in exp.
    for got, want in ((schedule.alpha(t), alpha), (schedule.sigma(t), sigma), (schedule.noise_level(t), sigma / alpha)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(got, np.float64), want.astype(np.float64), rtol=3e-6)
    log_snr = (2 * np.log(alpha / sigma)).astype(np.float64)
    np.testing.assert_allclose(schedule.log_snr(t), log_snr, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_float64_is_exact(name, x64):
    alpha, sigma = exact(name, TIMES)
    schedule = SCHEDULES[name]()
    np.testing.assert_allclose(schedule.alpha(TIMES), alpha.astype(np.float64), rtol=2e-14)
    np.testing.assert_allclose(schedule.sigma(TIMES), sigma.astype(np.float64), rtol=2e-14)


@each
def test_time_inverts_noise_level(make, x64):
    schedule = make()
    np.testing.assert_allclose(schedule.time(schedule.noise_level(TIMES)), TIMES, rtol=1e-11)
    levels = np.geomspace(0.02, 40.0, 50)
    np.testing.assert_allclose(schedule.noise_level(schedule.time(levels)), levels, rtol=1e-11)


@each
def test_time_in_float32_matches_float64(make):
    levels = np.geomspace(0.02, 40.0, 50)
    low = make().time(levels.astype(np.float32))
    with jax.enable_x64(True):
        high = np.asarray(make().time(levels.astype(np.float32).astype(np.float64)))
    np.testing.assert_allclose(np.asarray(low, np.float64), high, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("name", ["VP", "SubVP", "CondOT", "Cosine", "Cosine, no offset"])
def test_tiny_noise_levels_keep_their_time(name):
    levels = np.geomspace(1e-9, 1e-3, 13).astype(np.float32)
    low = np.asarray(SCHEDULES[name]().time(levels), np.float64)
    with jax.enable_x64(True):
        high = np.asarray(SCHEDULES[name]().time(levels.astype(np.float64)))
    np.testing.assert_allclose(low, high, rtol=2e-6)


@each
def test_rates_match_finite_differences(make, x64):
    schedule, t, h = make(), np.linspace(0.05, 0.95, 19), 1e-6
    for rate, function in ((schedule.alpha_dot, schedule.alpha), (schedule.sigma_dot, schedule.sigma)):
        difference = (function(t + h) - function(t - h)) / (2 * h)
        np.testing.assert_allclose(rate(t), difference, rtol=1e-7, atol=1e-8)


def test_drift_and_diffusion_in_closed_form(x64):
    t = np.linspace(0.0, 0.99, 23)
    rate = 0.1 + 19.9 * t
    integral = 0.1 * t + 9.95 * t**2
    np.testing.assert_allclose(d.VP().drift(t), -rate / 2, rtol=1e-12)
    np.testing.assert_allclose(d.VP().diffusion(t), np.sqrt(rate), rtol=1e-12)
    np.testing.assert_allclose(d.SubVP().drift(t), -rate / 2, rtol=1e-12)
    np.testing.assert_allclose(d.SubVP().diffusion(t) ** 2, rate * -np.expm1(-2 * integral), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(d.CondOT().diffusion(t) ** 2, 2 * t / (1 - t), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(d.EDM().diffusion(t) ** 2, 2 * t, rtol=1e-12, atol=1e-15)
    ve = d.VE(0.01, 50.0)
    np.testing.assert_allclose(ve.diffusion(t), 0.01 * 5000**t * np.sqrt(2 * np.log(5000)), rtol=1e-12)
    assert np.all(np.asarray(ve.drift(t)) == 0)


def test_vp_at_time_zero_has_its_limits():
    schedule = d.VP()
    np.testing.assert_allclose(schedule.diffusion(0.0), np.sqrt(0.1), rtol=1e-6)
    assert float(schedule.noise_level(0.0)) == 0.0
    assert np.isfinite(float(schedule.sigma_dot(0.0)))


def test_cond_ot_ends():
    schedule = d.CondOT()
    assert float(schedule.noise_level(1.0)) == np.inf
    assert float(schedule.time(jnp.inf)) == 1.0
    assert float(schedule.time(0.0)) == 0.0
    assert float(jax.grad(schedule.time)(0.0)) == 1.0
    assert float(d.Cosine(0.0).alpha(1.0)) == 0.0
    assert float(d.Cosine(0.0).time(jnp.inf)) == 1.0
    assert np.isfinite(float(jax.grad(d.Cosine(0.0).time)(0.0)))


@each
def test_parameters_are_leaves_and_never_recompile(make):
    traces = []

    @eqx.filter_jit
    def run(schedule, t):
        traces.append(1)
        return schedule.noise_level(t), schedule.diffusion(t)

    schedule, t = make(), jnp.linspace(0.1, 0.9, 5)
    run(schedule, t)
    run(jax.tree.map(lambda leaf: leaf * 1.01, schedule), 0.9 * t)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: d.VE(0.0, 1.0), "`sigma_min` must be positive"),
        (lambda: d.VE(2.0, 1.0), "`sigma_max` must be above `sigma_min` = 2"),
        (lambda: d.VE(1.0, 1.0), "`sigma_max` must be above"),
        (lambda: d.VP(-0.1, 20.0), "`beta_min` must be positive"),
        (lambda: d.VP(2.0, 1.0), "`beta_max` must be at least `beta_min` = 2"),
        (lambda: d.SubVP(float("nan"), 1.0), "`beta_min` must be positive"),
        (lambda: d.Cosine(-0.1), "`s` must be non-negative"),
    ],
)
def test_wrong_parameters(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_abstract():
    with pytest.raises(TypeError):
        gk.Schedule()
