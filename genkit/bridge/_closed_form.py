"""Bridges known in closed form: between Gaussians, from given potentials, from two mixture potentials."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, Real

from genkit._core._checks import check, check_count, check_finite, check_key, check_positive, check_shape, is_concrete

from ._bridge import Bridge
from ._make_scale import eigen_from_dense, make_scale
from ._matrix_scale import Eigen
from ._potential import MixturePotential
from ._scale import AbstractScale, Diag, Time


def check_epsilon(epsilon: Any) -> None:
    """Refuse a concrete epsilon that is not a positive finite scalar."""
    check(np.ndim(epsilon) == 0, "epsilon", "a scalar, the variance of the reference at t = 1", epsilon)
    check_positive("epsilon", epsilon)
    check_finite("epsilon", np.asarray(epsilon) if is_concrete(epsilon) else epsilon)


def check_covariance(name: str, cov: Any, dim: int) -> Float[Array, " *k d d"]:
    """`cov` (one or a stack, diagonal or full) as full matrices; refuse degenerate concrete ones."""
    cov = jnp.asarray(cov)
    check_shape(name, cov, (*cov.shape[:-2], dim, dim), "Covariances are symmetric matrices, one per mean.")
    check_finite(name, cov)
    if is_concrete(cov):
        values = np.asarray(cov, np.float64)
        asymmetry = float(np.abs(values - values.swapaxes(-1, -2)).max())
        check(asymmetry <= 1e-5 * np.abs(values).max(), name, "symmetric", f"an asymmetry of {asymmetry:.3g}")
        eigenvalues = np.linalg.eigvalsh(values)
        smallest = float((eigenvalues[..., 0] / eigenvalues[..., -1]).min())
        floor = 10 * dim * float(jnp.finfo(cov.dtype).eps)
        hint = "Add a small multiple of the identity, or leave out constant and duplicate coordinates."
        check(smallest > floor, name, "positive definite", f"a smallest relative eigenvalue of {smallest:.3g}", hint)
    return cov


def _symmetric(fn, matrix: Float[Array, " *k d d"]) -> Float[Array, " *k d d"]:
    """A function of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * fn(values)[..., None, :]) @ vectors.mT


def riccati(
    cov0: Float[Array, " *#k d d"], cov1: Float[Array, " *#k d d"], epsilon: Float[ArrayLike, ""]
) -> Float[Array, " *#k d d"]:
    r"""The positive solution of $S \Sigma_0 S + \epsilon S = \Sigma_1$: the scale of the bridge between Gaussians.

    Args:
        cov0: covariance at t = 0, shape (..., d, d).
        cov1: covariance at t = 1, shape (..., d, d).
        epsilon: variance of the reference at t = 1.

    Returns:
        S, shape (..., d, d).

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> scale = gk.bridge.riccati(jnp.eye(2), 2.0 * jnp.eye(2), 1.0)  # s^2 + s = 2
        >>> bool(jnp.allclose(scale, jnp.eye(2), atol=1e-5))
        True
    """
    root = _symmetric(jnp.sqrt, cov0)
    unroot = _symmetric(lambda s: 1.0 / jnp.sqrt(s), cov0)
    # sqrt(s + e^2/4) - e/2 without its cancellation at large epsilon.
    half = epsilon / 2.0
    inner = _symmetric(lambda s: s / (jnp.sqrt(jnp.maximum(s, 0.0) + half**2) + half), root @ cov1 @ root)
    scale = unroot @ inner @ unroot
    return 0.5 * (scale + scale.mT)


def gaussian(
    mean0: Float[ArrayLike, " d"],
    cov0: Float[ArrayLike, " _ _"] | Float[ArrayLike, " _"],
    mean1: Float[ArrayLike, " _"],
    cov1: Float[ArrayLike, " _ _"] | Float[ArrayLike, " _"],
    epsilon: Real[ArrayLike, ""],
) -> Bridge:
    r"""The bridge between two Gaussians: one component, no fitting.

    $S \Sigma_0 S + \epsilon S = \Sigma_1$ and $r = \mu_1 - S\mu_0$: then $X_1 \mid x_0 \sim N(r + S x_0, \epsilon S)$.

    Args:
        mean0: mean at t = 0, shape (d,).
        cov0: covariance at t = 0, shape (d, d), or its diagonal, shape (d,).
        mean1: mean at t = 1, shape (d,).
        cov1: covariance at t = 1, shape (d, d), or its diagonal, shape (d,).
        epsilon: variance of the reference at t = 1.

    Returns:
        A bridge that knows its source: marginals, score and reverse need nothing more.

    Raises:
        ValueError: if epsilon is not positive, dimensions differ or a covariance is degenerate.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(1), jnp.ones(1), jnp.zeros(1), jnp.ones(1), 1.0)
        >>> print(round(float(bridge.potential.scale.dense(1)[0, 0, 0]), 6))  # the golden ratio less one
        0.618034

    Source: Bunne, Hsieh, Cuturi, Krause, "The Schrödinger bridge between Gaussian measures has a closed form",
    AISTATS 2023, theorem 1; in the form above, re-derived.
    """
    check_epsilon(epsilon)
    mean0, mean1 = jnp.asarray(mean0), jnp.asarray(mean1)
    check_shape("mean0", mean0, (None,))
    dim = mean0.shape[0]
    check_shape("mean1", mean1, (dim,), "Both ends live in one space.")
    check_finite("mean0", mean0)
    check_finite("mean1", mean1)
    diagonal = np.ndim(cov0) == 1 and np.ndim(cov1) == 1
    covs = []
    for name, cov in (("cov0", cov0), ("cov1", cov1)):
        cov = jnp.asarray(cov)
        if cov.ndim == 1:
            check_shape(name, cov, (dim,), "One variance per coordinate.")
            check_positive(name, cov)
            covs.append(cov if diagonal else jnp.diag(cov))
        else:
            covs.append(check_covariance(name, cov, dim))
    if diagonal:
        covs = [cov[:, None, None] for cov in covs]  # d scalar problems
    epsilon = jnp.asarray(epsilon, mean1.dtype)

    def potential(mean_a, cov_a, mean_b, cov_b):
        scales = riccati(cov_a, cov_b, epsilon)
        # In coordinates centered at the target mean, r = S (mean_b - mean_a).
        if diagonal:
            scales = scales[:, 0, 0]
            shift, scale = scales * (mean_b - mean_a), Diag(jnp.log(scales)[None])
        else:
            shift, scale = scales @ (mean_b - mean_a), eigen_from_dense(scales[None])
        return MixturePotential(jnp.zeros(1, shift.dtype), shift[None], scale, epsilon, mean_b)

    forward = potential(mean0, covs[0], mean1, covs[1])
    backward = potential(mean1, covs[1], mean0, covs[0])
    logdet = jnp.sum(jnp.log(covs[0])) if diagonal else jnp.linalg.slogdet(covs[0])[1]
    peak = -0.5 * (dim * jnp.log(2.0 * jnp.pi) + logdet)
    gauge = peak - forward.log_value(mean0, 0.0) - backward.log_value(mean0, 1.0)
    return Bridge(forward, backward=backward.shifted(gauge))


def light(
    log_weights: Float[ArrayLike, " k"],
    shifts: Float[ArrayLike, " k d"],
    scales: AbstractScale | Float[ArrayLike, " k ..."],
    epsilon: Real[ArrayLike, ""],
) -> Bridge:
    r"""The bridge of a known potential $v(y) = \sum_k e^{\ell_k} N(y \mid r_k, \epsilon S_k)$.

    Args:
        log_weights: $\ell_k$, shape (K,); they need not be normalized.
        shifts: $r_k$, shape (K, d).
        scales: $S_k$ as an `AbstractScale`, or as an array of shape (K,), (K, d) or (K, d, d).
        epsilon: variance of the reference at t = 1.

    Returns:
        A bridge for any starting law.

    Raises:
        ValueError: if shapes differ, epsilon is not positive or a scale is not positive definite.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.light(jnp.zeros(2), jnp.array([[-1.0], [1.0]]), jnp.full(2, 0.5), 0.1)
        >>> print(bridge.coupling(jnp.zeros(1)).mean)
        [0.]

    Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024.
    """
    check_epsilon(epsilon)
    shifts = jnp.asarray(shifts)
    check_shape("shifts", shifts, (None, None), "One row per component.")
    check_shape("log_weights", log_weights, (shifts.shape[0],), "One weight per component.")
    check_finite("log_weights", jnp.asarray(log_weights))
    check_finite("shifts", shifts)
    scale = make_scale(scales)
    check(
        scale.num_components == shifts.shape[0], "scales", f"of {shifts.shape[0]} components", f"{scale.num_components}"
    )
    if isinstance(scale, (Diag, Eigen)):
        check_shape("scales", scale.log_values, shifts.shape, "Scales and shifts share the space.")
    return Bridge(
        MixturePotential(
            jnp.asarray(log_weights, shifts.dtype),
            shifts,
            scale,
            jnp.asarray(epsilon, shifts.dtype),
            jnp.zeros(shifts.shape[1], shifts.dtype),
        )
    )


class MixturePair(eqx.Module):
    """A pair of laws whose plan, bridge and marginals are all known: ground truth for solvers.

    Args:
        source: weights (I,), means (I, d) and covariances (I, d, d) of hatphi at t = 0.
        target: weights (J,), means (J, d) and covariances (J, d, d) of phi at t = 1.
        bridge: the Schrödinger bridge between the two end laws.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> one = (jnp.ones(1), jnp.zeros((1, 2)), jnp.ones((1, 2)))
        >>> pair = gk.bridge.mixture_pair(one, one, 1.0)
        >>> print(pair.marginal(0.5).mean)
        [0. 0.]
    """

    source: tuple[Float[Array, " i"], Float[Array, " i d"], Float[Array, " i d d"]]
    target: tuple[Float[Array, " j"], Float[Array, " j d"], Float[Array, " j d d"]]
    bridge: Bridge

    def marginal(self, t: Time) -> dist.MixtureSameFamily:
        """The law of X_t: a mixture of I J Gaussians.

        Args:
            t: time in [0, 1].

        Returns:
            A numpyro mixture, event shape (d,).
        """
        logits, means, covs = _product(self.source, self.target, self.bridge.epsilon, t)
        flat = (-1, means.shape[-1])
        law = dist.MultivariateNormal(means.reshape(flat), covs.reshape(-1, *covs.shape[-2:]))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits.ravel()), law)

    def sample(self, n: int, *, key: Key[Array, ""]) -> tuple[Float[Array, " n d"], Float[Array, " n d"]]:
        """Draw coupled end points from the plan.

        Args:
            n: number of pairs.
            key: typed PRNG key.

        Returns:
            x0 and x1, each of shape (n, d).
        """
        check_count("n", n)
        check_key(key)
        return _draw_pairs(self, n, key)

    def log_plan(self, x0: Float[ArrayLike, " *#batch d"], x1: Float[ArrayLike, " *#batch d"]) -> Float[Array, " ..."]:
        """The log-density of the plan at (x0, x1).

        Args:
            x0: starting points, shape (..., d).
            x1: end points, shape (..., d).

        Returns:
            Shape (...).
        """
        return self.bridge.marginal_log_prob(0.0, x0) + self.bridge.transition_log_prob(0.0, x0, 1.0, x1)


def _product(source, target, epsilon, t):
    """Logits (unnormalized), means and covariances of the I x J products of the two potentials at time t."""
    (u, m, a), (w, n, b) = source, target
    dim = m.shape[-1]
    eye = epsilon * jnp.eye(dim, dtype=m.dtype)
    a, b = a[:, None] + t * eye, b[None] + (1.0 - t) * eye
    total = dist.MultivariateNormal(n[None], a + b)  # batch (i, j)
    logits = jnp.log(u)[:, None] + jnp.log(w) + total.log_prob(m[:, None])
    gain = jax.scipy.linalg.cho_solve((total.scale_tril, True), jnp.broadcast_to(a, total.scale_tril.shape)).mT
    means = m[:, None] + jnp.einsum("ijde,ije->ijd", gain, n[None] - m[:, None])
    covs = gain @ jnp.broadcast_to(b, gain.shape)
    return logits, means, 0.5 * (covs + covs.mT)


def mixture_pair(
    source: tuple[Float[ArrayLike, " i"], Float[ArrayLike, " i d"], Float[ArrayLike, " i ..."]],
    target: tuple[Float[ArrayLike, " j"], Float[ArrayLike, " j d"], Float[ArrayLike, " j ..."]],
    epsilon: Real[ArrayLike, ""],
) -> MixturePair:
    r"""A pair whose two Schrödinger potentials are Gaussian mixtures, so that everything about it is closed form.

    $p_t = (\hat\varphi * N(0, \epsilon t))\,(\varphi * N(0, \epsilon(1-t))) / Z$ is a mixture of I J Gaussians.

    Args:
        source: hatphi at t = 0 as (weights (I,), means (I, d), covs (I, d, d) or diagonals (I, d)).
        target: phi at t = 1 as (weights (J,), means (J, d), covs (J, d, d) or diagonals (J, d)).
        epsilon: variance of the reference at t = 1.

    Returns:
        The pair, with `.bridge`, `.sample`, `.marginal` and `.log_plan`.

    Raises:
        ValueError: if epsilon is not positive, weights are no probabilities, shapes differ, a covariance is degenerate.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> one = (jnp.ones(1), jnp.zeros((1, 2)), jnp.ones((1, 2)))
        >>> pair = gk.bridge.mixture_pair(one, one, 0.5)
        >>> x0, x1 = pair.sample(4, key=jax.random.key(0))
        >>> pair.log_plan(x0, x1).shape
        (4,)

    Source: the construction follows Gushchin et al., "Building the bridge of Schrödinger", NeurIPS 2023, with a
    mixture on both sides, so that the densities of both ends are known too.
    """
    check_epsilon(epsilon)
    source, target = _components("source", source), _components("target", target)
    check_shape("target", target[1], (None, source[1].shape[1]), "Both ends live in one space.")
    return _assemble(source, target, jnp.asarray(epsilon, source[1].dtype))


# Compiled whole: called one operation at a time these two take seconds, nearly all of it compiling.
@eqx.filter_jit
def _assemble(source: tuple[Array, Array, Array], target: tuple[Array, Array, Array], epsilon: Array) -> MixturePair:
    """The pair of two checked mixtures."""
    forward, backward = _potential(*target, epsilon), _potential(*source, epsilon)
    log_z = jax.nn.logsumexp(_product(source, target, epsilon, 0.0)[0])
    return MixturePair(source, target, Bridge(forward, backward=backward.shifted(-log_z)))


@eqx.filter_jit
def _draw_pairs(pair: MixturePair, n: int, key: Key[Array, ""]) -> tuple[Array, Array]:
    """Start points from the source, and end points from the coupling given each."""
    key_source, key_end = jax.random.split(key)
    x0 = pair.marginal(0.0).sample(key_source, (n,))
    keys = jax.random.split(key_end, n)
    x1 = jax.vmap(lambda x, key: pair.bridge.potential.sample_endpoint(x, 0.0, key=key))(x0, keys)
    return x0, x1


def _components(name: str, parts: Any):
    """Checked (weights, means, covs) with full covariances."""
    check(
        isinstance(parts, (tuple, list)) and len(parts) == 3,
        name,
        "a triple (weights, means, covs)",
        f"{type(parts).__name__}",
    )
    weights, means, covs = (jnp.asarray(part) for part in parts)
    check_shape(f"{name} means", means, (None, None), "One row per component.")
    count, dim = means.shape
    check_shape(f"{name} weights", weights, (count,), "One weight per component.")
    if is_concrete(weights):
        check(bool(jnp.all(weights > 0)), f"{name} weights", "positive", f"smallest {weights.min():.3g}")
        total = float(jnp.sum(weights))
        check(abs(total - 1.0) < 1e-4, f"{name} weights", "weights that sum to one", f"a sum of {total:.6g}")
    check_finite(f"{name} means", means)
    if covs.ndim == 2 and covs.shape == (count, dim):
        covs = covs[..., None] * jnp.eye(dim, dtype=covs.dtype)
    check_shape(f"{name} covs", covs, (count, dim, dim), "One covariance per component, full or its diagonal.")
    return weights, means, check_covariance(f"{name} covs", covs, dim)


def _potential(weights, means, covs, epsilon) -> MixturePotential:
    """sum_j w_j N(y | n_j, B_j) at t = 1 as a `MixturePotential` whose `log_value` is its very logarithm."""
    dim = means.shape[-1]
    center = jnp.einsum("k,kd->d", weights / jnp.sum(weights), means)
    z = means - center
    values, vectors = jnp.linalg.eigh(covs)
    total = values + epsilon
    scale = eigen_from_dense((vectors * (values / total)[:, None, :]) @ vectors.mT)
    inverse_z = jnp.einsum("kde,ke->kd", vectors, jnp.einsum("kde,kd->ke", vectors, z) / total)
    log_weights = (
        jnp.log(weights)
        - 0.5 * jnp.sum(jnp.log(total), -1)
        - 0.5 * jnp.sum(z * inverse_z, -1)
        - 0.5 * dim * jnp.log(2.0 * jnp.pi)
    )
    return MixturePotential(log_weights, epsilon * inverse_z, scale, epsilon, center)
