"""Exact evidence of the process itself, as a Gaussian process."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genkit._core._checks import check, check_choice, check_interval, is_concrete
from genkit.noise import fbm_covariance, fou_covariance
from genkit.sde._affine import check_affine_law
from genkit.sde._model import LearnedHurst
from genkit.sde._observed import Observed, gaussian_parts, normal_parts


def gp_log_evidence(
    hurst: ArrayLike | LearnedHurst,
    observed: Observed,
    *,
    theta: ArrayLike = 0.0,
    sigma: ArrayLike = 1.0,
    kind: str = "I",
) -> Float[Array, ""]:
    r"""Exact log-evidence of fractional Brownian motion, or of $dX=-\theta X\,dt+\sigma\,dB_H$, started at 0.

    No lift is involved: the covariance of the process itself is factorized, O(n^3). All coordinates are independent.
    Of known numbers it is computed in float64. Inside jit and derivatives it is in the precision that is set, and
    float32 does not suffice for hundreds of points of a smooth process: set `jax_enable_x64` there, or take `kalman`.

    Args:
        hurst: Hurst index in (0, 1), scalar or (d,), or a `LearnedHurst`.
        observed: observations with a normal distribution given the state, affine in it.
        theta: mean reversion rate, scalar or (d,); 0 is fractional Brownian motion.
        sigma: noise scale, scalar or (d,).
        kind: "I" or "II".

    Returns:
        The log-evidence, a scalar; differentiable. NaN inside jit for a likelihood that is not affine in the state.

    Raises:
        ValueError: if `hurst` is outside (0, 1), `kind` unknown, or the likelihood not normal.

    Example:
        >>> import jax.numpy as jnp, genkit.sde as gs
        >>> observed = gs.Observed(jnp.array([1.0]), jnp.array([0.0]), gs.GaussianNoise(1.0))
        >>> float(gs.gp_log_evidence(0.7, observed))
        -1.2655...

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equation 2.30, with the
    covariances of `genkit.noise`.
    """
    check_choice("kind", kind, ("I", "II"))
    hurst = hurst.value if isinstance(hurst, LearnedHurst) else hurst
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    law = gaussian_parts(observed.likelihood, jnp.zeros(observed.y[0].size, observed.y.dtype))
    check(law is not None, "likelihood", "normal given the state for gp_log_evidence", "another law")
    dtype = jnp.result_type(float, jnp.asarray(sigma), observed.y)
    size = jnp.max(jnp.asarray(sigma, dtype)) * jnp.max(jnp.asarray(observed.ts, dtype)[-1] ** jnp.asarray(hurst))
    dim = max(jnp.size(hurst), jnp.size(theta), jnp.size(sigma), observed.y[0].size)
    affine = check_affine_law(observed, size.astype(dtype), dim)
    plain = is_concrete(theta) and not np.any(np.asarray(theta))
    known = (hurst, observed, None if plain else theta, sigma)
    if all(is_concrete(leaf) for leaf in jax.tree.leaves(known) if eqx.is_array(leaf)):
        with jax.enable_x64(True):
            wide = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
            hurst, observed, theta, sigma = jax.tree.map(wide, known)
            value = _gp(hurst, observed, theta, sigma, kind)
        return jnp.asarray(np.asarray(value), dtype)
    return jnp.where(affine, _gp(*known, kind), jnp.nan)


@eqx.filter_jit
def _gp(hurst: Any, observed: Observed, theta: Any, sigma: Any, kind: str) -> Array:
    y = observed.filled()
    plain, theta = theta is None, 0.0 if theta is None else theta
    dtype = jnp.result_type(float, jnp.asarray(hurst), jnp.asarray(theta), jnp.asarray(sigma), y)
    n = y.shape[0]
    d = max(jnp.size(hurst), jnp.size(theta), jnp.size(sigma), y[0].size)
    root, matrix, offset = normal_parts(observed.likelihood, jnp.zeros(d, dtype))
    ts = jnp.asarray(observed.ts, dtype)

    def kernel(hurst: Array, theta: Array, sigma: Array) -> Array:
        if plain:
            return sigma**2 * fbm_covariance(hurst, ts[:, None], ts[None, :], kind)
        return fou_covariance(hurst, ts[:, None], ts[None, :], theta, sigma, kind)

    values = [jnp.broadcast_to(jnp.asarray(v, dtype), (d,)) for v in (hurst, theta, sigma)]
    kernels = jnp.stack([kernel(*(v[i] for v in values)) for i in range(d)])
    rows = root @ matrix  # (q, d), whitened
    q = rows.shape[0]
    cov = jnp.einsum("ai,inm,bi->namb", rows, kernels, rows).reshape(n * q, n * q) + jnp.eye(n * q, dtype=dtype)
    target = jnp.einsum("ab,nb->na", root, y.reshape(n, -1) - offset).reshape(-1)
    keep = jnp.repeat(jnp.asarray(observed.mask), q)
    cov = jnp.where(keep[:, None] & keep[None, :], cov, jnp.eye(n * q, dtype=dtype))
    factor = jnp.linalg.cholesky(cov)
    white = jax.scipy.linalg.solve_triangular(factor, jnp.where(keep, target, 0.0), lower=True)
    constant = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(root)))) - q / 2 * jnp.log(2 * jnp.pi)
    count = jnp.sum(jnp.asarray(observed.mask))
    return count * constant - jnp.sum(white**2) / 2 - jnp.sum(jnp.log(jnp.diagonal(factor)))
