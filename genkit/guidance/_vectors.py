"""Inner products and norms of examples, in at least single precision and with finite gradients at zero."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def inner(a: Float[Array, " *shape"], b: Float[Array, " *shape"]) -> Float[Array, ""]:
    """Inner product over all axes."""
    # A sum over many entries in bfloat16 keeps two digits.
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(wide) * b.astype(wide))


def norm(a: Float[Array, " *shape"]) -> Float[Array, ""]:
    """Euclidean norm over all axes; its gradient at zero is zero."""
    square = inner(a, a)
    # The inner `where` keeps the root away from zero, where its derivative is infinite: times the zero that the outer
    # one hands back that would be NaN.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def ratio(
    numerator: Float[Array, ""], denominator: Float[Array, ""], otherwise: Float[ArrayLike, ""] | float
) -> Float[Array, ""]:
    """The quotient where the denominator is positive, else another value; gradients are finite in both cases."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), otherwise)


def shrink(a: Float[Array, " *shape"], radius: Float[Array, ""]) -> Float[Array, " *shape"]:
    """`a` where it is no longer than `radius`, else of that length."""
    size = norm(a)
    is_longer = size > radius
    return jnp.where(is_longer, a * (radius / jnp.where(is_longer, size, 1)).astype(a.dtype), a)


def cosine(a: Float[Array, " *shape"], b: Float[Array, " *shape"]) -> Float[Array, ""]:
    """Cosine of the angle between `a` and `b`; 1 where both are zero, 0 where one is."""
    both_zero = (norm(a) == 0) & (norm(b) == 0)
    return ratio(inner(a, b), norm(a) * norm(b), jnp.where(both_zero, 1.0, 0.0))
