"""Facts that objectives need about a model and a guide together."""

from collections.abc import Callable

import jax
import numpy as np
import numpyro.distributions as dist
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PyTree
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint

from genkit._core._checks import is_concrete
from genkit.inference import as_measure
from genkit.vi._programs._program import Program, evaluate, simulate, weigh
from genkit.vi._runtime._distributions import lanes
from genkit.vi._runtime._frame import active
from genkit.vi._runtime._record import Record


# `to_event` wraps a support in this type, which numpyro keeps private.
_Independent = type(constraints.independent(constraints.real, 1))


def draw_and_weigh(p: object, q: object) -> tuple[PyTree, Array, Array, Record | None, Record | None]:
    """Draw from `q`, weigh by `p`: (value, log p, log q, record of p, record of q)."""
    value, log_q, q_record = simulate(q)
    p = as_measure(p)
    if not isinstance(p, Program):
        return value, weigh(p, value), log_q, None, q_record
    on_site = None
    if q_record is not None:
        on_site = _matcher(q_record)
    p_record = evaluate(p, value, on_site=on_site)
    return value, p_record.log_density, log_q, p_record, q_record


def _matcher(q_record: Record) -> Callable[[str, dist.Distribution], bool]:
    """Refuse a guide site whose support is not inside the model's, before its value is weighed."""

    def match(name: str, distribution: dist.Distribution) -> bool:
        site = q_record.sites.get(name)
        if site is None or site.support is None or site.observed:
            return False
        # numpyro's automatic guides end in point masses, which call their support real wherever the point lies.
        if site.distribution is not None and isinstance(lanes(site.distribution), dist.Delta):
            return False
        inside, why = _compare(site.support, distribution.support)
        if why:
            kind = "a site in a loop" if site.distribution is None else type(site.distribution).__name__
            raise ValueError(
                f"The guide's support at site {name!r} must lie inside the model's; got {kind} on "
                f"{_name(site.support)} for the guide and {type(distribution).__name__} on "
                f"{_name(distribution.support)} for the model ({why})."
            )
        return inside

    return match


def _name(support: Constraint) -> str:
    return type(support).__name__.strip("_")


def _bounds(support: Constraint) -> tuple[np.ndarray, np.ndarray] | None:
    """Lower and upper bound of a scalar constraint in every lane, where they are known now."""
    while isinstance(support, (_Independent, type(constraints.real_vector))):
        support = support.base_constraint
    if isinstance(support, type(constraints.real)):
        return np.asarray(-np.inf), np.asarray(np.inf)
    if isinstance(support, type(constraints.boolean)):
        return np.asarray(0.0), np.asarray(1.0)
    if isinstance(support, type(constraints.circular)):
        return np.asarray(-np.pi), np.asarray(np.pi)
    # numpyro's constraints have these attributes where they are intervals or half-lines.
    lower = getattr(support, "lower_bound", None)
    upper = getattr(support, "upper_bound", None)
    if lower is None and upper is None:
        return None
    lower = -np.inf if lower is None else lower
    upper = np.inf if upper is None else upper
    if not (is_concrete(lower) and is_concrete(upper)):
        return None
    return np.asarray(lower, float), np.asarray(upper, float)


def _compare(inner: Constraint, outer: Constraint) -> tuple[bool, str]:
    """Whether `inner` is known to lie inside `outer` in every lane, and why it does not, if that is known."""
    if bool(inner.is_discrete) != bool(outer.is_discrete):
        return False, "one is discrete, the other continuous"
    own = _bounds(inner)
    other = _bounds(outer)
    if own is None or other is None:
        return inner is outer, ""
    bounds = np.broadcast_arrays(*own, *other)
    inside = (bounds[0] >= bounds[2]) & (bounds[1] <= bounds[3])
    if inside.all():
        return True, ""
    first = tuple(int(i) for i in np.argwhere(~inside)[0])
    low, high, outer_low, outer_high = (float(bound[first]) for bound in bounds)
    where = f" in lane {first}" if first else ""
    return False, f"[{low}, {high}] is not inside [{outer_low}, {outer_high}]{where}"


def frozen_log_density(measure: object, value: PyTree) -> Float[Array, ""]:
    """The log-density as a function of the value alone: no gradient to the parameters of the measure."""
    measure = as_measure(measure)

    def density(value: PyTree) -> Float[Array, ""]:
        with active(None):
            return measure.log_density(value)

    try:
        converted, constants = jax.closure_convert(density, value)
    except TypeError as error:
        raise ValueError(
            f"The measure must have an exact log-density for this estimator; {type(measure).__name__} only estimates "
            "it. Use the plain pathwise estimator."
        ) from error
    return converted(value, *[stop_gradient(c) for c in constants])
