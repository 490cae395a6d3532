"""Video of moving digits by a latent fractional SDE: what moves is four-dimensional, what is shown stands still.

What: 8 x 8 digits bounce in a 12 x 12 frame for ten frames, with rough motion. Twelve coordinates: four follow a
neural SDE with a learned Hurst index; eight have neither drift nor noise: their initial
distribution carries the content.
Source: Daems et al., "Variational Inference for SDEs Driven by Fractional Noise", ICLR 2024, section 5.3, made small.
Cost: about a minute on one core.
Expect: a bound per video of about 1,430. Still pictures cannot reach 162, the log-density of a video's mean frame.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax

import genkit as gk


NUM_FRAMES = 10
SIDE = 12
MOVING = 4
CONTENT = 8
NUM_STEPS = 6000
ts = np.arange(1, NUM_FRAMES + 1) / NUM_FRAMES
lift = gk.noise.ma_fbm(3, 0.1, 100.0)


def videos(digits, key):
    """One video per digit, values in [0, 1], shape (n, NUM_FRAMES, SIDE, SIDE)."""
    key_start, key_path = jr.split(key)
    images = (jnp.asarray(digits)[:, 0] + 1) / 2
    num = images.shape[0]
    noise = jax.vmap(lambda key: gk.noise.fbm(0.8, ts, key=key))(jr.split(key_path, 2 * num)).reshape(
        num, 2, NUM_FRAMES
    )
    place = jr.uniform(key_start, (num, 2, 1), maxval=4.0) + 4.0 * noise
    place = 4.0 - jnp.abs(place % 8.0 - 4.0)  # reflected at the walls, in [0, 4]
    canvas = jnp.pad(images, ((0, 0), (0, 4), (0, 4)))

    def frame(image, shift):
        rows, cols = jnp.meshgrid(jnp.arange(SIDE) - shift[0], jnp.arange(SIDE) - shift[1], indexing="ij")
        inside = (rows >= 0) & (rows <= 7) & (cols >= 0) & (cols <= 7)
        return jnp.where(inside, jax.scipy.ndimage.map_coordinates(image, [rows, cols], order=1), 0.0)

    return jax.vmap(lambda image, track: jax.vmap(lambda s: frame(image, s))(track.T))(canvas, place)


class Drift(eqx.Module):
    """A neural drift of what moves, none of the content."""

    net: eqx.nn.MLP

    def __call__(self, t, x):
        """Rate of change."""
        return jnp.concatenate([self.net(x[:MOVING]) - x[:MOVING], jnp.zeros(CONTENT, x.dtype)])


def diffusion(t, x):
    """Unit noise on what moves, none on the content."""
    return jnp.concatenate([jnp.ones(MOVING, x.dtype), jnp.zeros(CONTENT, x.dtype)])


class Decoder(eqx.Module):
    """From the state to the distribution of a frame."""

    net: eqx.nn.MLP

    def __call__(self, x):
        """Normal pixels with error 0.1."""
        return dist.Normal(jax.nn.sigmoid(self.net(x).reshape(SIDE, SIDE)), 0.1)


class Embed(eqx.Module):
    """Features of a frame for the guide."""

    net: eqx.nn.MLP

    def __call__(self, frame):
        """The features."""
        return self.net(frame.ravel())


data = videos(gk.data.digits().x_train, jr.key(0))


def build(key):
    """The latent model before training."""
    keys = jr.split(key, 4)
    size = MOVING + CONTENT
    sde = gk.sde.FractionalSDE(
        Drift(eqx.nn.MLP(MOVING, MOVING, 32, 1, jnp.tanh, key=keys[0])),
        diffusion,
        lift,
        gk.sde.LearnedHurst(0.5),
        1.0,
        x0=dist.Normal(jnp.zeros(size), jnp.ones(size)),
    )
    decoder = Decoder(eqx.nn.MLP(size, SIDE * SIDE, 128, 2, jax.nn.silu, key=keys[1]))
    embed = Embed(eqx.nn.MLP(SIDE * SIDE, 64, 128, 1, jax.nn.silu, key=keys[2]))
    example = gk.sde.Observed(ts, data[0], decoder)
    guide = gk.sde.NeuralGuide(sde, example, linear=False, width=64, embed=embed, key=keys[3])
    return gk.sde.LatentSDE(sde, decoder, guide)


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches(data, batch_size=32),
    phases=gk.Phase(
        gk.sde.NegativeELBO(ts, scale=1.0 / (NUM_FRAMES * SIDE * SIDE)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, NUM_STEPS))),
    ),
    num_steps=NUM_STEPS,
    name="digits video",
)
