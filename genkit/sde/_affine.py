"""Whether a model is one that exact steps and filters can take: affine, with constant coefficients."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genkit._core._checks import check, is_concrete
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import Observed, normal_parts
from genkit.sde._step import affine_parts


def check_affine(sde: FractionalSDE, *, uncoupled: bool = False, constant: bool = True) -> Array:
    """Refuse coefficients that the exact step (or the filter, not `constant`) cannot take, where they can be seen.

    Inside jit only the run can see traced ones: returns whether they pass.
    """
    hint = "Use `elbo` or `iwelbo` with LinearGuide, which linearizes it."
    if constant:
        hint = "Use `step='path_mean'` or 'exponential' (second order), in `kalman` with `steps_per_interval`."
        check(not sde.varying, "hurst", "constant in time for exact steps", "a function of time", hint)
    drift = ("affine in x", "affine in x with constant coefficients")[constant]
    flat = ("independent of x", "constant")[constant]
    with jax.ensure_compile_time_eval():  # so that inside jit what is known is looked at too
        coupling, times, *found = _departures(sde, constant)
    for name, expected, gaps in zip(("drift", "diffusion"), (drift, flat), found, strict=True):
        if is_concrete(gaps):
            worst = int(np.argmax(gaps))
            got = f"a relative deviation of {float(gaps[worst]):.3g} at t = {float(times[worst]):.3g}"
            check(float(gaps[worst]) <= 1e-4, name, expected, got, hint)
    if uncoupled and is_concrete(coupling):
        got = f"a coupling of {float(coupling):.3g} over the horizon"
        check(float(coupling) <= 1e-6, "drift", "uncoupled under step='exact'", got, hint)
    passed = jnp.all(jnp.stack(found) <= 1e-4)
    return passed & (coupling <= 1e-6) if uncoupled else passed


@eqx.filter_jit
def _departures(sde: FractionalSDE, constant: bool) -> tuple[Array, Array, Array, Array]:
    """Largest coupling; at two times and states, relative departures of drift and diffusion from their affine parts.

    Two arbitrary points tell an affine map with constant coefficients from any other a user would write.
    """
    jacobian, _, diffusion = affine_parts(sde)
    reach, top = _typical_size(sde, diffusion), lambda v: jnp.max(jnp.abs(v))
    ratio = lambda gap, size: jnp.where(size > 0, top(gap) / jnp.where(size > 0, size, 1.0), 0.0)

    def at(t: Array, x: Array) -> tuple[Array, Array, Array]:
        slope, forcing, known = affine_parts(sde, 0.0 if constant else t)
        there = jnp.broadcast_to(sde.diffusion(t, x), x.shape)
        # What a drift off by `reach / horizon` would add by the end is as large as the state.
        size = top(slope) * top(x) + top(forcing) + reach / sde.clock
        drift = ratio(sde.drift(t, x) - (slope @ x + forcing), size)
        return t, drift, ratio(there - known, top(there) + top(known))

    times = [jnp.asarray(sde.clock * fraction) for fraction in (0.37, 0.91)]
    found = [at(t, x) for t, x in zip(times, _arbitrary_points(reach, sde.dim), strict=True)]
    coupling = top(jacobian - jnp.diag(jnp.diagonal(jacobian))) * sde.clock
    times, drift, diffusion = (jnp.stack(column) for column in zip(*found, strict=True))
    return coupling, times, drift, diffusion


def _typical_size(sde: FractionalSDE, diffusion: Array) -> Array:
    """How far the state may get: its start and the noise of the whole horizon; the yardstick of what is negligible."""
    mean, deviation = sde.start()
    noise = jnp.max(jnp.abs(diffusion) * sde.clock ** sde.hurst_at(0.0))
    size = jnp.max(jnp.abs(mean)) + jnp.max(deviation) + noise
    return jnp.where(size > 0, size, 1.0)


def _arbitrary_points(reach: Array, d: int) -> tuple[Array, Array]:
    """Two states of that size, in general position."""
    direction = reach * (1 + jnp.arange(d, dtype=reach.dtype))
    return 1.3 * direction, -0.7 * direction


@eqx.filter_jit
def reach(sde: FractionalSDE) -> Array:
    """How far the state may get: the yardstick of what is negligible."""
    return _typical_size(sde, affine_parts(sde)[2])


def check_affine_law(observed: Observed, size: Array, d: int) -> Array:
    """Refuse observations whose mean bends or whose scale varies; returns what inside jit only the run can see."""
    with jax.ensure_compile_time_eval():
        bend, change = _bends(observed.likelihood, size, d)
    hint = "Use `elbo` or `iwelbo` with LinearGuide, which linearizes it."
    if is_concrete(bend):
        got = f"a relative deviation of {float(bend):.3g}"
        check(float(bend) <= 1e-4, "likelihood", "normal with a mean affine in x", got, hint)
    if is_concrete(change):
        got = f"a relative change of {float(change):.3g}"
        check(float(change) <= 1e-4, "likelihood", "normal with a covariance that does not depend on x", got, hint)
    return (bend <= 1e-4) & (change <= 1e-4)


@eqx.filter_jit
def _bends(likelihood: Callable, reach: Array, d: int) -> tuple[Array, Array]:
    """At two states, how far the mean of an observation is from its tangent at 0, and its precision from that at 0."""
    top = lambda v: jnp.max(jnp.abs(v))
    root, matrix, offset = normal_parts(likelihood, jnp.zeros(d, reach.dtype))

    def at(x: Array) -> tuple[Array, Array]:
        there, slope, rest = normal_parts(likelihood, x)
        # In standard deviations of the observation, of which a small part does no harm.
        size = 1 + top(root @ matrix) * top(x) + top(root @ offset)
        return top(root @ (slope @ x + rest - matrix @ x - offset)) / size, top(there - root) / top(root)

    found = [at(x) for x in _arbitrary_points(reach, d)]
    return jnp.maximum(found[0][0], found[1][0]), jnp.maximum(found[0][1], found[1][1])
