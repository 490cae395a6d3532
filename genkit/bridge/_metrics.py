"""Distances of a fitted bridge from a known one; conditionals in closed form, no sampling of end points."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Key, Shaped

from genkit._core._checks import check_count, check_finite, check_key, check_shape
from genkit.bridge._bridge import Bridge
from genkit.bridge._gaussian import symmetric_function
from genkit.bridge._inputs import as_floats, check_sample
from genkit.bridge._potential import MixturePotential


def bw2_uvp(
    mean: Shaped[ArrayLike, " d"],
    cov: Shaped[ArrayLike, " d d"],
    true_mean: Shaped[ArrayLike, " d"],
    true_cov: Shaped[ArrayLike, " d d"],
    variance: Float[ArrayLike, ""],
) -> Float[Array, ""]:
    r"""Squared Bures-Wasserstein distance of two Gaussians in percent of the variance.

    $100\,\big(|m-m'|^2 + \operatorname{tr}(A + B - 2 (A^{1/2} B A^{1/2})^{1/2})\big) / \mathrm{Var}$.

    Args:
        mean: mean, shape (d,).
        cov: covariance, shape (d, d).
        true_mean: true mean, shape (d,).
        true_cov: true covariance, shape (d, d).
        variance: the total variance (trace) that counts as 100 percent.

    Returns:
        A scalar in percent.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> print(gk.bridge.bw2_uvp(jnp.ones(2), jnp.eye(2), jnp.zeros(2), jnp.eye(2), 2.0))
        100.0

    Source: Gushchin et al., "Building the bridge of Schrödinger", NeurIPS 2023, section 5.
    """
    check_finite("mean", mean)
    check_finite("cov", cov)
    check_finite("true_mean", true_mean)
    check_finite("true_cov", true_cov)
    mean, cov, true_mean, true_cov = as_floats(mean, cov, true_mean, true_cov)
    # Rounding may make an eigenvalue of a semi-definite matrix negative.
    root = symmetric_function(lambda s: jnp.sqrt(jnp.maximum(s, 0.0)), cov)
    cross = jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(root @ true_cov @ root), 0.0)))
    distance = jnp.sum((mean - true_mean) ** 2) + jnp.trace(cov) + jnp.trace(true_cov) - 2.0 * cross
    # Equal Gaussians may come out a rounding below zero.
    return 100.0 * jnp.maximum(distance, 0.0) / variance


def conditional_moments(
    potential: MixturePotential, x: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, " d d"]]:
    """Mean and covariance of X1 given X0 = x.

    Args:
        potential: the potential.
        x: a point, shape (d,).

    Returns:
        Mean (d,) and covariance (d, d).
    """
    logits, means = potential.endpoint(x, 0.0)
    weights = jax.nn.softmax(logits)
    mean = weights @ means
    residual = means - mean
    within = potential.epsilon * jnp.einsum("k,kde->de", weights, potential.scale.dense(potential.dim))
    return mean, within + (weights[:, None] * residual).T @ residual


def cbw2_uvp(
    bridge: Bridge, truth: Bridge, x0: Shaped[ArrayLike, " n d"], x1: Shaped[ArrayLike, " m d"]
) -> Float[Array, ""]:
    """cBW2-UVP: `bw2_uvp` between the conditional distributions of X1 given x0, averaged over x0; both in closed form.

    Args:
        bridge: the bridge under test.
        truth: the true bridge.
        x0: points of the source, shape (n, d).
        x1: points of the target, for its variance, shape (m, d).

    Returns:
        A scalar in percent.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> x = jax.random.normal(jax.random.key(0), (50, 2))
        >>> bool(gk.bridge.cbw2_uvp(bridge, bridge, x, x + 1.0) < 1e-3)
        True

    Source: Gushchin et al., "Building the bridge of Schrödinger", NeurIPS 2023, section 5.
    """
    check_sample("x0", x0, bridge.dim)
    check_sample("x1", x1, bridge.dim)
    return _cbw2_uvp(bridge, truth, *as_floats(x0, x1))


@eqx.filter_jit
def _cbw2_uvp(bridge: Bridge, truth: Bridge, x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> Float[Array, ""]:
    """The mean over starting points, compiled."""
    # In percent of the target, so that figures of different data compare.
    variance = jnp.sum(jnp.var(x1, 0))

    def one(x: Float[Array, " d"]) -> Float[Array, ""]:
        ours = conditional_moments(bridge.potential, x)
        theirs = conditional_moments(truth.potential, x)
        return bw2_uvp(*ours, *theirs, variance)

    return jnp.mean(jax.lax.map(one, x0, batch_size=64))


def plan_kl(
    truth: Bridge, bridge: Bridge, x0: Shaped[ArrayLike, " n d"], x1: Shaped[ArrayLike, " n d"]
) -> Float[Array, ""]:
    """KL(truth || bridge) of the two plans, and so of the two path distributions, from pairs of the true plan.

    Args:
        truth: the bridge that drew the pairs.
        bridge: the bridge under test.
        x0: starting points, shape (n, d).
        x1: their end points, shape (n, d).

    Returns:
        The mean log-ratio of the plans, in nats. Exchange the bridges and draw pairs of the other for the reverse one.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> x = jax.random.normal(jax.random.key(0), (50, 2))
        >>> print(gk.bridge.plan_kl(bridge, bridge, x, x + 1.0))
        0.0
    """
    check_sample("x0", x0, truth.dim)
    check_sample("x1", x1, truth.dim)
    check_shape("x1", x1, jnp.shape(x0))
    return _plan_kl(truth, bridge, *as_floats(x0, x1))


@eqx.filter_jit
def _plan_kl(truth: Bridge, bridge: Bridge, x0: Float[Array, " n d"], x1: Float[Array, " n d"]) -> Float[Array, ""]:
    """The mean log-ratio of the plans, compiled."""

    def log_plan(bridge: Bridge) -> Float[Array, " n"]:
        return bridge.potential.log_value(x1, 1.0) - bridge.potential.log_value(x0, 0.0)

    return jnp.mean(log_plan(truth) - log_plan(bridge))


def path_kl(
    truth: Bridge,
    bridge: Bridge,
    x0: Shaped[ArrayLike, " n d"],
    *,
    num_times: int = 32,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    r"""KL of the distributions of paths, as an energy of drifts along true paths.

    $\frac{1}{2\epsilon}\int_0^1 E|g^* - g|^2 dt$.

    Equal in expectation to `plan_kl`: their agreement tests both. Exchange the bridges for the reverse divergence.

    Args:
        truth: the bridge whose paths are followed.
        bridge: the bridge under test.
        x0: starting points, shape (n, d).
        num_times: strata of the time integral; each path has one random time in each.
        key: typed PRNG key.

    Returns:
        A scalar in nats.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> x0 = jax.random.normal(jax.random.key(0), (50, 2))
        >>> print(gk.bridge.path_kl(bridge, bridge, x0, key=jax.random.key(1)))
        0.0
    """
    check_key(key)
    check_count("num_times", num_times)
    check_sample("x0", x0, truth.dim)
    return _path_kl(truth, bridge, as_floats(x0)[0], num_times, key)


@eqx.filter_jit
def _path_kl(
    truth: Bridge, bridge: Bridge, x0: Float[Array, " n d"], num_times: int, key: Key[Array, ""]
) -> Float[Array, ""]:
    """The Monte Carlo estimate of `path_kl`, compiled."""
    key_time, key_path = jr.split(key)
    # One time in each stratum: a time integral by as many independent times would be noisier.
    jitter = jr.uniform(key_time, (num_times,), x0.dtype)
    ts = (jnp.arange(num_times, dtype=x0.dtype) + jitter) / num_times
    xs = truth.sample(x0, ts, key=key_path)
    gap = truth.drift(ts, xs) - bridge.drift(ts, xs)
    return jnp.mean(jnp.sum(gap**2, -1)) / (2.0 * truth.epsilon)
