"""A schedule of one's own: alpha = 1 - t^2, sigma = t; its rates are derived."""

import jax.numpy as jnp
import optax

import genkit as gk


class Parabola(gk.Schedule):
    """Keeps more of the data in the first half of the path."""

    def alpha(self, t):
        return 1 - jnp.asarray(t) ** 2

    def sigma(self, t):
        return jnp.asarray(t) * 1.0

    def time(self, noise_level):
        # sigma / alpha = t / (1 - t^2) = s is the quadratic s t^2 + t - s = 0.
        s = jnp.asarray(noise_level)
        return 2 * s / (1 + jnp.sqrt(1 + 4 * s**2))


recipe = gk.Recipe(
    build=lambda key: gk.diffusion.Preconditioned(
        gk.nn.MLP((2,), width=16, depth=1, key=key), "velocity", schedule=Parabola()
    ),
    data=gk.data.Generated(gk.data.two_moons, batch_size=64),
    phases=gk.Phase(gk.diffusion.FlowMatching(schedule=Parabola()), optax.adam(1e-2)),
    num_steps=20,
)
