"""Exact covariances and likelihoods against closed forms, scipy and published figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

import genkit.noise as gn


HURSTS = (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.mark.parametrize("hurst", HURSTS)
def test_kind_two_is_the_hypergeometric_formula(hurst):
    with jax.enable_x64(True):
        s, t = 0.3, np.array([0.30001, 0.35, 0.9, 30.0])
        scale = 2 * hurst * special.gamma(hurst + 0.5) / special.gamma(hurst + 1.5)
        wanted = scale * s ** (hurst + 0.5) * t ** (hurst - 0.5) * special.hyp2f1(0.5 - hurst, 1, hurst + 1.5, s / t)
        np.testing.assert_allclose(gn.fbm_covariance(hurst, s, t, "II"), wanted, rtol=1e-9)
        np.testing.assert_allclose(gn.fbm_covariance(hurst, t, t, "II"), t ** (2 * hurst), rtol=1e-12)


@pytest.mark.slow
def test_covariances_in_float32_agree_with_float64():
    grid = np.linspace(0.1, 1.0, 7)
    for kind in ("I", "II"):
        with jax.enable_x64(True):
            wide = np.asarray(gn.fou_covariance(0.3, grid[:, None], grid[None], 1.3, kind=kind))
        short = grid.astype(np.float32)
        narrow = gn.fou_covariance(0.3, short[:, None], short[None], np.float32(1.3), kind=kind)
        np.testing.assert_allclose(narrow, wide, rtol=1e-5)


def test_fractional_ou_variance_at_two():
    table = {
        0.0: (1.148698, 1.515717, 2.0, 2.639016, 3.482202),
        1.0: (0.470419, 0.455497, 0.490842, 0.564320, 0.675899),
        2.0: (0.400022, 0.295215, 0.249916, 0.233513, 0.234943),
    }
    with jax.enable_x64(True):
        for theta, wanted in table.items():
            np.testing.assert_allclose(gn.fou_covariance(np.array(HURSTS), 2.0, 2.0, theta), wanted, atol=6e-7)


@pytest.mark.slow
def test_fractional_ou_is_ou_at_one_half():
    with jax.enable_x64(True):
        s, t, theta = 0.3, 0.9, 1.3
        wanted = (np.exp(-theta * (t - s)) - np.exp(-theta * (t + s))) / (2 * theta)
        for kind in ("I", "II"):
            np.testing.assert_allclose(gn.fou_covariance(0.5, s, t, theta, kind=kind), wanted, rtol=1e-12)


def test_fractional_ou_of_kind_two_by_adaptive_quadrature():
    hurst, theta, s, t = 0.3, 1.5, 0.4, 0.9

    def kernel(w):
        past = integrate.quad(lambda r: np.exp(-theta * (w - r)), 0, w, weight="alg", wvar=(hurst - 0.5, 0))[0]
        return w ** (hurst - 0.5) - theta * past

    wanted = 2 * hurst * integrate.quad(lambda w: kernel(w) * kernel(t - s + w), 0, s, limit=200)[0]
    with jax.enable_x64(True):
        np.testing.assert_allclose(gn.fou_covariance(hurst, s, t, theta, kind="II"), wanted, rtol=1e-8)


def test_stationary_variance():
    wanted = (0.45908, 0.44676, 0.5, 0.62108, 0.83825)
    with jax.enable_x64(True):
        np.testing.assert_allclose(gn.stationary_fou_variance(np.array(HURSTS), 1.0), wanted, atol=6e-6)
        late = gn.fou_covariance(0.3, 30.0, 30.0, 1.0)  # a start at 0 is forgotten
        np.testing.assert_allclose(late, gn.stationary_fou_variance(0.3, 1.0), rtol=1e-3)


def test_autocovariance_keeps_its_digits_at_long_lags():
    k, hurst = 20_000, 0.3
    narrow = gn.fgn_autocovariance(np.float32(hurst), k + 1)[k]
    leading = hurst * (2 * hurst - 1) * k ** (2 * hurst - 2)  # next term is 1e-9 of it
    np.testing.assert_allclose(narrow, leading, rtol=1e-5)
    with jax.enable_x64(True):
        r = gn.fgn_autocovariance(0.7, 10)
        k = np.arange(10)
        plain = ((k + 1) ** 1.4 - 2 * k**1.4 + np.abs(k - 1) ** 1.4) / 2
        np.testing.assert_allclose(r, plain, rtol=1e-13)


def test_likelihood_is_the_multivariate_normal():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (40,))
        lags = np.abs(np.subtract.outer(np.arange(40), np.arange(40)))
        cov = np.asarray(gn.fgn_autocovariance(0.8, 40))[lags] * 0.49
        wanted = jax.scipy.stats.multivariate_normal.logpdf(x, 0.2 * jnp.ones(40), cov)
        np.testing.assert_allclose(gn.fgn_log_prob(x, 0.8, scale=0.7, mean=0.2), wanted, rtol=1e-11)


def test_derivatives_of_the_likelihood_are_those_of_the_multivariate_normal():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (40,))
        lags = np.abs(np.subtract.outer(np.arange(40), np.arange(40)))

        def dense(x, hurst, scale, mean):
            cov = gn.fgn_autocovariance(hurst, 40)[lags] * scale**2
            return jax.scipy.stats.multivariate_normal.logpdf(x, mean * jnp.ones(40), cov)

        def fast(x, hurst, scale, mean):
            return gn.fgn_log_prob(x, hurst, scale=scale, mean=mean)

        place = (x, 0.8, 0.7, 0.2)
        everything = (0, 1, 2, 3)
        wanted = jax.jit(jax.grad(dense, everything))(*place)
        for slope, exact in zip(jax.jit(jax.grad(fast, everything))(*place), wanted, strict=True):
            np.testing.assert_allclose(slope, exact, rtol=1e-9, atol=1e-10)
        curvature = jax.jit(jax.hessian(dense, 1))(*place)
        np.testing.assert_allclose(jax.jit(jax.hessian(fast, 1))(*place), curvature, rtol=1e-9)
        np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(fast, 1), 1))(*place), curvature, rtol=1e-9)


def test_gradient_of_the_likelihood_of_a_long_series():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (600,))
        value = jax.jit(gn.fgn_log_prob)
        slopes = jax.jit(jax.grad(gn.fgn_log_prob, (0, 1)))(x, 0.8)
        h = 1e-5
        by_hurst = (value(x, 0.8 + h) - value(x, 0.8 - h)) / (2 * h)
        np.testing.assert_allclose(slopes[1], by_hurst, rtol=1e-7)
        by_value = (value(x.at[300].add(h), 0.8) - value(x.at[300].add(-h), 0.8)) / (2 * h)
        np.testing.assert_allclose(slopes[0][300], by_value, rtol=1e-6)


def test_memory_of_the_gradient_of_the_likelihood_is_that_of_a_few_series():
    """Every state of the recursion for 20,000 values would be 10 GB."""
    slope = jax.jit(jax.grad(gn.fgn_log_prob, (0, 1)))
    memory = slope.lower(jnp.zeros(20_000), 0.7).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 50 * 20_000 * 4


def test_hurst_index_of_the_nile():
    sm = pytest.importorskip("statsmodels.datasets")
    flow = np.asarray(sm.nile.load_pandas().data["volume"], float)
    with jax.enable_x64(True):

        def profile(hurst):
            a, log_det = gn.fgn_whiten(jnp.asarray(flow), hurst)
            b, _ = gn.fgn_whiten(jnp.ones(100), hurst)
            rest = a - (a @ b) / (b @ b) * b
            return -50 * (jnp.log(2 * jnp.pi * (rest @ rest) / 100) + 1) - log_det / 2

        value, slope = jax.jit(jax.value_and_grad(profile))(0.8054)
        np.testing.assert_allclose(value, -637.166, atol=1e-3)
        np.testing.assert_allclose(profile(0.5), -654.516, atol=1e-3)
        assert abs(float(slope)) < 0.05  # the maximum is at .8054; curvature 1 / .06^2


@pytest.mark.parametrize("hurst", [0.0, 1.0, -0.2, 1.5, float("nan")])
def test_refuses_an_index_outside_the_unit_interval(hurst):
    calls = (
        lambda: gn.fbm_covariance(hurst, 1.0, 1.0),
        lambda: gn.fou_covariance(hurst, 1.0, 1.0, 1.0),
        lambda: gn.fgn_autocovariance(hurst, 3),
        lambda: gn.fgn_log_prob(jnp.zeros(3), hurst),
        lambda: gn.fbm(hurst, jnp.arange(3.0), key=jax.random.key(0)),
        lambda: gn.ma_fbm(2, 0.1, 10.0).weights(hurst),
    )
    for call in calls:
        with pytest.raises(ValueError, match="hurst"):
            call()


def test_refuses_negative_times_and_unknown_kinds():
    with pytest.raises(ValueError, match="non-negative"):
        gn.fbm_covariance(0.5, -1.0, 1.0)
    with pytest.raises(ValueError, match="kind"):
        gn.fbm_covariance(0.5, 1.0, 1.0, kind="III")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gn.fgn_log_prob(np.array([0.0, np.nan]), 0.7), "`increments` must be finite"),
        (lambda: gn.fgn_whiten(np.array([0.0, np.inf]), 0.7), "`increments` must be finite"),
        (lambda: gn.fgn_log_prob(np.ones(3), 0.7, scale=0.0), "`scale` must be positive"),
        (lambda: gn.fou_covariance(0.7, 1.0, 1.0, np.nan), "`theta` must be finite"),
    ],
)
def test_refuses_what_is_not_finite(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_refuses_several_indices_for_one_series():
    with pytest.raises(ValueError, match="scalar"):
        gn.fgn_log_prob(jnp.zeros(3), np.full(3, 0.7))
    with pytest.raises(ValueError, match="scalar"):
        gn.fgn_autocovariance(np.full(3, 0.7), 3)


def kernel(w, a):
    """Response of the process at theta = 1, by Kummer's function or its asymptotic series."""
    powers = np.arange(1, 12)
    series = (
        special.gamma(a + 1)
        * special.rgamma(a + 1 - powers)
        * (-1.0) ** (powers - 1)
        @ (1 / np.maximum(w, 30.0)) ** powers[:, None]
    )
    near = np.exp(-w) * special.hyp1f1(a, a + 1, np.minimum(w, 30.0))
    return w**a * np.where(w > 30, series, near)


def by_decades(function, hi):
    """Gauss-Legendre quadrature from 0, a decade at a time."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    edges = np.array([0.0, *[e for e in 10.0 ** np.arange(-14, 15) if e < hi], hi])
    width = np.diff(edges)[:, None] / 2
    return np.sum(width * weights * function((edges[:-1, None] + width * (1 + nodes)).ravel()).reshape(width.size, -1))


def variance(kind, hurst, time):
    """At theta = 1: kind I by incomplete gamma and Kummer's functions, kind II by quadrature."""
    if kind == "I":
        p = 2 * hurst
        grown = np.exp(-time) * time**p / p * special.hyp1f1(1, p + 1, -time) if time < 50 else 0.0
        return hurst * (special.gamma(p) * special.gammainc(p, time) + grown)
    q = 1 / (2 * hurst)  # w = u ** q takes the singularity away
    return by_decades(lambda u: kernel(u**q, hurst - 0.5) ** 2 * u ** (q - 1), time ** (2 * hurst))


@pytest.mark.parametrize("kind", ["I", "II"])
def test_fractional_ou_keeps_its_digits_at_any_rate(kind):
    hursts, times = np.array(HURSTS), np.array([1e-3, 1.0, 30.0, 1e3, 1e5, 1e8])
    wanted = np.array([[variance(kind, h, t) for t in times] for h in hursts])
    with jax.enable_x64(True):
        np.testing.assert_allclose(gn.fou_covariance(hursts[:, None], times, times, 1.0, kind=kind), wanted, rtol=1e-7)
        other = gn.fou_covariance(hursts[:, None], 1.0, 1.0, times, kind=kind)  # only theta t matters
        np.testing.assert_allclose(other * times ** (2 * hursts[:, None]), wanted, rtol=1e-7)
    narrow = np.float32(hursts)[:, None], np.float32(times)
    np.testing.assert_allclose(gn.fou_covariance(*narrow, narrow[1], 1.0, kind=kind), wanted, rtol=1e-5)


def test_late_covariances_are_stationary():
    """Far apart, cov(s, t) falls like (t - s) ** (2 H - 2); the start at 0 is forgotten up to the same power of t."""
    for hurst in (0.3, 0.7, 0.9):
        gap, lead = 1e4, hurst * (2 * hurst - 1)
        with jax.enable_x64(True):
            wide = gn.fou_covariance(hurst, 1e6, 1e6 + gap, 1.0)
        np.testing.assert_allclose(wide, lead * gap ** (2 * hurst - 2), rtol=1e-6)
        narrow = gn.fou_covariance(np.float32(hurst), np.float32(1e6), np.float32(1e6 + gap), np.float32(1.0))
        np.testing.assert_allclose(narrow, wide, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["I", "II"])
def test_fractional_ou_has_finite_derivatives_at_any_rate(kind):
    hurst, theta = (x.ravel() for x in np.meshgrid(np.float32(HURSTS), np.float32([0.0, 1e-3, 1.0, 1e3, 1e8])))
    for s in (np.float32(1.0), np.float32(0.01)):
        both = jax.jit(jax.vmap(jax.grad(lambda h, q, s=s: gn.fou_covariance(h, s, 1.0, q, kind=kind), argnums=(0, 1))))
        assert all(np.isfinite(d).all() for d in both(hurst, theta))
