"""Where a light bridge starts: k-means, one Riccati equation per cluster, and weights balanced by a convex solve."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from genkit.bridge._gaussian import riccati
from genkit.bridge._potential import MixturePotential
from genkit.bridge._scales import AbstractScale, Diag, Iso, LowRank, full_from_dense


# Points that the start and the reports look at: enough for means over components, little work.
MAX_POINTS = 4096


def kmeans(
    x: Float[Array, " n d"],
    num_clusters: int,
    *,
    num_iterations: int = 25,
    num_restarts: int = 8,
    key: Key[Array, ""],
) -> Float[Array, " k d"]:
    """Cluster centers by Lloyd's iterations from k-means++ seedings; an empty cluster keeps its center.

    The best of several restarts: two clusters that share a center stay so in any fit that starts from them.
    """

    # By the expanded square, so that n x K x d differences are never stored.
    def squares(centers: Float[Array, " k d"]) -> Float[Array, " n k"]:
        return jnp.sum(x * x, -1)[:, None] - 2.0 * x @ centers.T + jnp.sum(centers * centers, -1)

    def lloyd(_: Array, centers: Float[Array, " k d"]) -> Float[Array, " k d"]:
        member = jax.nn.one_hot(jnp.argmin(squares(centers), 1), num_clusters, dtype=x.dtype)
        count = member.sum(0)[:, None]
        return jnp.where(count > 0, member.T @ x / jnp.maximum(count, 1.0), centers)

    def once(key: Key[Array, ""]) -> tuple[Array, Array]:
        def seed(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            centers, nearest = carry
            # A point that is a center already has distance zero, and must not be drawn again.
            logits = jnp.log(jnp.maximum(nearest, 1e-30))
            center = x[jr.categorical(jr.fold_in(key, i), logits)]
            return centers.at[i].set(center), jnp.minimum(nearest, jnp.sum((x - center) ** 2, -1))

        # The first center is uniform; any distance is below the one of a point that has no center yet.
        far = jnp.full(x.shape[0], jnp.finfo(x.dtype).max / x.shape[0], x.dtype)
        start = (jnp.zeros((num_clusters, x.shape[1]), x.dtype), far)
        centers, _ = jax.lax.fori_loop(0, num_clusters, seed, start)
        centers = jax.lax.fori_loop(0, num_iterations, lloyd, centers)
        return jnp.sum(jnp.min(squares(centers), 1)), centers

    # One after the other: all restarts at once would hold as many distance matrices.
    spread, centers = jax.lax.map(once, jr.split(key, num_restarts))
    return centers[jnp.argmin(spread)]


class _Newton(NamedTuple):
    log_weights: Array
    value: Array
    damping: Array
    error: Array
    step: Array


def balance(
    terms: Float[Array, " n k"], masses: Float[Array, " k"], *, tol: float = 1e-5, max_steps: int = 100
) -> Float[Array, " k"]:
    r"""Weights under which each component carries its mass: the minimum over $\ell$ of a convex function.

    $$F(\ell) = \frac1n \sum_i \operatorname{lse}_k(\ell_k + q_{ik}) - m'\ell,$$

    the semi-discrete dual, by Newton steps with Levenberg's damping.

    Args:
        terms: q, shape (n, K).
        masses: m, shape (K,), summing to one.
        tol: largest sum of absolute mass errors at which to stop.
        max_steps: most Newton steps.

    Returns:
        The weights, shape (K,), their maximum zero.
    """
    n, k = terms.shape

    def value(logits: Float[Array, " k"]) -> Float[Array, ""]:
        return jnp.mean(jax.nn.logsumexp(logits + terms, 1)) - masses @ logits

    def body(state: _Newton) -> _Newton:
        w = jax.nn.softmax(state.log_weights + terms, 1)
        mean = w.mean(0)
        # The ones fix the gauge: a common shift leaves F as it is.
        hessian = jnp.diag(mean) - w.T @ w / n + jnp.ones((k, k), w.dtype) / k
        step = jnp.linalg.solve(hessian + state.damping * jnp.eye(k, dtype=w.dtype), masses - mean)
        # The largest weight stays zero, so that logits never drift to where float32 is coarse.
        trial = state.log_weights + step - jnp.max(state.log_weights + step)
        new = value(trial)
        # Levenberg: a step that makes it worse is not taken, and the next one is shorter.
        good = new <= state.value
        return _Newton(
            jnp.where(good, trial, state.log_weights),
            jnp.where(good, new, state.value),
            jnp.where(good, jnp.maximum(state.damping / 4.0, 1e-7), state.damping * 8.0),
            jnp.abs(masses - mean).sum(),
            state.step + 1,
        )

    # Each component starts level with the others where its own points are: the largest terms are brought to zero.
    start = -jnp.max(terms, 0)
    start = start - jnp.max(start)
    damping = jnp.asarray(1e-2, terms.dtype)
    init = _Newton(start, value(start), damping, jnp.asarray(jnp.inf, terms.dtype), jnp.asarray(0))

    # A damping this large means that rounding permits no step any more.
    def is_unsettled(state: _Newton) -> Array:
        return (state.error > tol) & (state.step < max_steps) & (state.damping < 1e8)

    return jax.lax.while_loop(is_unsettled, body, init).log_weights


def shrunk_covariance(z: Float[Array, " n d"]) -> Float[Array, " d d"]:
    r"""The covariance of centered rows, its correlations drawn to zero by the estimated optimal factor.

    $R \to (1-\lambda) R + \lambda I$ with $\lambda = \sum_{i \ne j} \mathrm{Var}(r_{ij}) / \sum_{i \ne j} r_{ij}^2$:
    next to nothing for many samples, much where there are about as many as dimensions.

    Args:
        z: rows of mean zero, shape (n, d).

    Returns:
        Shape (d, d).

    Source: Schäfer and Strimmer, "A shrinkage approach to large-scale covariance matrix estimation", Statistical
    Applications in Genetics and Molecular Biology 2005, table 1, target D.
    """
    n, d = z.shape
    variance = jnp.sum(z * z, 0) / (n - 1)
    # Constant coordinates have no correlation; the floor keeps them from dividing by zero.
    floor = 1e-5 * jnp.mean(variance)
    std = jnp.sqrt(variance + floor)
    w = z / std
    mean = w.T @ w / n
    spread = jnp.maximum((w * w).T @ (w * w) / n - mean**2, 0.0) * n**2 / (n - 1.0) ** 3
    apart = 1.0 - jnp.eye(d, dtype=z.dtype)
    # Uncorrelated samples have a zero below the fraction too.
    factor = jnp.sum(apart * spread) / jnp.maximum(jnp.sum(apart * mean**2), jnp.finfo(z.dtype).tiny)
    kept = 1.0 - jnp.clip(factor, 0.0, 1.0)
    correlation = jnp.where(apart > 0, kept * mean * n / (n - 1.0), 1.0)
    return std[:, None] * correlation * std


def _clusters(
    x1: Float[Array, " n d"], centers: Float[Array, " k d"]
) -> tuple[Float[Array, " k"], Float[Array, " k d d"]]:
    """Masses and shrunken covariances of the clusters."""
    k, d = centers.shape
    nearest = jnp.argmin(jnp.sum(centers**2, -1) - 2.0 * x1 @ centers.T, 1)
    member = jax.nn.one_hot(nearest, k, dtype=x1.dtype)
    count = member.sum(0)
    # From the centers, not the means of the clusters: the two agree where Lloyd has converged.
    residual = x1 - centers[nearest]
    scatter = jnp.einsum("nk,nd,ne->kde", member, residual, residual, optimize="optimal")
    # As many pseudo-observations of the pooled covariance as make a cluster of any size well conditioned.
    prior = d + 2.0
    floor = 1e-5 * jnp.trace(jnp.cov(x1.T).reshape(d, d)) / d * jnp.eye(d, dtype=x1.dtype)
    covs = (scatter + prior * shrunk_covariance(residual)) / (count + prior)[:, None, None] + floor
    # Half a point for each: an empty cluster must not start with a weight of minus infinity.
    return (count + 0.5) / (count + 0.5).sum(), covs


def _family(kind: str, matrices: Float[Array, " k d d"], rank: int) -> AbstractScale:
    """The member of a family closest to given matrices."""
    diagonal = jnp.diagonal(matrices, axis1=-2, axis2=-1)
    if kind == "iso":
        return Iso(jnp.log(diagonal.mean(-1)))
    if kind == "diag":
        return Diag(jnp.log(diagonal))
    if kind == "full":
        return full_from_dense(matrices)
    # The factors carry the largest eigenvalues, the diagonal part the mean of the rest.
    values, vectors = jnp.linalg.eigh(matrices)
    rank = min(rank, matrices.shape[-1] - 1)
    rest = values[:, : values.shape[1] - rank].mean(-1)
    # A direction without excess keeps a hundredth of the rest, or its factor would have no gradient.
    top = jnp.sqrt(jnp.maximum(values[:, -rank:] - rest[:, None], 0.01 * rest[:, None]))
    return LowRank(jnp.broadcast_to(jnp.log(rest)[:, None], diagonal.shape), vectors[:, :, -rank:] * top[:, None, :])


@eqx.filter_jit
def balanced_start(
    x0: Float[Array, " n d"],
    x1: Float[Array, " m d"],
    epsilon: Float[Array, ""],
    *,
    num_components: int,
    kind: str,
    rank: int,
    key: Key[Array, ""],
) -> MixturePotential:
    """A potential whose components sit on clusters of the target and share the source according to their masses.

    Args:
        x0: samples of the source, at most `MAX_POINTS` are used, shape (n, d).
        x1: samples of the target, likewise, shape (m, d).
        epsilon: variance of the reference at t = 1.
        num_components: K.
        kind: covariance family.
        rank: columns of the low-rank family.
        key: typed PRNG key.

    Returns:
        The potential, centered at the mean of the target.
    """
    # Centered, because data far from the origin lose their digits in squares.
    center = x1.mean(0)
    z0 = (x0 - center)[:MAX_POINTS]
    z1 = (x1 - center)[:MAX_POINTS]
    d = x1.shape[1]
    centers = kmeans(z1, num_components, key=key)
    masses, covs = _clusters(z1, centers)
    cov0 = shrunk_covariance(z0 - z0.mean(0))
    if kind in ("iso", "diag"):
        # The Riccati equation of each coordinate alone.
        per_axis = riccati(
            jnp.diagonal(cov0)[:, None, None], jnp.diagonal(covs, axis1=-2, axis2=-1)[..., None, None], epsilon
        )[..., 0, 0]
        matrices = per_axis[..., None] * jnp.eye(d, dtype=covs.dtype)
    else:
        matrices = riccati(cov0, covs, epsilon)
    scale = _family(kind, matrices, rank)
    shifts = centers - jnp.einsum("kde,e->kd", matrices, z0.mean(0))
    potential = MixturePotential(jnp.zeros(num_components, x1.dtype), shifts, scale, epsilon, center)
    terms = jax.vmap(lambda x: potential.terms(x, 0.0))(x0[:MAX_POINTS])
    return eqx.tree_at(lambda p: p.log_weights, potential, balance(terms, masses))


@eqx.filter_jit
def published_start(
    x1: Float[Array, " m d"],
    epsilon: Float[Array, ""],
    *,
    num_components: int,
    kind: str,
    rank: int,
    start_scale: Float[Array, ""],
    key: Key[Array, ""],
) -> MixturePotential:
    """The start of the published solver: shifts at random targets, equal weights, one small isotropic scale.

    Args:
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1.
        num_components: K.
        kind: covariance family.
        rank: columns of the low-rank family.
        start_scale: the value of every S_k.
        key: typed PRNG key.

    Returns:
        The potential.
    """
    key_shift, key_factor = jr.split(key)
    d = x1.shape[1]
    shifts = x1[jr.choice(key_shift, x1.shape[0], (num_components,), replace=False)]
    # The published start knows one scale: every family begins at a multiple of the identity.
    eye = jnp.broadcast_to(start_scale * jnp.eye(d, dtype=x1.dtype), (num_components, d, d))
    scale = _family(kind, eye, rank)
    if isinstance(scale, LowRank):
        factors = 0.1 * jnp.sqrt(start_scale) * jr.normal(key_factor, scale.factors.shape, x1.dtype)
        scale = LowRank(scale.log_values, factors)
    log_weights = jnp.full(num_components, -jnp.log(num_components), x1.dtype)
    return MixturePotential(log_weights, shifts, scale, epsilon, jnp.zeros(d, x1.dtype))
