"""Inner products and norms of examples, in at least single precision and with finite gradients at zero."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def inner(a: Float[Array, " *shape"], b: Float[Array, " *shape"]) -> Float[Array, ""]:
    """Inner product over all axes."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(wide) * b.astype(wide))


def norm(a: Float[Array, " *shape"]) -> Float[Array, ""]:
    """Euclidean norm over all axes; its gradient at zero is zero."""
    square = inner(a, a)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def shrink(a: Float[Array, " *shape"], radius: Float[Array, ""]) -> Float[Array, " *shape"]:
    """`a` where it is no longer than `radius`, else of that length."""
    size = norm(a)
    long = size > radius
    return jnp.where(long, a * (radius / jnp.where(long, size, 1)).astype(a.dtype), a)


def cosine(a: Float[Array, " *shape"], b: Float[Array, " *shape"]) -> Float[Array, ""]:
    """Cosine of the angle between `a` and `b`; 1 where both are zero, 0 where one is."""
    sizes = norm(a) * norm(b)
    both = (norm(a) == 0) & (norm(b) == 0)
    return jnp.where(sizes > 0, inner(a, b) / jnp.where(sizes > 0, sizes, 1), jnp.where(both, 1.0, 0.0))
