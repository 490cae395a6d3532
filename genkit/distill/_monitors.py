"""Monitors of a distillation: the divergence from scores alone, and which modes are covered."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree, Shaped

from genkit._core._checks import (
    check,
    check_count,
    check_finite,
    check_interval,
    check_positive,
    check_shape,
    fail,
)
from genkit._core._known import float_dtype
from genkit.divergence import FDivergence, ReverseKL


def _checked_samples(samples: Shaped[ArrayLike, " n *shape"]) -> Float[Array, " n *shape"]:
    """Samples as floats; refuse none at all, and known ones that are not finite."""
    check(jnp.ndim(samples) > 0 and jnp.shape(samples)[0] > 0, "samples", "of shape (n, ...), n at least 1", samples)
    check_finite("samples", samples)
    return jnp.asarray(samples, float_dtype(samples))


def divergence_from_scores(
    p: Callable[..., Array],
    q: Callable[..., Array],
    samples: Shaped[ArrayLike, " n *shape"],
    *,
    sigma_min: float,
    sigma_max: float,
    key: Key[Array, ""],
    divergence: FDivergence | None = None,
    log_ratio: Callable[..., Array] | None = None,
    num_nodes: int = 24,
    cond: PyTree = None,
) -> Float[Array, ""]:
    r"""A divergence from two denoisers, by de Bruijn's identity: no density, no discriminator.

    $$D_f(p_{\sigma_0} \| q_{\sigma_0}) - D_f(p_{\sigma_1} \| q_{\sigma_1})
      = \int_{\sigma_0}^{\sigma_1} E_{q_\sigma}\big[h(u)\, |D_p - D_q|^2\big]\, \sigma^{-2}\, d\log\sigma.$$

    Args:
        p: denoiser of the first distribution.
        q: denoiser of the second distribution.
        samples: clean draws of the second distribution `(n, *shape)`.
        sigma_min: lower end of the noise levels, positive.
        sigma_max: upper end; beyond several times the spread of the data nothing is left.
        key: typed PRNG key.
        divergence: default the reverse KL, whose weight is 1.
        log_ratio: `(x, sigma, cond) -> log p/q`, needed by other divergences.
        num_nodes: Gauss-Legendre nodes in log sigma.
        cond: conditions of the samples `(n, ...)`, or `None`.

    Returns:
        The divergence, a scalar.

    Raises:
        ValueError: for a divergence whose weight is not constant without `log_ratio`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> p, q = (gk.diffusion.GaussianDenoiser(jnp.full(1, m), 1.0) for m in (1.0, 0.0))
        >>> x = q.sample(4000, key=jax.random.key(0))
        >>> value = gk.distill.divergence_from_scores(p, q, x, sigma_min=1e-3, sigma_max=100.0, key=jax.random.key(1))
        >>> round(float(value), 3)  # half the squared distance of the means
        0.5

    Source: Barron, "Entropy and the Central Limit Theorem", 1986 (for the relative entropy).
    """
    samples = _checked_samples(samples)
    check_positive("sigma_min", sigma_min)
    check(sigma_max > sigma_min, "sigma_max", f"above `sigma_min` = {sigma_min:g}", sigma_max)
    check_count("num_nodes", num_nodes, 2)
    if divergence is None:
        divergence = ReverseKL()
    weights = np.asarray(divergence.weight(jnp.array([-1.0, 0.0, 1.0])))
    is_constant = bool(np.ptp(weights) < 1e-6 * weights[1])
    if log_ratio is None and not is_constant:
        fail("log_ratio", f"given with {type(divergence).__name__}, whose weight depends on the ratio", "None")
    # The integrand is smooth in the logarithm of the level and falls at both ends.
    nodes, quadrature = np.polynomial.legendre.leggauss(num_nodes)
    span = np.log(sigma_max / sigma_min)
    levels = sigma_min * np.exp(span * (nodes + 1) / 2)

    @jax.jit
    def total(samples: Array, cond: PyTree, levels: Array) -> Array:
        def one(level: Array, key: Array) -> Array:
            x = samples + level * jr.normal(key, samples.shape, samples.dtype)

            def run(net: Callable[..., Array]) -> Array:
                return jax.vmap(lambda y, c: net(y, level, c))(x, cond)

            gap = jnp.sum(((run(p) - run(q)) / level).reshape(x.shape[0], -1) ** 2, axis=1)
            if log_ratio is None:
                return divergence.weight(jnp.zeros((), x.dtype)) * jnp.mean(gap)
            return jnp.mean(divergence.weight(run(log_ratio)) * gap)

        return jax.lax.map(lambda pair: one(*pair), (levels, jr.split(key, num_nodes)))

    values = total(samples, cond, jnp.asarray(levels, samples.dtype))
    return jnp.sum(jnp.asarray(quadrature * span / 2, samples.dtype) * values)


def mode_coverage(
    samples: Shaped[ArrayLike, " n d"],
    centers: Shaped[ArrayLike, " k d"],
    *,
    radius: float,
    weights: Shaped[ArrayLike, " k"] | None = None,
) -> dict[str, Array]:
    """Which modes of a known mixture samples cover.

    Args:
        samples: samples `(n, d)`.
        centers: centers of the modes `(k, d)`.
        radius: distance within which a sample counts as of a mode, say three standard deviations.
        weights: true share of each mode `(k,)`; default equal shares.

    Returns:
        `mass`, the share of samples nearest to each center `(k,)`; `tv`, the total variation between that and
        `weights`; `covered`, the number of modes that get at least a tenth of their share; `precision`, the share of
        samples within `radius` of a center.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> found = gk.distill.mode_coverage(jnp.zeros((4, 1)), jnp.array([[0.0], [5.0]]), radius=1.0)
        >>> float(found["tv"]), int(found["covered"]), float(found["precision"])
        (0.5, 1, 1.0)
    """
    samples = _checked_samples(samples)
    check_finite("centers", centers)
    centers = jnp.asarray(centers, float_dtype(centers))
    check_positive("radius", radius)
    fits = samples.shape[1:] == centers.shape[1:]
    check(fits, "centers", lambda: f"points of shape {samples.shape[1:]}", centers)
    share = jnp.full(centers.shape[0], 1 / centers.shape[0], centers.dtype)
    if weights is not None:
        check_interval("weights", weights, 0.0)
        share = jnp.asarray(weights, float_dtype(weights))
        check_shape("weights", share, centers.shape[:1])
    distance = jnp.sqrt(jnp.sum((samples[:, None] - centers[None]) ** 2, -1))
    mass = jnp.mean(jax.nn.one_hot(jnp.argmin(distance, 1), centers.shape[0]), axis=0)
    return {
        "mass": mass,
        "tv": 0.5 * jnp.sum(jnp.abs(mass - share)),
        "covered": jnp.sum(mass >= 0.1 * share),
        "precision": jnp.mean((jnp.min(distance, 1) <= radius).astype(samples.dtype)),
    }
