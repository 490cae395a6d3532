"""Exact evidence of the lifted model by a square-root filter."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from genkit._core._checks import check, is_concrete
from genkit.sde._affine import check_affine, check_affine_law, reach
from genkit.sde._compress import compress
from genkit.sde._filter import Maps, backward, linearize, observation_rows, place_rows, require_gaussian, start_map
from genkit.sde._grid import Grid, Noises, make_grid, make_table
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import Observed
from genkit.sde._step import affine_parts, make_driver, make_steps


def kalman(sde: FractionalSDE, observed: Observed, *, steps_per_interval: int | None = None) -> Float[Array, ""]:
    """Log-evidence of the lifted model, exact for affine drift, constant diffusion and normal observations.

    A square-root information filter on the state and its lifted noise, of any stiffness; missing rows are skipped.
    Differentiable in any parameter, twice too and in every mode (`jax.hessian`). It uses exact transitions whatever
    `sde.step` says; coefficients that depend on time, or a varying Hurst index, need `steps_per_interval`, and are then
    integrated to second order.

    Args:
        sde: the model; the distribution of `x0`, if any, must be normal.
        observed: the observations.
        steps_per_interval: take that many numerical steps per interval instead of an exact one.

    Returns:
        The log-evidence, a scalar.

    Raises:
        ValueError: if drift, diffusion, likelihood or initial state are of another kind. Inside jit, where coefficients
            cannot be looked at beforehand, the value is NaN instead.

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
    law = sde.x0.base_dist if isinstance(sde.x0, dist.Independent) else sde.x0
    known_law = not isinstance(law, dist.Distribution) or isinstance(law, dist.Normal)
    check(known_law, "x0", "an array or a numpyro Normal for kalman", type(sde.x0).__name__)
    affine = check_affine(sde, constant=steps_per_interval is None)
    affine &= check_affine_law(observed, reach(sde), sde.dim)
    coupled = False
    if steps_per_interval is None and sde.dim > 1:
        off = affine_parts(sde)[0] * (1 - jnp.eye(sde.dim, dtype=sde.dtype))
        coupled = not is_concrete(off) or bool(jnp.any(off != 0))
    step = "exponential" if coupled else "exact" if steps_per_interval is None else sde.step
    step = "path_mean" if step == "exact" and steps_per_interval is not None else step
    model = with_step(sde, step)
    grid = make_grid(model, observed.ts, None, steps_per_interval, "observed.ts")
    # A tiny step, composed with itself that many times, is exact to rounding.
    doublings = 20 if coupled else 0
    shrink = lambda v: v / 2**doublings
    grid = dataclasses.replace(grid, h=shrink(grid.h), distinct=shrink(grid.distinct))
    value = _evidence(model, observed, grid, make_table(model, grid), doublings)
    return jnp.where(affine, value, jnp.nan)


@eqx.filter_jit
def _evidence(sde: FractionalSDE, observed: Observed, grid: Grid, noises: Noises, doublings: int) -> Array:
    driver = make_driver(sde, grid, noises)
    num, size = grid.num_steps, sde.dim * (1 + driver.gain.shape[1])
    z, eps = jnp.zeros((num, size), sde.dtype), jnp.zeros((num, sde.dim * driver.num_normals), sde.dtype)
    maps = linearize(sde, driver, make_steps(sde, driver, grid), z, eps)
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
        slope, offset, noise = maps
        wide = jnp.concatenate([noise + slope @ noise, noise], axis=-1)
        noise = jnp.swapaxes(compress(jnp.swapaxes(wide, -1, -2)), -1, -2)
        offset = 2 * offset + (slope @ offset[..., None])[..., 0]
        return Maps(2 * slope + slope @ slope, offset, noise), None

    n = maps.slope.shape[-1]
    pad = jnp.zeros((*maps.noise.shape[:-1], max(n - maps.noise.shape[-1], 0)), maps.noise.dtype)
    maps = maps._replace(noise=jnp.concatenate([maps.noise, pad], axis=-1))
    return jax.lax.scan(double, maps, None, length=doublings)[0]
