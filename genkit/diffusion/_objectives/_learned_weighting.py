"""Denoising score matching whose weights over noise levels are learned."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree

from genkit._core._checks import check
from genkit._core._fields import FROZEN
from genkit._core._stratified import draw_evenly
from genkit.diffusion._objectives._batch import drop_conditions, regress, split_batch
from genkit.diffusion._objectives._denoising import DenoisingScoreMatching
from genkit.sampling import AbstractDelegatingDenoiser, as_denoiser
from genkit.training import Objective


class WithUncertainty(AbstractDelegatingDenoiser):
    """A denoiser beside a learned function of the noise level, for `LearnedWeighting`; it denoises like the former.

    Args:
        denoiser: the denoiser.
        log_variance: `u(log_sigma / 4) -> number`, the logarithm of the error at a noise level; by default a small
            network on Fourier features is made with `key`.
        key: typed PRNG key, where `log_variance` is not given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> data = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> model = gk.diffusion.WithUncertainty(data, key=jax.random.key(0))
        >>> bool((model(jnp.ones(2), jnp.array(1.0)) == data(jnp.ones(2), jnp.array(1.0))).all())
        True

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, appendix B.2.
    """

    denoiser: Callable
    log_variance: Callable

    def __init__(self, denoiser: Callable, log_variance: Callable | None = None, *, key: Key[Array, ""] | None = None):
        check(callable(denoiser), "denoiser", "a callable (x, sigma, cond=None) -> x0", denoiser)
        if log_variance is None:
            if key is None:
                raise ValueError("`key` must be given where `log_variance` is not; got None.")
            log_variance = _LevelNet(key=key)
        self.denoiser = denoiser
        self.log_variance = log_variance

    @property
    def sigma_data(self) -> Float[ArrayLike, ""] | float:
        """Standard deviation of the data, as the denoiser declares it."""
        return as_denoiser(self.denoiser).sigma_data

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """Estimate the clean example; see `Denoiser`."""
        return jnp.asarray(self.denoiser(x, sigma, cond))


class LearnedWeighting(Objective):
    r"""Denoising score matching whose error at each noise level is divided by a learned estimate of itself.

    $$L = E\left[\frac{w(\sigma)\, |D - x_0|^2}{d\; e^{u(\sigma)}} + u(\sigma)\right],$$

    minimized over $u$ by the logarithm of the weighted error per coordinate: every noise level then pulls on the model
    alike. The model is a `WithUncertainty`.

    Args:
        base: the objective whose distribution of noise levels, weight and dropout of conditions are taken.

    Example:
        >>> import genkit as gk
        >>> objective = gk.diffusion.LearnedWeighting(gk.diffusion.DenoisingScoreMatching(cond_dropout=0.1))
        >>> round(float(objective.base.cond_dropout), 2)
        0.1

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, equation 21.
    """

    base: DenoisingScoreMatching = eqx.field(default_factory=DenoisingScoreMatching)

    def __check_init__(self):
        known = isinstance(self.base, DenoisingScoreMatching)
        check(known, "base", "a DenoisingScoreMatching", type(self.base).__name__)

    def __call__(
        self, model: WithUncertainty, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: a `WithUncertainty`.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions.
            key: typed PRNG key.

        Returns:
            The loss, and `{"mse": ...}` as the base reports it.
        """
        check(isinstance(model, WithUncertainty), "model", "a WithUncertainty", type(model).__name__)
        key_level, key_noise, key_cond = jr.split(key, 3)
        x0, cond = split_batch(batch)
        sigma = draw_evenly(self.base.noise_distribution, x0.shape[0], key=key_level).astype(x0.dtype)
        weight = self.base.level_weight(model)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        cond = drop_conditions(cond, self.base.cond_dropout, key=key_cond)
        # The input that EDM gives its network: of order one at every noise level.
        level = jax.vmap(model.log_variance)(jnp.log(sigma) / 4)
        share = jax.vmap(weight)(sigma) * jnp.exp(-level) / x0[0].size
        value, aux = regress(model, x0, noise, sigma, cond, share)
        return value + jnp.mean(level), aux


class _LevelNet(eqx.Module):
    """A linear read-out of fixed Fourier features of the noise level."""

    frequencies: Float[Array, " k"] = eqx.field(metadata=FROZEN)
    phases: Float[Array, " k"] = eqx.field(metadata=FROZEN)
    weights: Float[Array, " k"]
    bias: Float[Array, ""]

    def __init__(self, width: int = 64, *, key: Key[Array, ""]):
        key_frequency, key_phase = jr.split(key)
        self.frequencies = 2 * jnp.pi * jr.normal(key_frequency, (width,))
        self.phases = 2 * jnp.pi * jr.uniform(key_phase, (width,))
        # Zero at first: all noise levels begin with the same weight.
        self.weights = jnp.zeros(width)
        self.bias = jnp.zeros(())

    def __call__(self, level: Float[Array, ""]) -> Float[Array, ""]:
        features = jnp.sqrt(2 / len(self.weights)) * jnp.cos(self.frequencies * level + self.phases)
        return jnp.sum(self.weights * features) + self.bias
