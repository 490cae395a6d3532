"""Inputs of denoisers in closed form: one noisy example and its noise level."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from genkit._core._checks import check_interval
from genkit._core._fields import as_number


def as_example(x: Inexact[ArrayLike, "..."], shape: tuple[int, ...]) -> Inexact[Array, "..."]:
    """One example as an array, refused where it is of another shape."""
    x = as_number(x)
    if x.shape != shape:
        raise ValueError(f"`x` must be of shape {shape}; got shape {x.shape}.")
    return x


def as_level(sigma: Float[ArrayLike, ""], x: Inexact[Array, "..."]) -> Inexact[Array, ""]:
    """The noise level in the precision of the example; a negative one is refused, where it is known."""
    check_interval("sigma", sigma, 0.0)
    return jnp.asarray(sigma, x.dtype)
