"""Covariance families from the matrices themselves."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from genkit._core._checks import check, is_concrete

from ._matrix_scale import Eigen
from ._scale import AbstractScale, Diag, Iso


def eigen_from_dense(matrices: Float[Array, " k d d"]) -> Eigen:
    """The `Eigen` family of given symmetric positive definite matrices.

    Args:
        matrices: shape (K, d, d).

    Returns:
        The family; its eigenvectors agree with those of `matrices` up to signs, which do not matter.

    Raises:
        ValueError: if a concrete matrix is not positive definite.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> matrix = jnp.array([[[2.0, 1.0], [1.0, 2.0]]])
        >>> bool(jnp.allclose(gk.bridge.eigen_from_dense(matrix).dense(2), matrix, atol=1e-5))
        True
    """
    values, vectors = jnp.linalg.eigh(matrices)
    if is_concrete(values):
        check(
            bool(jnp.all(values > 0)),
            "scales",
            "symmetric positive definite",
            f"smallest eigenvalue {values.min():.3g}",
        )
    # LAPACK's raw QR of an orthogonal matrix holds its Householder vectors below the diagonal.
    packed, _ = jnp.linalg.qr(vectors, mode="raw")
    packed = packed.mT
    dim = matrices.shape[-1]
    return Eigen(jnp.log(values), (jnp.tril(packed, -1) + jnp.eye(dim, dtype=packed.dtype)).mT)


def make_scale(scales: AbstractScale | Float[ArrayLike, " ..."]) -> AbstractScale:
    """A covariance family from its values.

    Args:
        scales: shape (K,) isotropic, (K, d) diagonal, (K, d, d) full; a family stays itself.

    Returns:
        The family.

    Raises:
        ValueError: if the values are not positive (definite).

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> type(gk.bridge.make_scale(jnp.ones((3, 2)))).__name__
        'Diag'
    """
    if isinstance(scales, AbstractScale):
        return scales
    values = jnp.asarray(scales)
    check(values.ndim in (1, 2, 3), "scales", "an AbstractScale or an array of shape (K,), (K, d) or (K, d, d)", values)
    if values.ndim == 3:
        check(values.shape[1] == values.shape[2], "scales", "square matrices", f"shape {values.shape}")
        return eigen_from_dense(values)
    if is_concrete(values):
        check(bool(jnp.all(values > 0)), "scales", "positive", f"smallest entry {values.min():.3g}")
    return Iso(jnp.log(values)) if values.ndim == 1 else Diag(jnp.log(values))
