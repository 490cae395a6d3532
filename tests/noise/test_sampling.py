"""Every sampler against the exact covariance, and what samplers refuse."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import stats

import genkit.noise as gn
from genkit._core import _memory


TS = np.arange(1, 9) / 8
IRREGULAR = np.array([0.03, 0.1, 0.35, 0.36, 0.9, 1.7])
CASES = [("I", "davies_harte", TS), ("I", "hosking", TS), ("I", "cholesky", IRREGULAR), ("II", "cholesky", IRREGULAR)]


def draws(hurst, kind, method, ts, num):
    keys = jr.split(jr.key(7), num)
    return jax.jit(jax.vmap(lambda k: gn.fbm(hurst, ts, kind=kind, method=method, key=k)))(keys)


@pytest.mark.parametrize("hurst", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(("kind", "method", "ts"), CASES)
def test_covariance_of_every_sampler(hurst, kind, method, ts):
    x = draws(hurst, kind, method, ts, 20_000)
    wanted = gn.fbm_covariance(hurst, ts[:, None], ts[None], kind)
    stats.assert_mean(x, 0.0)
    stats.assert_covariance(x, wanted)


def whitened(x, hurst, ts, kind):
    """Paths times the inverse of the exact factor: independent standard normals, small increments included."""
    with jax.enable_x64(True):
        cov = np.asarray(gn.fbm_covariance(hurst, ts[:, None], ts[None], kind))
    return np.linalg.solve(np.linalg.cholesky(cov), np.asarray(x, np.float64).T).T


LATE = np.arange(1, 301) / 300
UNEVEN = np.sort(np.random.default_rng(0).uniform(0.1, 1.0, 200)).astype(np.float32)
LONG = [("I", "davies_harte", LATE), ("I", "hosking", LATE), ("I", "cholesky", UNEVEN), ("II", "cholesky", UNEVEN)]


@pytest.mark.parametrize("hurst", [0.1, 0.9])
@pytest.mark.parametrize(("kind", "method", "ts"), LONG)
def test_every_sampler_at_hundreds_of_times_in_float32(hurst, kind, method, ts):
    x = draws(hurst, kind, method, ts, 400)
    assert x.dtype == jnp.float32
    white = whitened(x, hurst, np.asarray(ts, float), kind)
    stats.assert_mean((white**2).reshape(-1), 1.0, detects=0.05)
    stats.assert_mean((white[:, 1:] * white[:, :-1]).reshape(-1), 0.0, detects=0.05)


@pytest.mark.parametrize(
    ("hurst", "num", "kind", "method"),
    [
        (0.9, 500, "II", "cholesky"),
        (0.8, 1_000, "I", "cholesky"),
        (0.8, 1_000, "II", "cholesky"),
        (0.95, 300, "I", "cholesky"),
        (1 - 1e-6, 300, "I", "cholesky"),
        (1 - 1e-6, 300, "I", "hosking"),
    ],
)
def test_known_times_never_give_nan(hurst, num, kind, method):
    path = gn.fbm(hurst, np.arange(1, num + 1) / num, kind=kind, method=method, key=jr.key(0))
    assert path.dtype == jnp.float32
    assert np.isfinite(path).all()


@pytest.mark.key_reuse  # the same key twice, on purpose
def test_methods_agree_on_one_path_and_with_a_traced_index():
    """The factor of a covariance is unique, so prediction from the past and Cholesky turn equal noise into one path."""
    key = jr.key(5)
    for hurst in (0.2, 0.95):
        path = gn.fbm(hurst, LATE, method="cholesky", key=key)
        predicted = gn.fbm(hurst, LATE, method="hosking", key=key)
        traced = jax.jit(lambda h: gn.fbm(h, LATE, method="cholesky", key=key))(hurst)
        np.testing.assert_allclose(predicted, path, atol=2e-4)
        np.testing.assert_allclose(traced, path, atol=2e-4)


@pytest.mark.parametrize("method", ["davies_harte", "hosking", "cholesky"])
def test_a_traced_index_outside_the_interval_gives_nan(method):
    path = jax.jit(lambda h: gn.fbm(h, TS, method=method, key=jr.key(0)))(1.5)
    assert not np.isfinite(path[1:]).any()


def test_a_wrong_index_is_caught():
    x = draws(0.7, "I", "davies_harte", TS, 20_000)
    with pytest.raises(AssertionError):
        stats.assert_covariance(x, gn.fbm_covariance(0.65, TS[:, None], TS[None]))


@pytest.mark.slow
@pytest.mark.key_reuse  # the same key twice, on purpose
def test_paths_start_at_zero_and_scale_with_time():
    key = jr.key(1)
    for method in ("davies_harte", "hosking", "cholesky"):
        path = gn.fbm(0.7, np.arange(5) / 4, method=method, key=key)
        assert path.shape == (5,)
        assert path[0] == 0
    short = gn.fbm(0.3, TS, key=key)
    long = gn.fbm(0.3, 16 * TS, key=key)
    np.testing.assert_allclose(long, 16**0.3 * short, rtol=1e-5)


def test_late_start_on_the_grid():
    x = jax.vmap(lambda k: gn.fbm(0.7, TS[3:], key=k))(jr.split(jr.key(3), 20_000))
    stats.assert_covariance(x, gn.fbm_covariance(0.7, TS[3:, None], TS[None, 3:]))


def test_refusals():
    key = jr.key(0)
    for method in ("davies_harte", "hosking", None):
        with pytest.raises(ValueError, match="equally spaced"):
            gn.fbm(0.5, IRREGULAR, method=method, key=key)
    with pytest.raises(ValueError, match="method"):
        gn.fbm(0.5, TS, kind="II", method="davies_harte", key=key)
    with pytest.raises(ValueError, match="davies_harte"):
        gn.fbm(0.5, TS, method="davies-harte", key=key)
    with pytest.raises(ValueError, match="increasing"):
        gn.fbm(0.5, np.array([0.1, 0.1, 0.2]), method="cholesky", key=key)
    with pytest.raises(ValueError, match="non-negative"):
        gn.fbm(0.5, np.array([-0.1, 0.1]), method="cholesky", key=key)
    with pytest.raises(ValueError, match="scalar"):
        gn.fbm(np.array([0.5, 0.6]), TS, key=key)
    with pytest.raises(TypeError, match="key"):
        gn.fbm(0.5, TS, key=jr.PRNGKey(0))


def test_a_covariance_beyond_memory_is_refused_beforehand(monkeypatch):
    monkeypatch.setattr(_memory, "_total_bytes", lambda: 64_000_000_000)
    times = np.arange(1.0, 60_001.0)
    with pytest.raises(ValueError, match="about 173 GB. Use the default method, 'davies_harte'"):
        gn.fbm(0.7, times, method="cholesky", key=jr.key(0))
    with pytest.raises(ValueError, match="genkit.sde.simulate"):
        gn.fbm(0.7, times, kind="II", key=jr.key(0))
    assert gn.fbm(0.7, times, key=jr.key(0)).shape == (60_000,)


def test_as_path_drives_diffrax():
    ts = np.linspace(0.0, 1.0, 17)
    path = gn.as_path(0.7, ts, shape=(2,), key=jr.key(4))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: jnp.zeros(2)), diffrax.ControlTerm(lambda t, y, args: jnp.eye(2), path)
    )
    out = diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, 1 / 16, jnp.zeros(2))
    assert out.ys is not None
    np.testing.assert_allclose(out.ys[-1], path.evaluate(0.0, 1.0), rtol=1e-4, atol=1e-5)
