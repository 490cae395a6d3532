"""Wasserstein distances of one-dimensional projections."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, Real, Shaped

from genkit._core._checks import check_count, check_interval, check_key
from genkit.divergence._pairs import as_samples, common_scale


# Numbers of one block of projections.
_BLOCK = 2**22


def sliced_wasserstein(
    x: Shaped[ArrayLike, " n *shape"],
    y: Shaped[ArrayLike, " m *shape"],
    *,
    num_slices: int = 128,
    p: Real[ArrayLike, ""] = 2,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    r"""Sliced Wasserstein distance $\bigl(E_\theta W_p(\theta \cdot X, \theta \cdot Y)^p\bigr)^{1/p}$.

    The mean is over random directions of unit length; along each one the distance is exact, also for samples of
    different sizes: the integral of $|F^{-1}(u) - G^{-1}(u)|^p$ over the common steps of both quantile functions.

    The cost is that of `num_slices` sorts of each sample, taken in blocks: about a third of a second for a slice of two
    samples of a million on a CPU.

    Args:
        x: first sample `(n, *shape)`.
        y: second sample `(m, *shape)`.
        num_slices: number of directions.
        p: order of the distance, at least 1.
        key: typed PRNG key for the directions.

    Returns:
        The distance, a scalar; differentiable in both samples.

    Raises:
        ValueError: for empty samples, shapes that differ, an order below 1.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[2.0], [3.0]])
        >>> float(gk.divergence.sliced_wasserstein(x, y, key=jax.random.key(0)))
        2.0

    Source: Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", Journal of Mathematical Imaging and
    Vision 2015, definition 2.
    """
    check_count("num_slices", num_slices)
    check_interval("p", p, 1.0)
    check_key(key)
    x, y = as_samples(x=x, y=y)
    directions = jr.normal(key, (num_slices, x.shape[1]), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    return _mean_over(directions, x, y, jnp.asarray(p, x.dtype))


@jax.jit
def _mean_over(
    directions: Float[Array, " slices d"], x: Float[Array, " n d"], y: Float[Array, " m d"], order: Float[Array, ""]
) -> Float[Array, ""]:
    """The distance over given directions."""
    widths, rank_x, rank_y = _common_steps(x.shape[0], y.shape[0])
    widths = jnp.asarray(widths, x.dtype)
    scale = common_scale(x, y)
    x = x / scale
    y = y / scale

    def along(direction: Float[Array, " d"]) -> Float[Array, ""]:
        gaps = jnp.abs(jnp.sort(x @ direction)[rank_x] - jnp.sort(y @ direction)[rank_y])
        return jnp.sum(widths * gaps**order)

    at_once = max(1, _BLOCK // (x.shape[0] + y.shape[0]))
    costs = jax.lax.map(jax.checkpoint(along), directions, batch_size=min(at_once, directions.shape[0]))
    total = jnp.mean(costs)
    # A root has no finite slope at zero: equal samples get the gradient zero.
    zero = total == 0
    return scale * jnp.where(zero, 0, jnp.where(zero, 1, total) ** (1 / order))


def _common_steps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Widths of the intervals on which both quantile functions are constant, and the ranks that hold there."""
    # In units of 1 / (n m) every step is an integer, so that equal ones coincide exactly.
    steps = np.union1d(np.arange(n + 1, dtype=np.int64) * m, np.arange(m + 1, dtype=np.int64) * n)
    return np.diff(steps) / (n * m), steps[:-1] // m, steps[:-1] // n
