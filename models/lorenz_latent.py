"""Latent neural SDE of the stochastic Lorenz attractor, its noise of unknown roughness.

What: series of the Lorenz system with multiplicative noise, normalized and seen with error; a three-dimensional latent
SDE with a neural drift, learned diffusion and learned Hurst index explains them; the guide reads each series.
Source: Li et al., "Scalable Gradients for Stochastic Differential Equations", AISTATS 2020, section 7.2.
Cost: about a minute on one core.
Expect: a bound per series of about 65 (white noise of the data's spread has -85); paths of the model then look like the
butterfly's wings.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax

import genkit as gk


NUM_SERIES = 256
NUM_TIMES = 20
NUM_STEPS = 6000
ts = np.arange(1, NUM_TIMES + 1) / NUM_TIMES
lift = gk.noise.ma_fbm(5, 0.05, 1e3)


def lorenz(t, x):
    """The drift, on a clock where the unit is one time unit of the attractor."""
    return jnp.stack([10.0 * (x[1] - x[0]), x[0] * (28.0 - x[2]) - x[1], x[0] * x[1] - 8.0 / 3.0 * x[2]])


def series(key):
    """Observed series, shape (NUM_SERIES, NUM_TIMES, 3), normalized, with error 0.01."""
    key_start, key_path, key_error = jr.split(key, 3)
    start = jnp.array([0.0, 0.0, 25.0]) + 5.0 * jr.normal(key_start, (NUM_SERIES, 3))
    truth = gk.sde.FractionalSDE(lorenz, lambda t, x: 0.15 * x, gk.noise.brownian(), 0.5, 1.0, x0=jnp.zeros(3))

    def path(key, x0):
        return gk.sde.simulate(truth, ts, x0=x0, max_step=0.005, key=key).x

    x = jax.vmap(path)(jr.split(key_path, NUM_SERIES), start)
    x = (x - x.mean((0, 1))) / x.std((0, 1))
    return x + 0.01 * jr.normal(key_error, x.shape)


class Drift(eqx.Module):
    """A neural drift."""

    net: eqx.nn.MLP

    def __call__(self, t, x):
        """Rate of change of the latent state."""
        return 4.0 * self.net(x)


class Diffusion(eqx.Module):
    """A learned scale per coordinate."""

    log_scale: jax.Array

    def __call__(self, t, x):
        """The scales."""
        return jnp.exp(self.log_scale)


class Decoder(eqx.Module):
    """The state itself, seen with a learned error."""

    log_error: jax.Array

    def __call__(self, x):
        """Distribution of one observation."""
        return dist.Normal(x, jnp.exp(self.log_error))


data = series(jr.key(0))


def build(key):
    """The latent model before training."""
    key_drift, key_guide = jr.split(key)
    sde = gk.sde.FractionalSDE(
        Drift(eqx.nn.MLP(3, 3, 64, 2, jnp.tanh, key=key_drift)),
        Diffusion(jnp.full(3, -0.5)),
        lift,
        gk.sde.LearnedHurst(0.5),
        1.0,
        x0=dist.Normal(jnp.zeros(3), 1.5 * jnp.ones(3)),
    )
    decoder = Decoder(jnp.full(3, -1.0))
    example = gk.sde.Observed(ts, data[0], decoder)
    return gk.sde.LatentSDE(sde, decoder, gk.sde.NeuralGuide(sde, example, linear=False, width=64, key=key_guide))


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches(data, batch_size=32),
    phases=gk.Phase(
        gk.sde.NegativeELBO(ts, steps_per_interval=2, scale=1.0 / (3 * NUM_TIMES)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, NUM_STEPS))),
    ),
    num_steps=NUM_STEPS,
    name="lorenz latent",
)
