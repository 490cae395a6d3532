"""Denoisers: the only currency of the diffusion wing."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from ._checks import describe


class Denoiser(eqx.Module):
    r"""The posterior mean $D(x, \sigma, c) = E[x_0 \mid x, \sigma, c]$ in the coordinates $x = x_0 + \sigma \varepsilon$, for ONE example.

    Networks of every parameterisation, analytic laws, guided and conditioned denoisers all take this form, so every
    sampler runs every one of them. `genkit.sample` takes any callable pytree of this signature; subclassing adds nothing
    but a name to check against.

    Optional attributes that the drivers use where present: `shape`, the shape of one example (then no shape is needed
    for drawing); `num_labels`, the number of classes (then labels out of range are refused); `noise_range`, the
    least and the largest noise level it knows (then samplers that ask for others are refused; `None` for no limits); and
    a method `log_density(x, sigma, cond=None)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit._core import Denoiser
        >>> class UnitGaussian(Denoiser):
        ...     def __call__(self, x, sigma, cond=None):
        ...         return x / (1 + sigma**2)
        >>> UnitGaussian()(jnp.array([2.0]), jnp.array(1.0)).tolist()
        [1.0]
    """  # noqa: E501

    @abc.abstractmethod
    def __call__(
        self, x: Inexact[Array, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
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


def null_like(cond: Any) -> Any:
    """The condition that says "no condition" as data: `-1` for integers (labels), `NaN` for floating numbers.

    Args:
        cond: a condition: `None`, or a scalar or array of an integer or a floating dtype.

    Returns:
        `None` for `None`, else an array of the shape and dtype of `cond`.

    Raises:
        TypeError: if `cond` is neither integer nor floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit._core import null_like
        >>> null_like(jnp.array(3)).item()
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
