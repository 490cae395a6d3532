"""Objectives that teach a denoiser: denoising score matching and flow matching."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import check, check_interval, describe
from genkit._core._fields import as_number
from genkit._core._stratified import draw_evenly
from genkit.diffusion._objectives._batch import drop_conditions, regress, split_batch
from genkit.diffusion._objectives._weights import EDMWeight
from genkit.diffusion._schedules._base import Schedule
from genkit.diffusion._schedules._standard import CondOT
from genkit.sampling import as_denoiser
from genkit.training import Objective


def _as_arrays(distribution: object) -> object:
    """A numpyro distribution with its parameters as arrays, so that another value never recompiles."""
    # What is no distribution passes as it is; the class refuses it with a message of its own.
    if not isinstance(distribution, dist.Distribution):
        return distribution
    return jax.tree.map(as_number, distribution)


def _check_scalar(name: str, distribution: dist.Distribution) -> None:
    """Refuse anything but a scalar numpyro distribution."""
    check(isinstance(distribution, dist.Distribution), name, "a numpyro distribution", distribution)
    shape = distribution.shape()
    check(shape == (), name, "a scalar distribution", f"shape {shape}")


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching, as a regression of the clean example on the noisy one.

    $$L = E_\sigma\; E_{x_0, \varepsilon}\; w(\sigma)\, |D(x_0 + \sigma\varepsilon, \sigma, c) - x_0|^2 ,$$

    the squared norm summed over the coordinates, the mean taken over the batch. The minimizer is the posterior mean
    $E[x_0 \mid x, \sigma, c]$ whatever distribution and weight are. Where the distribution has an inverse distribution function, the noise
    levels of a batch are one random shift of an even grid of quantiles, shuffled: each is still drawn from it, and
    together they cover it, which takes most of the variance over noise levels out of the gradient.

    Args:
        noise_distribution: numpyro distribution of the noise level; a scalar one; default `LogNormal(-1.2, 1.2)`.
        weight: function of the noise level on the squared norm; default `EDMWeight` at the model's own `sigma_data`
            (1 where it has none). See `genkit.diffusion.EDMWeight` and its neighbors.
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

    noise_distribution: dist.Distribution = eqx.field(
        converter=_as_arrays, default_factory=lambda: dist.LogNormal(-1.2, 1.2)
    )
    weight: Callable[[Array], Array] | None = None
    cond_dropout: Float[Array, ""] = eqx.field(converter=as_number, default=0.0)

    def __check_init__(self):
        _check_scalar("noise_distribution", self.noise_distribution)
        if self.weight is not None and not callable(self.weight):
            raise ValueError(f"`weight` must be a function of the noise level; got {describe(self.weight)}.")
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
        x0, cond = split_batch(batch)
        sigma = draw_evenly(self.noise_distribution, x0.shape[0], key=key_level).astype(x0.dtype)
        weight = self.level_weight(model)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        cond = drop_conditions(cond, self.cond_dropout, key=key_cond)
        return regress(model, x0, noise, sigma, cond, jax.vmap(weight)(sigma))

    def level_weight(self, model: Callable) -> Callable[[Array], Array]:
        """Weight as a function of the noise level: the one given, or the default for this model.

        Args:
            model: the denoiser.

        Returns:
            A function of one noise level.
        """
        if self.weight is not None:
            return self.weight
        # A trained sigma_data must not learn to lower its own weight.
        return EDMWeight(jax.lax.stop_gradient(as_denoiser(model).sigma_data))


class FlowMatching(Objective):
    r"""Conditional flow matching: regression of the velocity along the paths of a schedule.

    $$L = E_{t}\, E_{x_0, \varepsilon}\, |u(x_t, t, c) - (\dot\alpha_t x_0 + \dot\sigma_t\varepsilon)|^2, \qquad
      x_t = \alpha_t x_0 + \sigma_t\varepsilon,$$

    with $u$ the velocity of the denoiser, so that any denoiser can be trained by it. It is computed as the equal
    $(d_t/\sigma_t)^2 |D - x_0|^2$, where $d = \alpha\dot\sigma - \dot\alpha\sigma$, in the denoiser's coordinates
    $x_t/\alpha_t$. The squared norm is summed over the coordinates, the mean taken over the batch, and times cover
    their distribution evenly as the noise levels of `DenoisingScoreMatching` do. Train
    `Preconditioned(net, "velocity", schedule=CondOT())` with it.

    Args:
        schedule: the paths.
        coupling: function `(x0, noise, cond, *, key) -> (x0, noise, cond)` that pairs data and noise of a batch, and
            moves the conditions with the data; `None` leaves them independent.
        cond_dropout: probability of replacing the condition of an example by "no condition", each example by itself; in
            [0, 1].
        time_distribution: numpyro distribution of the time; default uniform on [0, 1].

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
    time_distribution: dist.Distribution = eqx.field(
        converter=_as_arrays, default_factory=lambda: dist.Uniform(0.0, 1.0), kw_only=True
    )

    def __check_init__(self):
        check(isinstance(self.schedule, Schedule), "schedule", "a `genkit.Schedule`", describe(self.schedule))
        if self.coupling is not None and not callable(self.coupling):
            raise ValueError(f"`coupling` must be a function or None; got {describe(self.coupling)}.")
        check_interval("cond_dropout", self.cond_dropout, 0.0, 1.0)
        _check_scalar("time_distribution", self.time_distribution)

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
        x0, cond = split_batch(batch)
        t = draw_evenly(self.time_distribution, x0.shape[0], key=key_time).astype(x0.dtype)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        if self.coupling is not None:
            x0, noise, cond = self.coupling(x0, noise, cond, key=key_coupling)
        cond = drop_conditions(cond, self.cond_dropout, key=key_cond)
        alpha = self.schedule.alpha(t)
        sigma = self.schedule.sigma(t)
        # The squared distance of velocities is this multiple of that of clean examples, at every time.
        determinant = alpha * self.schedule.sigma_dot(t) - sigma * self.schedule.alpha_dot(t)
        return regress(model, x0, noise, self.schedule.noise_level(t), cond, (determinant / sigma) ** 2)
