"""Resampling: log-weights in, ancestor indices out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key

from genkit._core._checks import check


def effective_sample_size(log_weights: Float[Array, " k"]) -> Float[Array, ""]:
    r"""Effective number of particles $(\sum_i w_i)^2 / \sum_i w_i^2$, between 1 and `k`.

    Args:
        log_weights: unnormalized log-weights `(k,)`; `-inf` is weight zero.

    Returns:
        A scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.inference import effective_sample_size
        >>> float(effective_sample_size(jnp.log(jnp.array([1.0, 1.0, 0.0]))))
        2.0
    """
    weights = jax.nn.softmax(log_weights)
    return 1 / jnp.sum(weights**2)


def systematic_resample(log_weights: Float[Array, " k"], *, key: Key[Array, ""]) -> Int[Array, " k"]:
    r"""Systematic resampling: ancestors at equally spaced points of the cumulative weights, under one random shift.

    Particle $m$ of normalized weight $W_m$ gets $\lfloor k W_m \rfloor$ or $\lceil k W_m \rceil$ offspring, $k W_m$ on
    average.

    Args:
        log_weights: unnormalized log-weights `(k,)`; `-inf` is weight zero, NaN is not allowed.
        key: typed PRNG key.

    Returns:
        Ancestor indices `(k,)`, ascending.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genkit.inference import systematic_resample
        >>> systematic_resample(jnp.log(jnp.array([0.5, 0.0, 0.5])), key=jax.random.key(0)).tolist()[0]
        0

    Source: Kitagawa, "Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models", 1996.
    """
    k = len(log_weights)
    shift = jax.random.uniform(key, (), log_weights.dtype)
    return _ancestors(_cumulative(log_weights), (shift + jnp.arange(k)) / k)


def conditional_resample(
    log_weights: Float[Array, " k"], kept: Int[ArrayLike, ""], *, key: Key[Array, ""], slot: int = 0
) -> Int[Array, " k"]:
    r"""Systematic resampling given that one slot descends from one particle, as particle Gibbs needs it.

    Let systematic resampling place its comb at a uniform $V$ and its $k - 1$ shifts by $1/k$ (modulo 1), slot `slot`
    taking the point $V$ itself: then every slot has ancestor $m$ with probability $W_m$. This draws the other slots
    from that distribution given that `slot` has ancestor `kept`, by drawing $V$ uniformly within the weight of `kept`.

    Args:
        log_weights: unnormalized log-weights `(k,)`; that of `kept` must not be `-inf`.
        kept: the ancestor of `slot`.
        key: typed PRNG key.
        slot: the slot whose ancestor is kept.

    Returns:
        Ancestor indices `(k,)` with `kept` at `slot`, in cyclic order.

    Raises:
        ValueError: if `slot` is not a slot.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genkit.inference import conditional_resample
        >>> conditional_resample(jnp.zeros(4), 2, key=jax.random.key(0)).tolist()
        [2, 3, 0, 1]

    Source: Chopin and Singh, "On Particle Gibbs Sampling", Bernoulli 2015, section 5.3, in the cyclic form above.
    """
    k = len(log_weights)
    check(0 <= slot < k, "slot", f"a slot from 0 to {k - 1}", slot)
    kept = jnp.asarray(kept)
    cumulative = _cumulative(log_weights)
    start = jnp.where(kept == 0, 0, cumulative[kept - 1])
    point = start + jax.random.uniform(key, (), log_weights.dtype) * (cumulative[kept] - start)
    positions = (point + (jnp.arange(k) - slot) / k) % 1
    # Rounding may push the point over the edge of its particle; that slot is known.
    return _ancestors(cumulative, positions).at[slot].set(kept)


def _cumulative(log_weights: Float[Array, " k"]) -> Float[Array, " k"]:
    """Cumulative normalized weights that end in exactly 1, so that no particle of weight zero is ever chosen."""
    total = jnp.cumsum(jax.nn.softmax(log_weights))
    return total / total[-1]


def _ancestors(cumulative: Float[Array, " k"], positions: Float[Array, " m"]) -> Int[Array, " m"]:
    """The particles at positions in [0, 1) of the cumulative weights."""
    below_one = jnp.minimum(positions, 1 - jnp.finfo(positions.dtype).epsneg)
    return jnp.searchsorted(cumulative, below_one, side="right").astype(jnp.int32)
