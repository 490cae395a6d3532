"""Every tabulated divergence against its f: weight, reward, critic, dual, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genkit import divergence as gd


pytestmark = pytest.mark.usefixtures("x64")
U = np.linspace(-3.0, 3.0, 25)
F = {
    "ReverseKL": lambda r: -jnp.log(r),
    "ForwardKL": lambda r: r * jnp.log(r),
    "JensenShannon": lambda r: r * jnp.log(r) - (r + 1) * jnp.log((r + 1) / 2),
    "SoftenedReverseKL": lambda r: (r + 1) * jnp.log((r + 1) / (2 * r)),
    "SoftenedForwardKL": lambda r: (r + 1) * jnp.log((r + 1) / 2),
    "SquaredHellinger": lambda r: (jnp.sqrt(r) - 1) ** 2,
    "PearsonChi2": lambda r: (r - 1) ** 2,
    "NeymanChi2": lambda r: (r - 1) ** 2 / r,
    "Jeffreys": lambda r: (r - 1) * jnp.log(r),
    "LeCam": lambda r: (r - 1) ** 2 / (r + 1),
}


@pytest.mark.parametrize("name", F)
def test_closed_forms_follow_from_f(name):
    divergence, f, r = getattr(gd, name)(), F[name], jnp.exp(U)
    first, second = jax.vmap(jax.grad(f))(r), jax.vmap(jax.grad(jax.grad(f)))(r)
    np.testing.assert_allclose(divergence.phi(U), f(r), atol=1e-12, rtol=1e-11)
    np.testing.assert_allclose(divergence.weight(U), r**2 * second, rtol=1e-9)
    np.testing.assert_allclose(divergence.critic(U), first, atol=1e-10, rtol=1e-10)
    constant = divergence.reward(U) - (r * first - f(r))
    np.testing.assert_allclose(constant, constant[0], atol=1e-10)
    made = gd.from_f(f)
    np.testing.assert_allclose(made.weight(U), divergence.weight(U), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["JensenShannon", "SquaredHellinger", "Jeffreys", "LeCam"])
def test_self_dual(name):
    divergence = getattr(gd, name)()
    np.testing.assert_allclose(divergence.dual().weight(U), divergence.weight(U), rtol=1e-12)
    np.testing.assert_allclose(divergence.dual().phi(U), divergence.phi(U), atol=1e-12)


def test_alpha_family():
    np.testing.assert_allclose(gd.Alpha(0.5).weight(U), 2 * gd.SquaredHellinger().weight(U), rtol=1e-12)
    np.testing.assert_allclose(gd.Alpha(2.0).phi(U), gd.PearsonChi2().phi(U) / 2, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gd.Alpha(-1.0).phi(U), gd.NeymanChi2().phi(U) / 2, rtol=1e-10, atol=1e-12)
    for a in (0.0, 1.0):
        np.testing.assert_allclose(gd.Alpha(a).phi(U), gd.Alpha(a + 1e-3).phi(U), atol=0.2)
        near, far = gd.Alpha(a + 0.9e-4).phi(U), gd.Alpha(a + 1.1e-4).phi(U)
        np.testing.assert_allclose(near, far, rtol=2e-4)
    np.testing.assert_allclose(gd.Alpha(0.0).reward(U), U, atol=1e-12)


def test_user_weights_and_combinations():
    made = gd.from_weight(jnp.exp)
    np.testing.assert_allclose(made.phi(U), U * jnp.exp(U) - jnp.expm1(U), atol=1e-10)
    np.testing.assert_allclose(made.reward(U), jnp.expm1(U), atol=1e-10)
    mix = gd.ReverseKL() + 2 * gd.ForwardKL()
    np.testing.assert_allclose(mix.weight(U), 1 + 2 * jnp.exp(U), rtol=1e-12)


def test_total_variation_needs_smoothing_for_paths():
    exact = gd.TotalVariation()
    np.testing.assert_allclose(exact.phi(U), jnp.abs(jnp.exp(U) - 1) / 2, rtol=1e-12)
    with pytest.raises(ValueError, match="smoothing"):
        exact.weight(U)
    with pytest.raises(ValueError, match="kink"):
        gd.from_f(lambda r: jnp.abs(r - 1) / 2).weight(U)
    smooth = gd.TotalVariation(0.3)
    slope = jax.vmap(jax.grad(smooth.reward))(U)
    np.testing.assert_allclose(slope, smooth.weight(U), rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_log_ratios_of_any_dtype_are_floats(dtype):
    """The exponential of 11.1 is beyond half precision, and minus an unsigned integer is not negative."""
    u = np.array([0, 3, 12]).astype(dtype)
    single = np.array(u, float)
    for divergence in (gd.JensenShannon(), gd.ReverseKL().dual()):
        for name in ("phi", "weight", "reward"):
            got = getattr(divergence, name)(u)
            np.testing.assert_allclose(got, getattr(divergence, name)(single), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gd.self_normalize(u), gd.self_normalize(single), rtol=1e-5, atol=1e-6)
