"""A diffusion model as a law: a `Measure`, and a numpyro distribution."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key
from numpyro.distributions import constraints

from genkit._core import Measure
from genkit._core._checks import check, check_key
from genkit._core._fields import as_number

from ._flow import check_likelihood
from ._likelihood import AbstractTrace, ExactTrace, Hutchinson, log_prob, sample_log_prob


class FlowMeasure(Measure):
    r"""The law of the probability flow of a denoiser at `sigma_min`, as a `Measure`.

    It is exact in itself: draws come from centered noise at `sigma_max` (or `terminal`), densities are those of that
    flow. The logarithm of the density is exact up to the solver with `ExactTrace`; with `Hutchinson` only it, not the
    density, is unbiased, so that trace is refused.

    Args:
        denoiser: the model, for one example.
        sigma_min: noise level of the law, positive.
        sigma_max: noise level at which draws start.
        shape: shape of one example; needed where the denoiser does not tell.
        trace: an `ExactTrace`.
        terminal: numpyro law of the state at `sigma_max`, or `None` for centered noise.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        cond: condition, the same for all draws.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> law = gk.diffusion.FlowMeasure(denoiser, 0.01, 50.0)
        >>> value, weight = law.sample(key=jax.random.key(0))
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
    cond: Any = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_likelihood(self.denoiser)
        check(self.event_shape is not None, "shape", "given where the denoiser does not tell it", "None")
        hint = "The exponential of an unbiased logarithm is biased."
        check(not isinstance(self.trace, Hutchinson), "trace", "an ExactTrace", "Hutchinson", hint)

    @property
    def event_shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where it is known."""
        own = getattr(self.denoiser, "shape", None)
        return self.shape if self.shape is not None else None if own is None else tuple(own)

    def sample(self, *, key: Key[Array, ""]) -> tuple[Float[Array, " *shape"], Float[Array, ""]]:
        """Draw one example with its log-density, in one solve."""
        law = self.terminal
        value, found = sample_log_prob(self.denoiser, shape=self.event_shape, terminal=law, key=key, **self._options)
        return value, found.value

    def log_density(self, value: Float[ArrayLike, " *shape"], *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log-density of one example."""
        del key
        law = dist.Normal(0.0, self.sigma_max) if self.terminal is None else self.terminal
        return log_prob(self.denoiser, value, terminal=law, **self._options).value

    @property
    def _options(self) -> dict[str, Any]:
        ends = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return ends | {"trace": self.trace, "rtol": self.rtol, "atol": self.atol, "cond": self.cond}


class FlowDistribution(dist.Distribution):
    r"""The law of the probability flow of a denoiser at `sigma_min`, as a numpyro distribution over one example.

    A diffusion model becomes a prior: `x = numpyro.sample("x", FlowDistribution(denoiser, 0.01, 50.0))`, for NUTS or
    variational inference alike. The gradient by the value, which samplers want at each of their steps, is by default
    the score at `sigma_min`, $(D(x, \sigma_{min}) - x)/\sigma_{min}^2$: one evaluation, and for the exact denoiser the
    very gradient. (Hamiltonian methods stay exact with any gradient field, since values decide what is accepted.) With
    `score_gradient=False` the solver is differentiated instead, and parameters of the model get gradients too.

    Args:
        denoiser: the model, for one example.
        sigma_min: noise level of the law, positive.
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
        cond: Any = None,
        score_gradient: bool = True,
        validate_args: bool | None = None,
    ):
        measure = FlowMeasure(denoiser, sigma_min, sigma_max, event_shape, rtol=rtol, atol=atol, cond=cond)
        self.denoiser, self.cond, self.score_gradient = denoiser, cond, bool(score_gradient)
        self.sigma_min, self.sigma_max = measure.sigma_min, measure.sigma_max
        self.rtol, self.atol = measure.rtol, measure.atol
        shape = measure.event_shape
        assert shape is not None, "checked by the measure"
        super().__init__(batch_shape=(), event_shape=shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        """The support, real numbers over the whole example."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Draw examples `(*sample_shape, *event_shape)`."""
        check_key(key)
        count = 1
        for size in sample_shape:
            count *= size
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
        values = jax.vmap(lambda k: self._measure.sample(key=k)[0])(keys)
        return values.reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Float[ArrayLike, "..."], intermediates: Any = None) -> Float[Array, "..."]:
        """Log-densities `(*batch,)` of examples `(*batch, *event_shape)`."""
        value = as_number(value)
        rank = value.ndim - len(self.event_shape)
        check(rank >= 0 and value.shape[rank:] == self.event_shape, "value", f"(*, {self.event_shape})", value)
        flat = value.reshape(-1, *self.event_shape)
        density = self._by_score if self.score_gradient else self._measure.log_density
        return jax.vmap(density)(flat).reshape(value.shape[:rank])

    @property
    def _measure(self) -> FlowMeasure:
        ends = (self.sigma_min, self.sigma_max, self.event_shape)
        return FlowMeasure(self.denoiser, *ends, rtol=self.rtol, atol=self.atol, cond=self.cond)

    def _by_score(self, x: Array) -> Array:
        """The log-density, differentiable by `x` through the score alone."""
        measure = self._measure

        @jax.custom_jvp
        def density(x: Array) -> Array:
            return measure.log_density(x)

        @density.defjvp
        def push(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
            (x,), (dx,) = primals, tangents
            score = (self.denoiser(x, self.sigma_min, self.cond) - x) / self.sigma_min**2
            return density(x), jnp.sum(score * dx)

        return density(x)
