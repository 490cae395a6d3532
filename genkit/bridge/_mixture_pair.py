"""Pairs of distributions between which the bridge is known, as ground truth for solvers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, Real, Shaped

from genkit._core._checks import check_count, check_finite, check_key, check_positive, check_shape, fail, is_concrete
from genkit.bridge._bridge import Bridge
from genkit.bridge._inputs import as_floats, check_covariance, check_epsilon
from genkit.bridge._potential import MixturePotential
from genkit.bridge._scales import Time, full_from_dense


# Weights (k,), means (k, d) and covariances (k, d, d) of a Gaussian mixture.
Mixture = tuple[Float[Array, " _"], Float[Array, " _ _"], Float[Array, " _ _ _"]]
# The same as users give it: covariances may be diagonals (k, d).
MixtureLike = tuple[Shaped[ArrayLike, " _"], Shaped[ArrayLike, " _ _"], Shaped[ArrayLike, " _ ..."]]


class MixturePair(eqx.Module):
    """A pair of distributions whose plan, bridge and marginals are all known: ground truth for solvers.

    Args:
        source: weights (I,), means (I, d) and covariances (I, d, d) of hatphi at t = 0.
        target: weights (J,), means (J, d) and covariances (J, d, d) of phi at t = 1.
        bridge: the Schrödinger bridge between the two end distributions.

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
        """The distribution of X_t: a mixture of I J Gaussians.

        Args:
            t: time in [0, 1].

        Returns:
            A numpyro mixture, event shape (d,).
        """
        logits, means, covs = product_of_potentials(self.source, self.target, self.bridge.epsilon, t)
        flat = (-1, means.shape[-1])
        components = dist.MultivariateNormal(means.reshape(flat), covs.reshape(-1, *covs.shape[-2:]))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits.ravel()), components)

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


def product_of_potentials(
    source: Mixture, target: Mixture, epsilon: Float[Array, ""], t: Time
) -> tuple[Float[Array, " i j"], Float[Array, " i j d"], Float[Array, " i j d d"]]:
    """Logits (unnormalized), means and covariances of the I x J products of the two potentials at time t."""
    u, m, a = source
    w, n, b = target
    eye = epsilon * jnp.eye(m.shape[-1], dtype=m.dtype)
    a = a[:, None] + t * eye
    b = b[None] + (1.0 - t) * eye
    # Batch shape (i, j).
    total = dist.MultivariateNormal(n[None], a + b)
    logits = jnp.log(u)[:, None] + jnp.log(w) + total.log_prob(m[:, None])
    gain = jax.scipy.linalg.cho_solve((total.scale_tril, True), jnp.broadcast_to(a, total.scale_tril.shape)).mT
    means = m[:, None] + jnp.einsum("ijde,ije->ijd", gain, n[None] - m[:, None])
    covs = gain @ jnp.broadcast_to(b, gain.shape)
    return logits, means, 0.5 * (covs + covs.mT)


def mixture_pair(
    source: MixtureLike,
    target: MixtureLike,
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
    source = _components("source", source)
    target = _components("target", target)
    check_shape("target", target[1], (None, source[1].shape[1]), "Both ends live in one space.")
    u, m, a, w, n, b = as_floats(*source, *target)
    return _assemble((u, m, a), (w, n, b), jnp.asarray(epsilon, u.dtype))


# Compiled whole: called one operation at a time these two take seconds, nearly all of it compiling.
@eqx.filter_jit
def _assemble(source: Mixture, target: Mixture, epsilon: Float[Array, ""]) -> MixturePair:
    """The pair of two checked mixtures."""
    forward = _potential(*target, epsilon)
    backward = _potential(*source, epsilon)
    log_z = jax.nn.logsumexp(product_of_potentials(source, target, epsilon, 0.0)[0])
    return MixturePair(source, target, Bridge(forward, backward=backward.shifted(-log_z)))


@eqx.filter_jit
def _draw_pairs(pair: MixturePair, n: int, key: Key[Array, ""]) -> tuple[Array, Array]:
    """Start points from the source, and end points from the coupling given each."""
    key_source, key_end = jax.random.split(key)
    x0 = pair.marginal(0.0).sample(key_source, (n,))
    keys = jax.random.split(key_end, n)
    x1 = jax.vmap(lambda x, key: pair.bridge.potential.sample_endpoint(x, 0.0, key=key))(x0, keys)
    return x0, x1


def _components(name: str, parts: MixtureLike) -> Mixture:
    """Checked (weights, means, covs) with full covariances."""
    if not isinstance(parts, (tuple, list)) or len(parts) != 3:
        fail(name, "a triple (weights, means, covs)", f"{type(parts).__name__}")
    weights, means, covs = parts
    check_shape(f"{name} means", means, (None, None), "One row per component.")
    count, dim = np.shape(means)
    check_shape(f"{name} weights", weights, (count,), "One weight per component.")
    if is_concrete(weights):
        # By NumPy: a sum by JAX would be a tracer inside a trace, known weights or not.
        known = np.asarray(weights, np.float64)
        if not (known > 0).all():
            fail(f"{name} weights", "positive", f"smallest {known.min():.3g}")
        if abs(known.sum() - 1.0) >= 1e-4:
            fail(f"{name} weights", "weights that sum to one", f"a sum of {known.sum():.6g}")
    check_finite(f"{name} means", means)
    weights, means, matrices = as_floats(weights, means, covs)
    if matrices.shape == (count, dim):
        check_positive(f"{name} covs", covs)
        check_finite(f"{name} covs", covs)
        return weights, means, matrices[..., None] * jnp.eye(dim, dtype=matrices.dtype)
    check_shape(f"{name} covs", matrices, (count, dim, dim), "One covariance per component, full or its diagonal.")
    return weights, means, check_covariance(f"{name} covs", covs, dim)


def _potential(
    weights: Float[Array, " k"], means: Float[Array, " k d"], covs: Float[Array, " k d d"], epsilon: Float[Array, ""]
) -> MixturePotential:
    """sum_j w_j N(y | n_j, B_j) at t = 1 as a `MixturePotential` whose `log_value` is its very logarithm."""
    dim = means.shape[-1]
    center = jnp.einsum("k,kd->d", weights / jnp.sum(weights), means)
    z = means - center
    values, vectors = jnp.linalg.eigh(covs)
    total = values + epsilon
    scale = full_from_dense((vectors * (values / total)[:, None, :]) @ vectors.mT)
    inverse_z = jnp.einsum("kde,ke->kd", vectors, jnp.einsum("kde,kd->ke", vectors, z) / total)
    log_weights = (
        jnp.log(weights)
        - 0.5 * jnp.sum(jnp.log(total), -1)
        - 0.5 * jnp.sum(z * inverse_z, -1)
        - 0.5 * dim * jnp.log(2.0 * jnp.pi)
    )
    return MixturePotential(log_weights, epsilon * inverse_z, scale, epsilon, center)
