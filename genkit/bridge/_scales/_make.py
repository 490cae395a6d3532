"""Covariance families from the matrices themselves."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Real

from genkit._core._checks import fail, is_concrete
from genkit._core._fields import as_number
from genkit.bridge._scales._base import AbstractScale
from genkit.bridge._scales._diagonal import Diag, Iso
from genkit.bridge._scales._full import full_from_dense


def make_scale(scales: AbstractScale | Real[ArrayLike, " ..."]) -> AbstractScale:
    """A covariance family from its values.

    Args:
        scales: shape (K,) isotropic, (K, d) diagonal, (K, d, d) full; a family stays itself.

    Returns:
        The family.

    Raises:
        ValueError: if the values are not positive (definite).

    """
    if isinstance(scales, AbstractScale):
        return scales
    known = None
    if is_concrete(scales):
        # Looked at before JAX sees it: inside a trace a known array would become a tracer.
        known = np.asarray(scales)
    values = as_number(scales)
    if values.ndim not in (1, 2, 3):
        fail("scales", "an AbstractScale or an array of shape (K,), (K, d) or (K, d, d)", values)
    if values.ndim == 3:
        if values.shape[1] != values.shape[2]:
            fail("scales", "square matrices", f"shape {values.shape}")
        return full_from_dense(values)
    if known is not None and not (known > 0).all():
        fail("scales", "positive", f"smallest entry {known.min():.3g}")
    if values.ndim == 1:
        return Iso(jnp.log(values))
    return Diag(jnp.log(values))
