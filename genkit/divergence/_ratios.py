"""Log-ratios as data: normalization within bins, and diagnostics of their reliability."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from genkit._core._checks import check, check_count, check_finite, check_interval, check_shape, fail
from genkit._core._known import float_dtype


def self_normalize(
    u: Shaped[ArrayLike, " n"], bins: Int[ArrayLike, " n"] | None = None, num_bins: int = 1
) -> Float[Array, " n"]:
    r"""Log-ratios shifted so that the mean ratio of every bin is 1.

    At draws of q the identity $E_q[p/q] = 1$ holds at every noise level, so an additive error of the log-ratio (an
    unknown normalizer, a biased discriminator) is repaired by $u_i - \log \frac1{n_b}\sum_{j \in b} e^{u_j}$.

    Args:
        u: log-ratios log p/q at draws of q, `(n,)`.
        bins: bin of each draw, 0 to num_bins - 1, say by noise level; `None` for one bin.
        num_bins: number of bins.

    Returns:
        Normalized log-ratios `(n,)`.

    Raises:
        ValueError: for shapes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> divergence.self_normalize(jnp.array([1.0, 1.0])).tolist()
        [0.0, 0.0]
    """
    check_interval("u", u)
    u = jnp.asarray(u, float_dtype(u))
    check_count("num_bins", num_bins)
    if bins is None:
        return u - jax.nn.logsumexp(u) + jnp.log(u.size)
    bins = jnp.asarray(bins)
    if bins.shape != u.shape:
        fail("bins", f"of shape {u.shape}, as `u`", f"shape {bins.shape}")
    member = bins == jnp.arange(num_bins)[:, None]
    counts = jnp.maximum(jnp.sum(member, 1), 1).astype(u.dtype)
    means = jax.nn.logsumexp(jnp.where(member, u, -jnp.inf), axis=1) - jnp.log(counts)
    return u - means[bins]


def rank_bins(sigma: Float[ArrayLike, " n"], num_bins: int) -> Int[Array, " n"]:
    """Bins of equal size by rank.

    Args:
        sigma: noise levels, or anything to be ranked `(n,)`.
        num_bins: number of bins.

    Returns:
        The bin of each entry, 0 to num_bins - 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> divergence.rank_bins(jnp.array([0.1, 5.0, 0.3, 2.0]), 2).tolist()
        [0, 1, 0, 1]
    """
    check_interval("sigma", sigma)
    sigma = jnp.asarray(sigma)
    check_count("num_bins", num_bins)
    return jnp.argsort(jnp.argsort(sigma)) * num_bins // sigma.shape[0]


def diagnose(
    u: Shaped[ArrayLike, " n"], weights: Shaped[ArrayLike, " n"], clip: Float[ArrayLike, ""] | float = 10.0
) -> dict[str, Float[Array, ""]]:
    r"""Diagnostics of log-ratios at draws of q, and of the weights made of them.

    Args:
        u: log-ratios log p/q at draws of q, `(n,)`.
        weights: the weights h(u) of pathwise gradients, or any non-negative weights `(n,)`.
        clip: bound on the size of a log-ratio.

    Returns:
        `ess`, the effective share $(\sum h)^2 / (n \sum h^2)$ of draws, 1 for equal weights; `clipped`, the share of
        log-ratios beyond the bound; `mean_ratio`, the mean of $e^u$, 1 for true ratios.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> {k: float(v) for k, v in divergence.diagnose(jnp.zeros(4), jnp.ones(4)).items()}
        {'ess': 1.0, 'clipped': 0.0, 'mean_ratio': 1.0}
    """
    check_interval("u", u)
    check_finite("weights", weights)
    check_shape("weights", weights, jnp.shape(u), "One weight for each log-ratio.")
    check(jnp.size(u) > 0, "u", "log-ratios of at least one draw", u)
    u = jnp.asarray(u, float_dtype(u))
    weights = jnp.asarray(weights, float_dtype(weights))
    tiny = jnp.finfo(weights.dtype).tiny
    # Squares of large weights would overflow: they are counted in units of the largest.
    top = jnp.maximum(jnp.max(weights), tiny)
    ess = jnp.sum(weights / top) ** 2 / jnp.maximum(u.size * jnp.sum((weights / top) ** 2), tiny)
    clipped = jnp.mean((jnp.abs(u) > jnp.asarray(clip)).astype(u.dtype))
    return {"ess": ess, "clipped": clipped, "mean_ratio": jnp.mean(jnp.exp(jnp.clip(u, -jnp.inf, 80.0)))}
