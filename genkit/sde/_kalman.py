"""Exact evidence: of the lifted model by a square-root filter, of the process itself as a Gaussian process."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genkit._core._checks import check, check_choice, check_interval, is_concrete
from genkit.noise import fbm_covariance, fou_covariance

from ._filter import Maps, backward, compress, linearise, observation_rows, place_rows, require_gaussian, start_map
from ._grid import Grid, Noises, make_grid, make_table
from ._model import FractionalSDE
from ._observed import Observed, gaussian_parts, normal_parts
from ._step import affine_parts, check_affine, make_driver, make_steps


def kalman(sde: FractionalSDE, observed: Observed, *, steps_per_interval: int | None = None) -> Float[Array, ""]:
    """Log-evidence of the lifted model, exact for affine drift, constant diffusion and normal observations.

    A square-root information filter on the state and its lifted noise, of any stiffness; missing rows are skipped.
    Differentiable in any parameter, twice too and in every mode (`jax.hessian`). It uses exact transitions whatever
    `sde.step` says; coefficients that depend on time, or a varying Hurst index, need `steps_per_interval`, and are then
    integrated to second order.

    Args:
        sde: the model; the law of `x0`, if any, must be normal.
        observed: the observations.
        steps_per_interval: take that many numerical steps per interval instead of an exact one.

    Returns:
        The log-evidence, a scalar.

    Raises:
        ValueError: if drift, diffusion, likelihood or initial law are of another kind, where that can be seen.

    Example:
        >>> import jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(0.0), gs.Constant(1.0), gn.brownian(), hurst=0.5, horizon=1.0)
        >>> observed = gs.Observed(jnp.array([1.0]), jnp.array([0.0]), gs.GaussianNoise(1.0))
        >>> float(gs.kalman(model, observed))  # log N(0 | 0, 2)
        -1.2655...

    Source: backward information filter in square-root (whitened) form, derived for this library; cf. Kailath, Sayed
    and Hassibi, "Linear Estimation", 2000, chapter 12.
    """
    require_gaussian(sde, observed, "kalman")
    known_law = not isinstance(sde.x0, dist.Distribution) or isinstance(sde.x0, dist.Normal)
    check(known_law, "x0", "an array or a numpyro Normal for kalman", type(sde.x0).__name__)
    coupled = False
    if steps_per_interval is None:
        check_affine(sde, uncoupled=False)
        off = affine_parts(sde)[0] * (1 - jnp.eye(sde.dim, dtype=sde.dtype))
        coupled = sde.dim > 1 and (not is_concrete(off) or bool(jnp.any(off != 0)))
    step = "path_mean" if coupled else "exact" if steps_per_interval is None else sde.step
    step = "path_mean" if step == "exact" and steps_per_interval is not None else step
    model = with_step(sde, step)
    grid = make_grid(model, observed.ts, None, steps_per_interval, "observed.ts")
    if coupled:
        # A tiny step, composed with itself that many times, is exact to rounding.
        doublings = 14 if sde.dtype == jnp.float64 else 8
        shrink = lambda v: v / 2**doublings
        grid = dataclasses.replace(grid, h=shrink(grid.h), distinct=shrink(grid.distinct))
    else:
        doublings = 0
    return _evidence(model, observed, grid, make_table(model, grid), doublings)


@eqx.filter_jit
def _evidence(sde: FractionalSDE, observed: Observed, grid: Grid, noises: Noises, doublings: int) -> Array:
    driver = make_driver(sde, grid, noises)
    num, size = grid.num_steps, sde.dim * (1 + driver.gain.shape[1])
    z, eps = jnp.zeros((num, size), sde.dtype), jnp.zeros((num, sde.dim * driver.num_normals), sde.dtype)
    maps = linearise(sde, driver, make_steps(sde, driver, grid), z, eps)
    maps = _doubled(maps, doublings) if doublings else maps
    offset, noise = start_map(sde, driver)
    zeros = jnp.zeros((observed.y.shape[0], sde.dim), sde.dtype)
    rows, constant = observation_rows(sde, observed, zeros, offset.shape[0])
    return backward(maps, *place_rows(rows, jnp.asarray(grid.slots), num), offset, noise).log_evidence + constant


def with_step(sde: FractionalSDE, step: str) -> FractionalSDE:
    """The same model under another kind of step."""
    return sde if sde.step == step else dataclasses.replace(sde, step=step)


def _doubled(maps: Maps, doublings: int) -> Maps:
    """Affine steps composed with themselves 2^doublings times."""

    def double(maps: Maps, _: None) -> tuple[Maps, None]:
        a = maps.transition
        wide = jnp.concatenate([a @ maps.noise, maps.noise], axis=-1)
        noise = jnp.swapaxes(compress(jnp.swapaxes(wide, -1, -2)), -1, -2)
        return Maps(a @ a, (a @ maps.offset[..., None])[..., 0] + maps.offset, noise), None

    n = maps.transition.shape[-1]
    pad = jnp.zeros((*maps.noise.shape[:-1], max(n - maps.noise.shape[-1], 0)), maps.noise.dtype)
    maps = maps._replace(noise=jnp.concatenate([maps.noise, pad], axis=-1))
    return jax.lax.scan(double, maps, None, length=doublings)[0]


def gp_log_evidence(
    hurst: ArrayLike,
    observed: Observed,
    *,
    theta: ArrayLike = 0.0,
    sigma: ArrayLike = 1.0,
    kind: str = "I",
) -> Float[Array, ""]:
    r"""Exact log-evidence of fractional Brownian motion, or of $dX=-\theta X\,dt+\sigma\,dB_H$, started at 0.

    No lift is involved: the covariance of the process itself is factorised, O(n^3). All coordinates are independent.

    Args:
        hurst: Hurst index in (0, 1), scalar or (d,).
        observed: observations with a normal law given the state, affine in it.
        theta: mean reversion rate, scalar or (d,); 0 is fractional Brownian motion.
        sigma: noise scale, scalar or (d,).
        kind: "I" or "II".

    Returns:
        The log-evidence, a scalar; differentiable.

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
    check_interval("hurst", hurst, 0, 1, open_lo=True, open_hi=True)
    law = gaussian_parts(observed.likelihood, jnp.zeros(observed.y[0].size, observed.y.dtype))
    check(law is not None, "likelihood", "normal given the state for gp_log_evidence", "another law")
    plain = is_concrete(theta) and not np.any(np.asarray(theta))
    return _gp(hurst, observed, None if plain else theta, sigma, kind)


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
