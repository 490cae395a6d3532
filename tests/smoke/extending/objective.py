"""An objective of one's own: Huber's loss of the prediction at one noise level."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import genkit as gk


class HuberDenoising(gk.Objective):
    """The mean of Huber's loss |D(x0 + sigma eps) - x0| over the batch."""

    sigma: float = eqx.field(static=True)

    def __call__(self, model, batch, *, key):
        noisy = batch + self.sigma * jax.random.normal(key, batch.shape)
        error = jax.vmap(lambda x: model(x, jnp.asarray(self.sigma)))(noisy) - batch
        loss = jnp.mean(optax.losses.huber_loss(error))
        return loss, {"largest_error": jnp.max(jnp.abs(error))}


recipe = gk.Recipe(
    build=lambda key: gk.diffusion.Preconditioned(gk.nn.MLP((2,), width=16, depth=1, key=key), sigma_data=1.0),
    data=gk.data.Generated(gk.data.two_moons, batch_size=64),
    phases=gk.Phase(HuberDenoising(0.5), optax.adam(1e-2)),
    num_steps=20,
)
