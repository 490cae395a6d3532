"""Denoisers: what a model must be for samplers, guidance and objectives to run on it."""

import abc
import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact, PyTree

from genkit._core._checks import describe
from genkit._core._fields import fact_of


_DEFAULTS = MappingProxyType(
    {
        "shape": None,
        "num_labels": None,
        "noise_range": None,
        "sigma_data": 1.0,
        "log_density": None,
        "no_likelihood": None,
    }
)


class Denoiser(eqx.Module):
    r"""The posterior mean $D(x, \sigma, c) = E[x_0 \mid x, \sigma, c]$ in the coordinates $x = x_0 + \sigma \varepsilon$, for ONE example.

    Networks of every parameterization, analytic distributions, guided and conditioned denoisers all take this form, so every
    sampler runs every one of them. `genkit.sample` takes any callable pytree of this signature; subclassing adds nothing
    but a name to check against.

    Drivers ask a denoiser for some facts, each with a default here; a subclass overrides what it knows, by a property, a
    field or a method: `shape`, the shape of one example (then no shape is needed for drawing); `num_labels`, the number
    of classes (then labels out of range are refused); `noise_range`, the least and the largest noise level it was made
    for (then samplers that ask for others are refused; `None` for no limits); `sigma_data`, the standard deviation of
    the data; `log_density(x, sigma, cond=None)`, the density of noisy examples; `no_likelihood`, why its probability
    flow is that of no density.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> class UnitGaussian(gk.Denoiser):
        ...     def __call__(self, x, sigma, cond=None):
        ...         return x / (1 + sigma**2)
        >>> UnitGaussian()(jnp.array([2.0]), jnp.array(1.0)).tolist()
        [1.0]
    """  # noqa: E501

    if TYPE_CHECKING:  # the defaults are in `__getattr__`, so that a subclass may keep a fact in a field
        shape: ClassVar[tuple[int, ...] | None]
        num_labels: ClassVar[int | None]
        noise_range: ClassVar[tuple[float, float] | None]
        sigma_data: ClassVar[float]
        log_density: ClassVar[Callable | None]
        no_likelihood: ClassVar[str | None]

    def __getattr__(self, name: str):
        return fact_of(self, _DEFAULTS, name)

    @abc.abstractmethod
    def __call__(
        self, x: Inexact[Array, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """Estimate the clean example from a noisy one.

        Args:
            x: noisy example `x0 + sigma * eps`.
            sigma: noise level, non-negative.
            cond: condition of this example: `None`, a scalar or an array. Integer `-1` and floating `NaN` stand for
                "no condition", so that whether there is one may itself be data.

        Returns:
            The estimate of `x0`, of the shape of `x`.
        """


def null_like(cond: PyTree) -> PyTree:
    """The condition that says "no condition" as data: `-1` for integers (labels), `NaN` for floating numbers.

    Args:
        cond: a condition: `None`, or a scalar or array of an integer or a floating dtype.

    Returns:
        `None` for `None`, else an array of the shape and dtype of `cond`.

    Raises:
        TypeError: if `cond` is neither integer nor floating.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> gk.sampling.null_like(jnp.array(3)).item()
        -1
    """
    if cond is None:
        return None
    cond = jnp.asarray(cond)
    if jnp.issubdtype(cond.dtype, jnp.signedinteger):
        return jnp.full_like(cond, -1)
    if jnp.issubdtype(cond.dtype, jnp.floating):
        return jnp.full_like(cond, jnp.nan)
    raise TypeError(
        f"`cond` must be of a signed integer (labels) or a floating dtype to have a null value; got {describe(cond)}."
    )


_Fact = TypeVar("_Fact")


class AbstractDelegatingDenoiser(Denoiser):
    """A denoiser around another one, whose facts it declares as its own.

    Wrappers derive from it, so that no fact and no condition is lost on the way: guided, measured and teleported
    denoisers, and plain callables. The density is not passed on, for the wrapper's is another one.

    Args:
        denoiser: the model inside: a `Denoiser`, or any callable of its signature.
    """

    denoiser: eqx.AbstractVar[Callable]

    @property
    def shape(self) -> tuple[int, ...] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Shape of one example; `None` where the model does not tell it."""
        shape = self._fact("shape", None)
        if shape is None:
            return None
        return tuple(shape)

    @property
    def num_labels(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of classes; `None` where the model has none."""
        return self._fact("num_labels", None)

    @property
    def noise_range(self) -> tuple[float, float] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Least and largest noise level that the model was made for; `None` for no limits."""
        return self._fact("noise_range", None)

    def _fact(self, name: str, default: _Fact) -> _Fact:
        # The model is often the user's own callable, which has no base class to declare a default in: this is the one
        # place that asks it.
        return getattr(self.denoiser, name, default)


class CallableDenoiser(AbstractDelegatingDenoiser):
    """A plain callable `(x, sigma, cond=None) -> x0` as a denoiser; made by `as_denoiser`.

    Args:
        denoiser: the callable; facts that it has as attributes are its facts.
    """

    denoiser: Callable

    @property
    def sigma_data(self) -> Float[ArrayLike, ""]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Standard deviation of the data."""
        return self._fact("sigma_data", 1.0)

    @property
    def log_density(self) -> Callable | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Log-density of noisy examples, where the callable has one."""
        return self._fact("log_density", None)

    @property
    def no_likelihood(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Reason for which the probability flow is that of no density."""
        return self._fact("no_likelihood", None)

    def __call__(
        self, x: Inexact[Array, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        return self.denoiser(x, sigma, cond)


def check_signature(model: Callable) -> None:
    """Refuse a callable that does not take an example, a level and a condition.

    Args:
        model: what a table is to be drawn with.
    """
    try:
        inspect.signature(model).bind(None, None, None)
    except TypeError as error:
        raise TypeError(
            f"`denoiser` must be a callable (x, sigma, cond=None) -> x0; got {describe(model)}, which does not take "
            f"three arguments ({error}). A function of two becomes one with `lambda x, sigma, cond=None: f(x, sigma)`."
        ) from None
    except ValueError:  # callables written in C may have no signature; the call will tell
        pass


def as_denoiser(model: Callable) -> Denoiser:
    """A denoiser from any callable of its signature; denoisers pass.

    Args:
        model: a `Denoiser`, or a callable `(x, sigma, cond=None) -> x0` for one example. Facts that it has as
            attributes (`shape`, `num_labels`, `noise_range`, ...) are those of the result.

    Returns:
        A denoiser.

    Raises:
        TypeError: if `model` cannot be called.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> half = gk.sampling.as_denoiser(lambda x, sigma, cond=None: x / 2)
        >>> half(jnp.ones(2), 1.0).tolist(), half.num_labels
        ([0.5, 0.5], None)
    """
    if isinstance(model, Denoiser):
        return model
    if not callable(model):
        raise TypeError(
            f"`denoiser` must be a callable (x, sigma, cond=None) -> x0; got {describe(model)}. "
            "A trained model is in `fitted.ema` or `fitted.model`."
        )
    return CallableDenoiser(model)
