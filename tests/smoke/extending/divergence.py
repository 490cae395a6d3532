"""A divergence of one's own: the triangular discrimination, f(r) = (r - 1)^2 / (r + 1)."""

import jax
import jax.numpy as jnp

import genkit as gk


class Triangular(gk.FDivergence):
    """Bounded by 2 for probabilities; r = exp(u) is the ratio p / q."""

    def phi(self, u):
        return jnp.expm1(u) * jnp.tanh(u / 2)

    def weight(self, u):
        # r^2 f''(r), written with the logistic function so that no power of r overflows.
        return 8 * jax.nn.sigmoid(u) ** 2 * jax.nn.sigmoid(-u)

    def reward(self, u):
        # r f'(r) - f(r) = (r - 1)(3 r + 1) / (r + 1)^2
        return jnp.tanh(u / 2) * (1 + 2 * jax.nn.sigmoid(u))

    @property
    def pathwise(self):
        return True


u = jnp.linspace(-3.0, 3.0, 7)
divergence = Triangular()
slope = jax.vmap(jax.grad(divergence.phi))(u)
curvature = jax.vmap(jax.grad(jax.grad(divergence.phi)))(u)
assert jnp.allclose(divergence.weight(u), curvature - slope, atol=1e-4)
assert jnp.allclose(divergence.reward(u), slope - divergence.phi(u), atol=1e-4)
