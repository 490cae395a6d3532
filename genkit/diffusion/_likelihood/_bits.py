"""Densities of discrete data: dequantization and bits per dimension."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Int, Key

from genkit._core._checks import check_count, check_interval, check_key, check_positive


def bits_per_dim(
    log_prob: Float[ArrayLike, "*n"], dim: int, levels: int, scale: Float[ArrayLike, ""] | float
) -> Float[Array, "*n"]:
    r"""Bits per dimension of discrete data from the log-density of their dequantized form.

    With levels $k = 0, \dots, L - 1$ the model sees $x = scale\,(k + u)/L + shift$, $u$ uniform on [0, 1), and
    $-\log_2 P(k) \le -\log_2 p(x) / d + \log_2(L / scale)$ on average over $u$.

    Args:
        log_prob: log-densities of dequantized examples, in nats.
        dim: number of coordinates of one example.
        levels: number of discrete levels $L$.
        scale: width of the interval that the levels fill: 1 for [0, 1], 2 for [-1, 1].

    Returns:
        Bits per dimension, of the shape of `log_prob`.

    Raises:
        ValueError: for counts that are not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> float(gk.diffusion.bits_per_dim(jnp.array(0.0), dim=64, levels=16, scale=1.0))
        4.0

    Source: Theis, van den Oord and Bethge, "A Note on the Evaluation of Generative Models", ICLR 2016, section 3.1.
    """
    check_count("dim", dim)
    check_count("levels", levels)
    check_positive("scale", scale)
    return -jnp.asarray(log_prob) / (dim * jnp.log(2.0)) + jnp.log2(levels / jnp.asarray(scale))


def dequantize(
    ink: Int[ArrayLike, " *shape"], levels: int, scale: float = 1.0, shift: float = 0.0, *, key: Key[Array, ""]
) -> Float[Array, " *shape"]:
    """Spread discrete levels uniformly: `scale * (ink + u) / levels + shift` with `u` uniform on [0, 1).

    Args:
        ink: integer levels from 0 to `levels - 1`.
        levels: number of levels.
        scale: width of the interval that they fill.
        shift: its lower end.
        key: typed PRNG key.

    Returns:
        Continuous data, whose log-density `bits_per_dim` turns into bits.

    Raises:
        ValueError: for levels out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> x = gk.diffusion.dequantize(jnp.array([0, 3]), 4, key=jax.random.key(0))
        >>> (x * 4).astype(int).tolist()
        [0, 3]
    """
    check_key(key)
    check_count("levels", levels)
    check_interval("ink", ink, 0, levels - 1)
    ink = jnp.asarray(ink)
    return scale * (ink + jr.uniform(key, ink.shape)) / levels + shift
