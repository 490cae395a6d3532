"""Every sampler against the exact covariance, and what samplers refuse."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import stats

import genkit.noise as gn


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


def test_as_path_drives_diffrax():
    ts = np.linspace(0.0, 1.0, 17)
    path = gn.as_path(0.7, ts, shape=(2,), key=jr.key(4))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: jnp.zeros(2)), diffrax.ControlTerm(lambda t, y, args: jnp.eye(2), path)
    )
    out = diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, 1 / 16, jnp.zeros(2))
    assert out.ys is not None
    np.testing.assert_allclose(out.ys[-1], path.evaluate(0.0, 1.0), rtol=1e-4, atol=1e-5)
