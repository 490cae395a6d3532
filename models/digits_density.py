"""A density model of handwritten digits: a residual network on a fitted mixture, trained on a likelihood bound.

What: a denoiser for the 17 ink levels of the digits, spread uniformly to [0, 1]. The network sees the noisy image and
the estimate of a ten-component mixture, and answers with the probabilities of the 17 levels of every pixel; the mean
of a level given the noisy pixel is a truncated normal's, in closed form. Trained on the bound of `LikelihoodBound`.
Source: the parameterization is ours; the bound is that of Song et al., "Maximum Likelihood Training of Score-Based
Diffusion Models", NeurIPS 2021.
Cost: two minutes on two cores.
Expect: `tests/diffusion/test_digits.py` measures its bits per dimension on the held-out digits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.mixture import GaussianMixture

import genkit as gk


NUM_STEPS = 1_000
LEVELS = 17
SIGMA_MIN = 0.003
SIGMA_MAX = 20.0

digits = gk.data.digits()
ink = (8 * digits.x_train.reshape(-1, 64) + 8).astype("int32")


class Spread(eqx.Module):
    """Batches of digits, their ink levels spread uniformly."""

    ink: jax.Array
    batch_size: int = eqx.field(static=True)

    def __call__(self, key):
        """Draw a batch."""
        key_pick, key_spread = jax.random.split(key)
        rows = jax.random.randint(key_pick, (self.batch_size,), 0, len(self.ink))
        return gk.diffusion.dequantize(self.ink[rows], LEVELS, key=key_spread)


def pixel_levels(x, sigma):
    """Log-likelihood of every ink level and the mean within it, given noisy pixels; both `(64, 17)`."""
    low = jnp.arange(LEVELS) / LEVELS
    high = low + 1 / LEVELS
    middle = low + 0.5 / LEVELS
    # Much noise against the width of a level: its middle tells.
    wide = sigma > 2 / LEVELS
    s = jnp.where(wide, 1 / LEVELS, sigma)
    left = (low - x[:, None]) / s
    right = (high - x[:, None]) / s
    # Tail probabilities are accurate on the right: levels left of the pixel are mirrored.
    flip = left + right < 0
    a = jnp.where(flip, -right, left)
    b = jnp.where(flip, -left, right)
    upper = jax.scipy.special.log_ndtr(-a)
    lower = jax.scipy.special.log_ndtr(-b)
    mass = upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-6)))
    log_pdf_a = -0.5 * a**2 - 0.5 * jnp.log(2 * jnp.pi)
    log_pdf_b = -0.5 * b**2 - 0.5 * jnp.log(2 * jnp.pi)
    shift = jnp.exp(log_pdf_a - mass) - jnp.exp(log_pdf_b - mass)
    mean = jnp.clip(x[:, None] + s * jnp.where(flip, -shift, shift), low, high)
    t = jnp.where(wide, sigma, 2 / LEVELS)
    far = x[:, None] - middle
    mass_wide = -0.5 * (far / t) ** 2
    mean_wide = middle + far / (12 * (LEVELS * t) ** 2)
    return jnp.where(wide, mass_wide, mass), jnp.where(wide, jnp.clip(mean_wide, low, high), mean)


class Inked(gk.Denoiser):
    """The mean over ink levels, their probabilities from a mixture and a network."""

    net: eqx.nn.MLP
    mixture: gk.Denoiser
    shape: tuple = eqx.field(static=True, default=(64,))

    def __call__(self, x, sigma, cond=None):
        """Estimate the clean digit."""
        guess = self.mixture(x, sigma)
        waves = jnp.log(sigma) * jnp.arange(1, 9) * 0.3
        features = [(x - 0.3) / jnp.sqrt(0.1 + sigma**2), 3 * guess - 0.9, jnp.sin(waves), jnp.cos(waves)]
        logits = 3 * self.net(jnp.concatenate(features)).reshape(64, LEVELS)
        mass, mean = pixel_levels(x, sigma)
        # Before training the mixture's estimate decides.
        near = -0.5 * ((jnp.arange(LEVELS) + 0.5) / LEVELS - guess[:, None]) ** 2 / 0.12**2
        return jnp.sum(jax.nn.softmax(logits + mass + near, axis=-1) * mean, axis=-1)


def build(key):
    """The denoiser before training; the mixture is fitted here and stays as it is."""
    key_net, key_spread = jax.random.split(key)
    x = gk.diffusion.dequantize(jnp.tile(ink, (2, 1)), LEVELS, key=key_spread)
    fit = GaussianMixture(10, reg_covar=1e-6, random_state=0).fit(x)
    mixture = gk.diffusion.MixtureDenoiser(*(jnp.asarray(v) for v in (fit.weights_, fit.means_, fit.covariances_)))
    net = eqx.nn.MLP(64 * 2 + 16, 64 * LEVELS, 256, 2, jax.nn.silu, key=key_net)
    # A small last layer: at first the mixture decides.
    small = 0.05 * net.layers[-1].weight
    return Inked(eqx.tree_at(lambda net: net.layers[-1].weight, net, small), mixture)


recipe = gk.Recipe(
    build=build,
    data=Spread(jnp.asarray(ink), 128),
    phases=gk.Phase(
        gk.diffusion.LikelihoodBound(SIGMA_MIN, SIGMA_MAX),
        optax.chain(
            optax.clip_by_global_norm(1e4),
            optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, NUM_STEPS, 2e-5), weight_decay=0.1),
        ),
        where=lambda model: model.net,
    ),
    num_steps=NUM_STEPS,
    ema=0.99,
    name="digits_density",
)
