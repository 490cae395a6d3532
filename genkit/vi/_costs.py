"""Rao-Blackwellisation: the objective cost by cost, each with only the scores it can depend on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from numpyro.ops.provenance import eval_provenance

from .._core._measure import as_measure
from ._frame import Frame, Score, Term, active, fold_name, magic, total
from ._laws import unmask
from ._program import Program
from ._run import Record, Site


_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Dependence(NamedTuple):
    """Which guide sites matter: `before[name]` for the draw of a guide site, itself included, and others for costs."""

    before: dict[str, frozenset[str]]
    model: dict[str, frozenset[str]]
    guide: dict[str, frozenset[str]]


def elbo_terms(frame: Frame, p: Any, q: Any, p_record: Record, q_record: Record) -> list[Term] | None:
    """Split log p - log q into site costs, each with only the scores it can depend on.

    Given the draws a cost depends on, directly or through the laws of other draws, the score of any further site has
    mean zero. In a shared plate lane `n` of the cost depends on lane `n` of the draw only, provided every site
    between them is in the plate too (another one could mix the lanes).
    """
    if not frame.scores and not frame.group:
        return None
    if any(name not in p_record.sites for name, s in q_record.sites.items() if not (s.auxiliary or s.observed)):
        return None
    if any(site.auxiliary for site in q_record.sites.values()):
        return None
    by_address: dict[str, set[str]] = {}
    for name, site in q_record.sites.items():
        by_address.setdefault(site.address, set()).add(name)
    dependence = by_data(p, q, p_record, q_record) or by_order(p_record, q_record)

    def score_of(entries: list[Score], cost: Site, depends: frozenset[str]) -> Any:
        out = None
        for entry in entries:
            names = by_address.get(entry.address)
            part = jnp.sum(entry.log_prob)
            if names is not None:
                if not names & depends:
                    continue
                between = [q_record.sites[n] for n in depends - names if dependence.before[n] & names]
                part = _align(entry, cost, between)
            out = part if out is None else out + part
        return out

    terms = []
    for sign, record, depends in ((1.0, p_record, dependence.model), (-1.0, q_record, dependence.guide)):
        for name, site in record.sites.items():
            value = sign * (site.log_prob if site.scale is None else site.scale * site.log_prob)
            score = score_of(frame.scores, site, depends[name])
            group = score_of(frame.group, site, depends[name])
            group = None if group is None else jnp.broadcast_to(group, jnp.shape(value))
            terms.append(Term(value, score, group))
    return [*terms, *_without_entropy_noise(frame, q_record)]


def _without_entropy_noise(frame: Frame, q_record: Record) -> list[Term]:
    """Terms of value and mean zero that take the derivative of `-log q` itself out at score sites, where it is noise.

    The factor `magic(log q)` has mean one whatever the parameters, so every derivative of these terms has mean zero.
    """
    scored = {entry.address for entry in (*frame.scores, *frame.group)}
    out = []
    for site in q_record.sites.values():
        if site.address in scored and site.law is not None:
            noise = magic(site.log_prob) - 1
            out.append(Term(jnp.sum(noise if site.scale is None else site.scale * noise), None, None))
    return out


def by_order(p_record: Record, q_record: Record) -> Dependence:
    """What program order alone says: a cost can depend on everything drawn before it is known."""
    before: dict[str, frozenset[str]] = {}
    so_far: frozenset[str] = frozenset()
    for name in q_record.sites:
        so_far = so_far | {name}
        before[name] = so_far
    model, reach = {}, frozenset()
    for name in p_record.sites:  # a model cost can involve every value the model has met
        reach = reach | before.get(name, frozenset())
        model[name] = reach
    return Dependence(before, model, before)


def by_data(p: Any, q: Any, p_record: Record, q_record: Record) -> Dependence | None:
    """What the flow of data says, or None where it cannot be traced (Python branches on drawn values)."""
    latent = {name: site for name, site in q_record.sites.items() if not site.observed}
    draws = {name: q_record.values[name] for name in latent}
    names = {f"site{i}": name for i, name in enumerate(draws)}  # any string may name a site, not any an argument
    try:
        found = eval_provenance(
            lambda **given: _flow(p, q, q_record, {names[k]: v for k, v in given.items()}),
            **{k: draws[name] for k, name in names.items()},
        )
    except (*_UNTRACEABLE, NotImplementedError):  # the second: numpyro laws that cannot be drawn from
        return None
    found = jax.tree.map(lambda reads: frozenset(names[k] for k in reads), found, is_leaf=_is_set)
    before: dict[str, frozenset[str]] = {}
    so_far: frozenset[str] = frozenset()
    for name, site in q_record.sites.items():
        so_far = so_far | {name}
        if site.law is None:  # of a step of a loop only the density is known: everything up to the loop's end matters
            before[name] = so_far | {n for n, s in latent.items() if s.address == site.address}
        else:
            reads = found["draws"].get(name, frozenset()) & so_far
            before[name] = frozenset({name}).union(*(before[n] for n in reads - {name}))
    known = lambda reads: frozenset().union(*(before[n] for n in reads))
    guide = {name: known(found["guide"][name]) | (before[name] if name in latent else frozenset()) for name in before}
    return Dependence(before, {name: known(found["model"][name]) for name in p_record.sites}, guide)


def _is_set(node: Any) -> bool:
    return isinstance(node, frozenset)


def _flow(p: Any, q: Any, q_record: Record, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every cost, and every draw together with its density, as functions of the values drawn."""
    p, q = as_measure(p), as_measure(q)
    assert isinstance(p, Program) and isinstance(q, Program)  # they have left records
    # Nothing is computed, so that any keys will do: only which value enters where is looked at.
    key_guide, key_model, key_draws = jr.split(jr.key(0), 3)
    with active(None):
        guide = q.trace("density", values={**values, **q_record.indices}, key=key_guide)
        model = p.trace("density", values={**values, **q_record.indices}, key=key_model)
    cost = lambda site: jnp.sum(site.log_prob if site.scale is None else site.scale * site.log_prob)
    return {
        "model": {name: cost(site) for name, site in model.sites.items()},
        "guide": {name: cost(site) for name, site in guide.sites.items()},
        "draws": {
            # A sampler may use more than the density does.
            name: cost(site) + jnp.sum(unmask(site.law).sample(fold_name(key_draws, name)))
            for name, site in guide.sites.items()
            if site.law is not None and not site.observed
        },
    }


def _align(entry: Score, cost: Site, between: list[Site]) -> Any:
    """Sum a score over all dimensions but the plates it shares with the cost and with every site between."""
    shared = set()
    for plate in entry.plates:
        same = any(other.name == plate.name and other.dim == plate.dim for other in cost.plates)
        if same and all(any(o.name == plate.name for o in site.plates) for site in between):
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
