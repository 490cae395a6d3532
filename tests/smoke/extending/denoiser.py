"""A denoiser of one's own: the exact one of two unit normals, whose means are learned."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import genkit as gk


class TwoNormals(gk.Denoiser):
    """Labels 0 and 1; no label is an even mixture, for which the means are weighed by their likelihood."""

    means: jax.Array
    shape: tuple = eqx.field(static=True, default=(2,))

    def __call__(self, x, sigma, cond=None):
        if cond is None:
            cond = jnp.array(-1)
        log_likelihood = -0.5 * jnp.sum((x - self.means) ** 2, axis=-1) / (1 + sigma**2)
        weights = jnp.where(cond < 0, jax.nn.softmax(log_likelihood), jax.nn.one_hot(cond, 2))
        return (x + sigma**2 * weights @ self.means) / (1 + sigma**2)


def batch(key):
    """Points and labels: means -2 and 2."""
    labels = jnp.arange(64) % 2
    return 4.0 * labels[:, None] - 2.0 + jax.random.normal(key, (64, 2)), labels


recipe = gk.Recipe(
    build=lambda key: TwoNormals(jnp.array([[-1.0, -1.0], [1.0, 1.0]])),
    data=jax.tree_util.Partial(batch),
    phases=gk.Phase(gk.diffusion.DenoisingScoreMatching(), optax.adam(3e-2)),
    num_steps=200,
)
