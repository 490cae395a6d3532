"""The state at time 0: drawn from the model, or from a guide and weighed, inside the support of its distribution."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from genkit._core._checks import check
from genkit.sde._guide import AbstractGuide
from genkit.sde._model import FractionalSDE
from genkit.sde._step import Driver


FAR = 40.0  # deviations: nothing of a normal distribution is left beyond, in float64 too


def initial_state(
    sde: FractionalSDE, driver: Driver, guide: AbstractGuide | None, plan: Any, x0: Array | None, key: Array
) -> tuple[Array, Array, Array, Array]:
    """State (x, v) at time 0 with the log-weight and divergence of its draw."""
    key_past, key_x0 = jr.split(key)
    d, r = driver.start.shape[0], driver.start.shape[-1]
    past, zero = jr.normal(key_past, (d * r,), sde.dtype), jnp.zeros((), sde.dtype)
    weight, kl = zero, zero
    if guide is not None:
        normals, weight, kl = guide.start(plan, jnp.concatenate([past, jr.normal(key_x0, (d,), sde.dtype)]))
        past, (x0, gap) = normals[: d * r], _guided_start(sde, guide, plan, normals)
        weight, kl = weight + gap, kl - gap
    elif x0 is None:
        x0 = jnp.ravel(sde.x0.sample(key_x0)).astype(sde.dtype) if sde.has_law else sde.start()[0]
        x0 = jnp.broadcast_to(x0, (d,))
    v = jnp.einsum("dmr,dr->dm", driver.start, past.reshape(d, r))
    return x0, v, weight, kl


def _guided_start(sde: FractionalSDE, guide: AbstractGuide, plan: Any, normals: Array) -> tuple[Array, Array]:
    """The initial state from a guide's normals, and its log-density relative to the normal they assume.

    The guide takes the distribution for a normal one of the same moments. Where it has bounds, the guide's normal is
    cut to them: what it draws is mapped to the same quantile of the truncated normal.
    """
    mean, sd = sde.start()
    x = mean + sd * normals[-sde.dim :]
    law = sde.x0
    if not sde.has_law or isinstance(law, dist.Normal):
        return x, jnp.zeros((), sde.dtype)
    base = jnp.sum(dist.Normal(mean, sd).log_prob(x))
    bounds, log_slope = support(law, sde.dim), jnp.zeros((), sde.dtype)
    if bounds is not None:
        # Taken at white noise 0, so that the map is one and the same for all draws.
        origin = lambda white: guide.start(plan, white)[0][-sde.dim :]
        white = jnp.zeros_like(normals)
        spread = sd * jnp.sqrt(jnp.sum(jax.jacfwd(origin)(white) ** 2, axis=1))
        x, log_slopes = cut(x, mean + sd * origin(white), spread, *(b.astype(sde.dtype) for b in bounds))
        log_slope = jnp.sum(log_slopes)
    value = x.reshape(law.batch_shape + law.event_shape)
    return x, jnp.sum(law.log_prob(value)) + log_slope - base


def support(law: dist.Distribution, dim: int) -> tuple[Array, Array] | None:
    """Lower and upper bounds (d,) of a support, infinite where there is none; `None` for all of space."""
    kinds = dist.constraints
    region: Any = law.support
    while isinstance(region, kinds.independent):
        region = region.base_constraint
    if isinstance(region, type(kinds.real)):
        return None
    known = (kinds.interval, kinds.greater_than, kinds.greater_than_eq, kinds.less_than, kinds.less_than_eq)
    hint = "Without a guide `simulate` takes any law."
    expected = "a law with a density on all numbers, a half line or an interval per coordinate, under a guide"
    check(isinstance(region, known), "x0", expected, f"{type(law).__name__} on {region}", hint)
    shape = law.batch_shape + law.event_shape
    ends = (getattr(region, "lower_bound", -jnp.inf), getattr(region, "upper_bound", jnp.inf))
    lower, upper = (jnp.ravel(jnp.broadcast_to(jnp.asarray(end, jnp.result_type(float)), shape)) for end in ends)
    return jnp.broadcast_to(lower, (dim,)), jnp.broadcast_to(upper, (dim,))


def cut(
    x: Float[Array, " d"], mean: Array, sd: Array, lower: Array, upper: Array
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Map draws of N(mean, sd^2) to the same quantiles of it truncated to [lower, upper]; also the log-slope."""
    t = (x - mean) / sd
    # Far outside the support the tail left over is too thin for floating point: a nearer center serves as well.
    center = jnp.clip(mean, lower - 6 * sd, upper + 6 * sd)
    below, above = jnp.isfinite(lower), jnp.isfinite(upper)
    a = jnp.where(below, (jnp.where(below, lower, 0.0) - center) / sd, -FAR)
    b = jnp.where(above, (jnp.where(above, upper, 0.0) - center) / sd, FAR)
    a, b = jnp.clip(a, -FAR, FAR), jnp.clip(b, -FAR, FAR)
    mass = jnp.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))
    left, right = ndtr(a) + ndtr(t) * mass, ndtr(-b) + ndtr(-t) * mass
    eps = jnp.finfo(x.dtype)
    quantile = lambda p: ndtri(jnp.clip(p, eps.tiny, 1 - eps.eps))
    z = jnp.where(left < 0.5, quantile(left), -quantile(right))  # the thinner tail is the accurate one
    log_slope = (z**2 - t**2) / 2 + jnp.log(mass)
    slack = eps.eps * jnp.abs(sd)
    inside = jnp.clip(
        center + sd * z,
        jnp.where(below, lower + eps.eps * jnp.abs(lower) + slack, -jnp.inf),
        jnp.where(above, upper - eps.eps * jnp.abs(upper) - slack, jnp.inf),
    )
    return inside, log_slope
