"""A diffusion model as a distribution: a `Measure`, and a numpyro distribution."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, PyTree
from numpyro.distributions import constraints

from genkit._core._checks import check, check_key, describe
from genkit._core._fields import as_number
from genkit.diffusion._flow import check_likelihood
from genkit.diffusion._likelihood._log_prob import log_prob, sample_log_prob
from genkit.diffusion._likelihood._trace import AbstractTrace, ExactTrace
from genkit.inference import Measure
from genkit.sampling import as_denoiser


class FlowMeasure(Measure):
    r"""The distribution that the probability flow of a denoiser draws at `sigma_min`, as a `Measure`.

    It is exact in itself: draws come from centered noise at `sigma_max` (or `terminal`), densities are those of that
    flow. The logarithm of the density is exact up to the solver with `ExactTrace`; with `Hutchinson` only it, not the
    density, is unbiased, so that trace is refused.

    Args:
        denoiser: the model, for one example.
        sigma_min: noise level of the distribution, positive.
        sigma_max: noise level at which draws start.
        shape: shape of one example; needed where the denoiser does not tell.
        trace: an `ExactTrace`.
        terminal: numpyro distribution of the state at `sigma_max`, or `None` for centered noise.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        cond: condition, the same for all draws.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> measure = gk.diffusion.FlowMeasure(denoiser, 0.01, 50.0)
        >>> value, weight = measure.sample(key=jax.random.key(0))
        >>> value.shape, weight.shape
        ((2,), ())
    """

    denoiser: Callable
    sigma_min: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_max: Float[Array, ""] = eqx.field(converter=as_number)
    shape: tuple[int, ...] | None = eqx.field(static=True, default=None)
    trace: AbstractTrace = eqx.field(default_factory=ExactTrace)
    terminal: dist.Distribution | None = None
    rtol: Float[Array, ""] = eqx.field(converter=as_number, default=1e-5, kw_only=True)
    atol: Float[Array, ""] = eqx.field(converter=as_number, default=1e-5, kw_only=True)
    cond: PyTree = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_likelihood(self.denoiser)
        check(self.event_shape is not None, "shape", "given where the denoiser does not tell it", "None")
        if self.trace.is_random:
            raise ValueError(
                f"`trace` must be an ExactTrace; got {type(self.trace).__name__}. "
                "The exponential of an unbiased logarithm is biased."
            )

    @property
    def event_shape(self) -> tuple[int, ...] | None:
        """Shape of one example; `None` where neither the user nor the denoiser tells it."""
        if self.shape is not None:
            return self.shape
        return as_denoiser(self.denoiser).shape

    def sample(self, *, key: Key[Array, ""]) -> tuple[Float[Array, " *shape"], Float[Array, ""]]:
        """Draw one example with its log-density, in one solve."""
        value, found = sample_log_prob(
            self.denoiser,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            shape=self.event_shape,
            trace=self.trace,
            terminal=self.terminal,
            rtol=self.rtol,
            atol=self.atol,
            cond=self.cond,
            key=key,
        )
        return value, found.value

    def log_density(self, value: Float[ArrayLike, " *shape"], *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """Log-density of one example."""
        del key
        # Not the denoiser's own density at the end, where it has one: draws come from centered noise.
        terminal = self.terminal
        if terminal is None:
            terminal = dist.Normal(0.0, self.sigma_max)
        return log_prob(
            self.denoiser,
            value,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            trace=self.trace,
            terminal=terminal,
            rtol=self.rtol,
            atol=self.atol,
            cond=self.cond,
        ).value


class FlowDistribution(dist.Distribution):
    r"""The probability flow of a denoiser at `sigma_min`, as a numpyro distribution over one example.

    A diffusion model becomes a prior: `x = numpyro.sample("x", FlowDistribution(denoiser, 0.01, 50.0))`, for NUTS or
    variational inference alike. The gradient by the value, which samplers want at each of their steps, is by default
    the score at `sigma_min`, $(D(x, \sigma_{min}) - x)/\sigma_{min}^2$: one evaluation, and for the exact denoiser the
    very gradient. (Hamiltonian methods stay exact with any gradient field, since values decide what is accepted.) With
    `score_gradient=False` the solver is differentiated instead, and parameters of the model get gradients too.

    Args:
        denoiser: the model, for one example.
        sigma_min: noise level of the distribution, positive.
        sigma_max: noise level at which draws start.
        event_shape: shape of one example; needed where the denoiser does not tell.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        cond: condition of the model.
        score_gradient: take the gradient by the value from the score.
        validate_args: as for every numpyro distribution.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> prior = gk.diffusion.FlowDistribution(denoiser, 0.01, 50.0)
        >>> prior.event_shape, round(float(prior.log_prob(jnp.ones(2))), 2)
        ((2,), -2.84)
    """

    # numpyro checks parameters against these; a model has none that could be checked.
    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("denoiser", "sigma_min", "sigma_max", "rtol", "atol", "cond")
    pytree_aux_fields = ("score_gradient",)

    def __init__(
        self,
        denoiser: Callable,
        sigma_min: Float[ArrayLike, ""] | float,
        sigma_max: Float[ArrayLike, ""] | float,
        *,
        event_shape: tuple[int, ...] | None = None,
        rtol: Float[ArrayLike, ""] | float = 1e-5,
        atol: Float[ArrayLike, ""] | float = 1e-5,
        cond: PyTree = None,
        score_gradient: bool = True,
        validate_args: bool | None = None,
    ):
        measure = FlowMeasure(denoiser, sigma_min, sigma_max, event_shape, rtol=rtol, atol=atol, cond=cond)
        self.denoiser = denoiser
        self.cond = cond
        self.score_gradient = bool(score_gradient)
        self.sigma_min = measure.sigma_min
        self.sigma_max = measure.sigma_max
        self.rtol = measure.rtol
        self.atol = measure.atol
        shape = measure.event_shape
        assert shape is not None, "checked by the measure"
        super().__init__(batch_shape=(), event_shape=shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Draw examples `(*sample_shape, *event_shape)`."""
        check_key(key)
        count = math.prod(sample_shape)
        # Folded by index: the first draws stay the same when more are asked for.
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
        values = jax.vmap(lambda k: self._measure.sample(key=k)[0])(keys)
        return values.reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Float[ArrayLike, "..."], intermediates: PyTree = None) -> Float[Array, "..."]:
        """Log-densities `(*batch,)` of examples `(*batch, *event_shape)`."""
        del intermediates
        value = as_number(value)
        rank = value.ndim - len(self.event_shape)
        if rank < 0 or value.shape[rank:] != self.event_shape:
            raise ValueError(f"`value` must be (*, {self.event_shape}); got {describe(value)}.")
        flat = value.reshape(-1, *self.event_shape)
        density = self._measure.log_density
        if self.score_gradient:
            density = self._by_score
        return jax.vmap(density)(flat).reshape(value.shape[:rank])

    @property
    def _measure(self) -> FlowMeasure:
        return FlowMeasure(
            self.denoiser,
            self.sigma_min,
            self.sigma_max,
            self.event_shape,
            rtol=self.rtol,
            atol=self.atol,
            cond=self.cond,
        )

    def _by_score(self, x: Array) -> Array:
        """Log-density, differentiable by `x` through the score alone."""
        measure = self._measure

        # A custom rule, so that neither mode ever differentiates the solver.
        @jax.custom_jvp
        def density(x: Array) -> Array:
            return measure.log_density(x)

        @density.defjvp
        def push(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
            (x,) = primals
            (dx,) = tangents
            score = (self.denoiser(x, self.sigma_min, self.cond) - x) / self.sigma_min**2
            return density(x), jnp.sum(score * dx)

        return density(x)
