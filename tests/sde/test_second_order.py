"""Second derivatives of the filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit.noise as gn
import genkit.sde as gs


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "transform", [jax.hessian, lambda f: jax.jacfwd(jax.jacfwd(f)), lambda f: jax.jacrev(jax.jacrev(f))]
)
def test_hessian_of_the_filter(transform):
    """Against finite differences of the gradient."""
    ts = np.array([0.3, 0.9, 2.4])
    observed = gs.Observed(ts, np.cos(ts) - 1, gs.GaussianNoise(0.1))
    lift = gn.ma_fbm(2, 0.1, 100.0)

    def evidence(p):
        sde = gs.FractionalSDE(gs.OrnsteinUhlenbeck(p[1]), gs.Constant(p[2]), lift, p[0], 2.4)
        return gs.kalman(sde, observed)

    p, step = jnp.array([0.4, 1.5, 0.7]), 1e-5
    hessian = jax.jit(transform(evidence))(p)
    gradient = jax.jit(jax.grad(evidence))
    difference = [(gradient(p + step * e) - gradient(p - step * e)) / (2 * step) for e in np.eye(3)]
    np.testing.assert_allclose(hessian, difference, rtol=1e-6, atol=1e-6)
