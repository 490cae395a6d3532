"""What objectives need to know about a model and a guide together."""

from typing import Any

import jax
import numpy as np
from jax.lax import stop_gradient
from numpyro.distributions import constraints

from .._core._checks import is_concrete
from .._core._measure import as_measure
from ._frame import active
from ._program import Program, evaluate, simulate, weigh
from ._run import Record


def draw_and_weigh(p: Any, q: Any) -> tuple[Any, Any, Any, Record | None, Record | None]:
    """Draw from `q`, weigh by `p`: (value, log p, log q, record of p, record of q)."""
    value, log_q, q_record = simulate(q)
    p = as_measure(p)
    if not isinstance(p, Program):
        return value, weigh(p, value), log_q, None, q_record
    p_record = evaluate(p, value, on_site=None if q_record is None else _matcher(q_record))
    return value, p_record.log_density, log_q, p_record, q_record


def _matcher(q_record: Record) -> Any:
    """Refuse a guide site whose support is not inside the model's, before its value is weighed."""

    def match(name: str, law: Any) -> bool:
        site = q_record.sites.get(name)
        if site is None or site.support is None or site.observed:
            return False
        inside, why = _compare(site.support, law.support)
        if why:
            kind = "a site in a loop" if site.law is None else type(site.law).__name__
            raise ValueError(
                f"The guide's support at site {name!r} must lie inside the model's; got {kind} on "
                f"{_name(site.support)} for the guide and {type(law).__name__} on {_name(law.support)} for the model "
                f"({why})."
            )
        return inside

    return match


def _name(support: Any) -> str:
    return type(support).__name__.strip("_")


def _bounds(support: Any) -> tuple[float, float] | None:
    """Lower and upper bound of a scalar constraint, where they are known now."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if type(support) in (type(constraints.real),):
        return -np.inf, np.inf
    if support is constraints.boolean or type(support) is type(constraints.boolean):
        return 0.0, 1.0
    if type(support) is type(constraints.circular):
        return -np.pi, np.pi
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if lower is None and upper is None:
        return None
    lower = -np.inf if lower is None else lower
    upper = np.inf if upper is None else upper
    if not (is_concrete(lower) and is_concrete(upper)):
        return None
    return float(np.min(np.asarray(lower))), float(np.max(np.asarray(upper)))


def _compare(inner: Any, outer: Any) -> tuple[bool, str]:
    """Whether `inner` is known to lie inside `outer`, and why it does not, if that is known."""
    if bool(inner.is_discrete) != bool(outer.is_discrete):
        return False, "one is discrete, the other continuous"
    a, b = _bounds(inner), _bounds(outer)
    if a is None or b is None:
        return inner is outer, ""
    if a[0] >= b[0] and a[1] <= b[1]:
        return True, ""
    return False, f"[{a[0]}, {a[1]}] is not inside [{b[0]}, {b[1]}]"


def frozen_log_density(measure: Any, value: Any) -> Any:
    """The log-density as a function of the value alone: no gradient to the parameters of the measure."""
    measure = as_measure(measure)

    def density(value: Any) -> Any:
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
