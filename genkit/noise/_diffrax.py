"""Fractional noise as a diffrax control."""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from genkit.noise._sampling import fbm


if TYPE_CHECKING:
    import diffrax


def as_path(
    hurst: ArrayLike,
    ts: Float[ArrayLike, " n"],
    *,
    shape: tuple[int, ...] = (),
    kind: str = "I",
    method: str | None = None,
    key: Key[Array, ""],
) -> "diffrax.LinearInterpolation":
    """An exact fractional Brownian path as a `diffrax.AbstractPath`, to drive a `diffrax.ControlTerm`.

    The path is drawn at `ts` and linear between them; take fixed steps on `ts` (a finer step would see a smoother
    path than the true one). The driver of a model, in diffrax's own solvers; variational inference needs the lifted
    form, `genkit.sde.as_terms`.

    Args:
        hurst: Hurst index in (0, 1).
        ts: increasing times, non-negative, shape (n,); B(0) = 0 is added in front if missing.
        shape: shape of the noise; its entries are independent.
        kind: "I" or "II".
        method: as in `fbm`.
        key: typed PRNG key.

    Returns:
        A `diffrax.LinearInterpolation`.

    Raises:
        ValueError: as `fbm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genkit.noise import as_path
        >>> path = as_path(0.7, jnp.linspace(0.0, 1.0, 11), key=jax.random.key(0))
        >>> path.evaluate(0.0, 0.5).shape
        ()
    """
    # Slow to import.
    import diffrax

    size = math.prod(shape)
    paths = jax.vmap(lambda k: fbm(hurst, ts, kind=kind, method=method, key=k))(jr.split(key, size))
    times = jnp.asarray(ts, paths.dtype)
    values = paths.T.reshape(times.shape[0], *shape)
    # An extra node in front is harmless when ts starts at 0.
    start = jnp.where(times[0] > 0, 0.0, times[0] - 1.0)
    times = jnp.concatenate([start[None], times])
    values = jnp.concatenate([jnp.zeros((1, *shape), paths.dtype), values])
    return diffrax.LinearInterpolation(times, values)
