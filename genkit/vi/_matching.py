"""What objectives need to know about a model and a guide together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from numpyro.distributions import constraints

from .._core._checks import is_concrete
from .._core._measure import as_measure
from ._frame import Frame, Term, active, total
from ._program import Program, evaluate, simulate, weigh
from ._run import Record, Site


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


# --- Rao-Blackwellisation -----------------------------------------------------------------------------------------


def elbo_terms(frame: Frame, p_record: Record, q_record: Record) -> list[Term] | None:
    """Split log p - log q into site costs, each with only the scores it can depend on.

    A cost is independent of a draw made after it in the guide's order (its score has mean zero given the past), and
    inside a shared plate lane `n` of the cost depends on lane `n` of the draw only, provided no latent site outside
    the plate comes later in the guide (it could mix the lanes).
    """
    if not frame.scores and not frame.group:
        return None
    order = {name: i for i, name in enumerate(q_record.sites)}
    by_address: dict[str, list[str]] = {}
    for name, site in q_record.sites.items():
        by_address.setdefault(site.address, []).append(name)
    reach, latest = {}, -1
    for name in p_record.sites:  # the latest guide site a model cost can involve
        latest = max(latest, order.get(name, -1))
        reach[name] = latest
    if any(name not in p_record.sites for name, s in q_record.sites.items() if not (s.auxiliary or s.observed)):
        return None
    has_auxiliary = any(s.auxiliary for s in q_record.sites.values())

    def score_of(entries: list, cost: Site, last: int) -> Any:
        out = None
        for entry in entries:
            names = by_address.get(entry.address)
            part = jnp.sum(entry.log_prob)
            if names is not None and not has_auxiliary:
                first = min(order[n] for n in names)
                if last < first:
                    continue
                mixing = [s for n, s in q_record.sites.items() if order[n] > first and not s.observed]
                part = _align(entry, cost, mixing)
            out = part if out is None else out + part
        return out

    terms = []
    for sign, record, last_of in ((1.0, p_record, reach), (-1.0, q_record, order)):
        for name, site in record.sites.items():
            value = sign * (site.log_prob if site.scale is None else site.scale * site.log_prob)
            score = score_of(frame.scores, site, last_of[name])
            group = score_of(frame.group, site, last_of[name])
            group = None if group is None else jnp.broadcast_to(group, jnp.shape(value))
            terms.append(Term(value, score, group))
    return terms


def _align(entry: Any, cost: Site, mixing: list[Site]) -> Any:
    """Sum a score over all dimensions but the plates it shares with the cost."""
    shared = set()
    for plate in entry.plates:
        same = any(other.name == plate.name and other.dim == plate.dim for other in cost.plates)
        if same and all(any(o.name == plate.name for o in site.plates) for site in mixing):
            shared.add(plate.dim)
    ndim = jnp.ndim(entry.log_prob)
    summed = tuple(i for i in range(ndim) if i - ndim not in shared)
    return jnp.sum(entry.log_prob, summed, keepdims=bool(shared))


def with_rest(frame: Frame, own: Any) -> Any:
    """Scores of everything else in the run, added to `own`."""
    rest = total(frame.scores)
    if own is None:
        return rest
    return own if rest is None else own + rest
