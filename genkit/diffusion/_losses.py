"""Objectives that teach a denoiser: denoising score matching and flow matching."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree

from genkit._core import Objective, null_like
from genkit._core._checks import check, check_interval, describe
from genkit._core._fields import as_number

from ._schedule_family import CondOT
from ._schedules import Schedule
from ._weights import EDMWeight


def _as_law(law: Any) -> Any:
    """A numpyro law with its parameters as arrays, so that another value never recompiles."""
    return jax.tree.map(as_number, law) if isinstance(law, dist.Distribution) else law


def _check_law(name: str, law: Any) -> None:
    """Refuse anything but a scalar numpyro law."""
    check(isinstance(law, dist.Distribution), name, "a numpyro distribution", describe(law))
    check(law.batch_shape == () and law.event_shape == (), name, "a scalar law", f"shape {law.shape()}")


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching, as a regression of the clean example on the noisy one.

    $$L = E_{\sigma \sim \text{noise\_law}}\; E_{x_0, \varepsilon}\; w(\sigma)\, |D(x_0 + \sigma\varepsilon, \sigma, c) - x_0|^2 ,$$

    the squared norm summed over the coordinates, the mean taken over the batch. The minimiser is the posterior mean
    $E[x_0 \mid x, \sigma, c]$ whatever law and weight are. Where the law has an inverse distribution function, the noise
    levels of a batch are one random shift of an even grid of quantiles, shuffled: each is still drawn from the law, and
    together they cover it, which takes most of the variance over noise levels out of the gradient.

    Args:
        noise_law: numpyro law of the noise level; default `LogNormal(-1.2, 1.2)`.
        weight: function of the noise level on the squared norm; default `EDMWeight` at the model's own `sigma_data`
            (1 where it has none). See `genkit.diffusion.EDMWeight` and its neighbours.
        cond_dropout: probability of replacing the condition of an example by "no condition", each example by itself; in
            [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> objective = gk.diffusion.DenoisingScoreMatching()
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> batch = jax.random.normal(jax.random.key(0), (8, 2))
        >>> value, aux = objective(denoiser, batch, key=jax.random.key(1))
        >>> value.shape, sorted(aux)
        ((), ['mse'])

    Source: Vincent, "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation 2011; Karras
    et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, equation 2 and table 1;
    Kingma et al., "Variational Diffusion Models", NeurIPS 2021, appendix I.1 (even quantiles).
    """  # noqa: E501

    noise_law: dist.Distribution = eqx.field(converter=_as_law, default_factory=lambda: dist.LogNormal(-1.2, 1.2))
    weight: Callable | None = None
    cond_dropout: Float[Array, ""] = eqx.field(converter=as_number, default=0.0)

    def __check_init__(self):
        _check_law("noise_law", self.noise_law)
        check(self.weight is None or callable(self.weight), "weight", "a function of the noise level", self.weight)
        check_interval("cond_dropout", self.cond_dropout, 0.0, 1.0)

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: denoiser `(x, sigma, cond) -> x0` of one example.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions `(b, ...)`.
            key: typed PRNG key.

        Returns:
            The loss, and `{"mse": unweighted mean squared error per coordinate}`.
        """
        key_level, key_noise, key_cond = jr.split(key, 3)
        x0, cond = _split_batch(batch)
        sigma = draw_evenly(self.noise_law, x0.shape[0], key=key_level).astype(x0.dtype)
        weight = self.level_weight(model)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        cond = _drop(cond, self.cond_dropout, key=key_cond)
        return _regress(model, x0, noise, sigma, cond, jax.vmap(weight)(sigma))

    def level_weight(self, model: Any) -> Callable:
        """The weight as a function of the noise level, the default for this model where none was given.

        Args:
            model: the denoiser.

        Returns:
            A function of one noise level.
        """
        if self.weight is not None:
            return self.weight
        # A trained sigma_data must not learn to lower its own weight.
        return EDMWeight(jax.lax.stop_gradient(getattr(model, "sigma_data", 1.0)))


class FlowMatching(Objective):
    r"""Conditional flow matching: regression of the velocity along the paths of a schedule.

    $$L = E_{t}\, E_{x_0, \varepsilon}\, |u(x_t, t, c) - (\dot\alpha_t x_0 + \dot\sigma_t\varepsilon)|^2, \qquad
      x_t = \alpha_t x_0 + \sigma_t\varepsilon,$$

    with $u$ the velocity of the denoiser, so that any denoiser can be trained by it. It is computed as the equal
    $(d_t/\sigma_t)^2 |D - x_0|^2$, where $d = \alpha\dot\sigma - \dot\alpha\sigma$, in the denoiser's coordinates
    $x_t/\alpha_t$. The squared norm is summed over the coordinates, the mean taken over the batch, and times cover
    their law evenly as the noise levels of `DenoisingScoreMatching` do. Train
    `Preconditioned(net, "velocity", schedule=CondOT())` with it.

    Args:
        schedule: the paths.
        coupling: function `(x0, noise, cond, *, key) -> (x0, noise, cond)` that pairs data and noise of a batch, and
            moves the conditions with the data; `None` leaves them independent.
        cond_dropout: probability of replacing the condition of an example by "no condition", each example by itself; in
            [0, 1].
        time_law: numpyro law of the time; default uniform on [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> objective = gk.diffusion.FlowMatching()
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> batch = jax.random.normal(jax.random.key(0), (8, 2))
        >>> value, aux = objective(denoiser, batch, key=jax.random.key(1))
        >>> value.shape
        ()

    Source: Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, equation 9; Tong et al., "Improving and
    Generalizing Flow-Based Generative Models with Minibatch Optimal Transport", TMLR 2024 (couplings).
    """

    schedule: Schedule = eqx.field(default_factory=CondOT)
    coupling: Callable | None = None
    cond_dropout: Float[Array, ""] = eqx.field(converter=as_number, default=0.0)
    time_law: dist.Distribution = eqx.field(
        converter=_as_law, default_factory=lambda: dist.Uniform(0.0, 1.0), kw_only=True
    )

    def __check_init__(self):
        check(isinstance(self.schedule, Schedule), "schedule", "a `genkit.Schedule`", describe(self.schedule))
        check(self.coupling is None or callable(self.coupling), "coupling", "a function or None", self.coupling)
        check_interval("cond_dropout", self.cond_dropout, 0.0, 1.0)
        _check_law("time_law", self.time_law)

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: denoiser `(x, sigma, cond) -> x0` of one example.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions `(b, ...)`.
            key: typed PRNG key.

        Returns:
            The loss, and `{"mse": unweighted mean squared error per coordinate of the clean example}`.
        """
        key_time, key_noise, key_cond, key_coupling = jr.split(key, 4)
        x0, cond = _split_batch(batch)
        t = draw_evenly(self.time_law, x0.shape[0], key=key_time).astype(x0.dtype)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        if self.coupling is not None:
            x0, noise, cond = self.coupling(x0, noise, cond, key=key_coupling)
        cond = _drop(cond, self.cond_dropout, key=key_cond)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        determinant = alpha * self.schedule.sigma_dot(t) - sigma * self.schedule.alpha_dot(t)
        return _regress(model, x0, noise, self.schedule.noise_level(t), cond, (determinant / sigma) ** 2)


def draw_evenly(law: dist.Distribution, num_samples: int, *, key: Key[Array, ""]) -> Float[Array, " n"]:
    """Draw from a scalar law so that the draws together cover it: shifted even quantiles in random order.

    Args:
        law: scalar numpyro law; without an inverse distribution function the draws are independent.
        num_samples: number of draws.
        key: typed PRNG key.

    Returns:
        The draws; each by itself follows the law.
    """
    key_shift, key_order, key_draw = jr.split(key, 3)
    quantile = (jr.uniform(key_shift) + jnp.arange(num_samples) / num_samples) % 1
    # Neither end is a noise level: half of one float32 step from 0 and from 1 keeps the inverse finite.
    quantile = jnp.clip(quantile, 2.0**-25, 1 - 2.0**-24)
    try:
        return law.icdf(jr.permutation(key_order, quantile))
    except (NotImplementedError, ImportError):  # numpyro has some inverses only where another package is installed
        return law.sample(key_draw, (num_samples,))


def _split_batch(batch: PyTree) -> tuple[Float[Array, " b *shape"], PyTree]:
    """Examples and conditions of a batch."""
    pair = isinstance(batch, (tuple, list))
    check(not pair or len(batch) == 2, "batch", "an array or a pair (x, cond)", f"{len(batch) if pair else 0} entries")
    x0, cond = batch if pair else (batch, None)
    x0 = jnp.asarray(x0)
    floating = jnp.issubdtype(x0.dtype, jnp.floating)
    check(floating and x0.ndim >= 1, "batch", "floating examples with a leading batch axis", x0)
    for leaf in jax.tree.leaves(cond):
        sizes = jnp.shape(leaf)[:1]
        check(sizes == x0.shape[:1], "cond", f"one entry for each of the {x0.shape[0]} examples", leaf)
    return x0, cond


def _drop(cond: PyTree, probability: Float[Array, ""], *, key: Key[Array, ""]) -> PyTree:
    """Replace the condition of each example by "no condition" with the given probability."""
    leaves = jax.tree.leaves(cond)
    if not leaves:
        return cond
    dropped = jr.bernoulli(key, probability, (leaves[0].shape[0],))

    def choose(leaf: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *(1,) * (leaf.ndim - 1)), null_like(leaf), leaf)

    return jax.tree.map(choose, cond)


def _regress(
    model: Callable, x0: Array, noise: Array, sigma: Array, cond: PyTree, weight: Array
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted squared distance of the denoised examples to the clean ones, in the denoiser's coordinates."""
    x = x0 + sigma.reshape(-1, *(1,) * (x0.ndim - 1)) * noise
    residual = jax.vmap(model)(x, sigma, cond) - x0
    squares = jnp.sum(residual**2, axis=tuple(range(1, x0.ndim)))
    return jnp.mean(weight * squares), {"mse": jnp.mean(residual**2)}
