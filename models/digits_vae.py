"""A variational auto-encoder of 8 x 8 digits.

What: 10 latent normals, 64 gray levels as binomial counts of 16, two-layer networks; the objective is the ELBO written
as a program over model and guide, images in a plate.
Source: Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.
Cost: 2000 steps about twenty seconds on two cores. Expected: an ELBO of about -110 nats per image at the end.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

import genkit as gk


LATENT = 10


class VAE(eqx.Module):
    """Encoder and decoder, each with its program."""

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(self, key):
        key_encoder, key_decoder = jax.random.split(key)
        self.encoder = eqx.nn.MLP(64, 2 * LATENT, 128, 1, jax.nn.leaky_relu, key=key_encoder)
        self.decoder = eqx.nn.MLP(LATENT, 64, 128, 1, jax.nn.leaky_relu, key=key_decoder)

    def model(self, counts):
        """Latent codes and gray levels."""
        with numpyro.plate("image", counts.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
            logits = jax.vmap(self.decoder)(z)
            numpyro.sample("x", dist.Binomial(16, logits=logits).to_event(1), obs=counts)

    def guide(self, counts):
        """Codes given the images."""
        with numpyro.plate("image", counts.shape[0]):
            loc, log_scale = jnp.split(jax.vmap(self.encoder)(counts / 16), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


def objective(vae, images):
    """The ELBO per image."""
    counts = jnp.round(images.reshape(-1, 64) * 8 + 8)  # the digits are scaled to [-1, 1]; levels are 0..16
    bound = gk.vi.elbo(gk.vi.program(vae.model)(counts), gk.vi.program(vae.guide)(counts))
    return bound / images.shape[0]


recipe = gk.Recipe(
    build=lambda key: VAE(key),
    data=gk.data.Batches(gk.data.digits().x_train, batch_size=128),
    phases=gk.Phase(gk.vi.maximize(objective), optax.adam(1e-3)),
    num_steps=2000,
    name="digits VAE",
)
