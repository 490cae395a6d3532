"""Rao-Blackwellization: the objective cost by cost, each with only the scores it can depend on."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree
from numpyro.primitives import CondIndepStackFrame

from genkit.inference import Measure, as_measure
from genkit.vi._objectives._lanes import MIXED, Reads, trace_reads
from genkit.vi._programs._program import Program
from genkit.vi._runtime._distributions import unmask
from genkit.vi._runtime._frame import Frame, Score, Term, active, total
from genkit.vi._runtime._keys import fold_name
from genkit.vi._runtime._record import Record, Site
from genkit.vi._runtime._strategy import dice_factor


_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    NotImplementedError,  # numpyro distributions that cannot be drawn from
)


class Dependence(NamedTuple):
    """The guide sites that matter to each draw of the guide (itself included) and to each cost.

    Maps from a name to the sites it depends on; the value is the set of plates in which member `n` depends on member
    `n` of the site alone, on every way from the site to the cost.
    """

    draws: dict[str, dict[str, frozenset[str]]]
    model: dict[str, dict[str, frozenset[str]]]
    guide: dict[str, dict[str, frozenset[str]]]


def elbo_terms(frame: Frame, p: Measure, q: Measure, p_record: Record, q_record: Record) -> list[Term] | None:
    """Split log p - log q into site costs, each with only the scores it can depend on.

    Given the draws a cost depends on, directly or through the distributions of other draws, the score of any further
    site has mean zero. In a shared plate member `n` of the cost meets the score of member `n` alone, provided that
    nothing on the way from the draw to the cost mixes the members.
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

    def score_of(entries: Sequence[Score], cost: Site, depends: Mapping[str, frozenset[str]]) -> Array | None:
        parts = []
        for entry in entries:
            names = by_address.get(entry.address)
            if names is None:  # of another part of the run: it multiplies everything
                parts.append(jnp.sum(entry.log_prob))
            elif names & set(depends):
                apart = frozenset.intersection(*(depends.get(name, frozenset()) for name in names))
                parts.append(_align(entry, cost, apart))
        if not parts:
            return None
        return sum(parts[1:], parts[0])

    terms = []
    for sign, record, depends in ((1.0, p_record, dependence.model), (-1.0, q_record, dependence.guide)):
        for name, site in record.sites.items():
            value = sign * _cost(site)
            score = score_of(frame.scores, site, depends[name])
            group = score_of(frame.group, site, depends[name])
            if group is not None:
                group = jnp.broadcast_to(group, jnp.shape(value))
            terms.append(Term(value, score, group))
    return [*terms, *_without_entropy_noise(frame, q_record)]


def _cost(site: Site) -> Array:
    """The contribution of a site, of its batch shape."""
    log_prob = jnp.asarray(site.log_prob)
    return log_prob if site.scale is None else jnp.asarray(site.scale) * log_prob


def _without_entropy_noise(frame: Frame, q_record: Record) -> list[Term]:
    """Terms of value and mean zero that take the derivative of `-log q` itself out at score sites, where it is noise.

    `dice_factor(log q)` has mean one whatever the parameters, so every derivative of these terms has mean zero.
    """
    scored = {entry.address for entry in (*frame.scores, *frame.group)}
    out = []
    for site in q_record.sites.values():
        if site.address in scored and site.distribution is not None:
            noise = dice_factor(jnp.asarray(site.log_prob)) - 1
            if site.scale is not None:
                noise = site.scale * noise
            out.append(Term(jnp.sum(noise), None, None))
    return out


def by_order(p_record: Record, q_record: Record) -> Dependence:
    """What program order alone says: a cost can depend on everything drawn before it is known.

    Nothing is known about the members of plates, so none are kept apart.
    """
    draws: dict[str, dict[str, frozenset[str]]] = {}
    so_far: dict[str, frozenset[str]] = {}
    for name in q_record.sites:
        so_far = {**so_far, name: frozenset()}
        draws[name] = so_far
    model: dict[str, dict[str, frozenset[str]]] = {}
    met: dict[str, frozenset[str]] = {}
    for name in p_record.sites:  # a model cost can involve every value the model has met
        met = {**met, **draws.get(name, {})}
        model[name] = met
    return Dependence(draws, model, draws)


class _Flow(NamedTuple):
    """The plates that stay apart on the direct way from a site to a draw or a cost; sites not read are left out."""

    draws: dict[str, dict[str, frozenset[str]]]
    model: dict[str, dict[str, frozenset[str]]]
    guide: dict[str, dict[str, frozenset[str]]]


def by_data(p: Measure, q: Measure, p_record: Record, q_record: Record) -> Dependence | None:
    """What the flow of data says, or None where it cannot be traced (Python branches on drawn values)."""
    latent = {name: site for name, site in q_record.sites.items() if not site.observed}
    flow = _trace_flow(p, q, q_record, {name: q_record.values[name] for name in latent})
    if flow is None:
        return None
    draws: dict[str, dict[str, frozenset[str]]] = {}
    for name, site in q_record.sites.items():
        earlier = set(draws)
        if site.distribution is None:
            # Of a step of a loop only the density is known: everything up to the loop's end matters.
            same_loop = {n for n, s in latent.items() if s.address == site.address}
            draws[name] = dict.fromkeys(earlier | same_loop | {name}, frozenset())
            continue
        direct = {read: plates for read, plates in flow.draws.get(name, {}).items() if read in earlier}
        draws[name] = {**_through(direct, draws), name: frozenset(plate.name for plate in site.plates)}
    model = {name: _through(flow.model[name], draws) for name in p_record.sites}
    guide = {}
    for name in q_record.sites:
        reads = dict(flow.guide[name])
        if name in latent:  # its own density, even where that does not look at the value
            reads.setdefault(name, frozenset(plate.name for plate in q_record.sites[name].plates))
        guide[name] = _through(reads, draws)
    return Dependence(draws, model, guide)


def _through(
    reads: Mapping[str, frozenset[str]], draws: Mapping[str, Mapping[str, frozenset[str]]]
) -> dict[str, frozenset[str]]:
    """Everything read, directly or through other draws; a plate stays apart only if it does on every way."""
    found: dict[str, frozenset[str]] = {}
    for read, apart in reads.items():
        for source, kept in draws[read].items():
            way = apart & kept
            found[source] = found[source] & way if source in found else way
    return found


def _trace_flow(p: Measure, q: Measure, q_record: Record, values: dict[str, PyTree]) -> _Flow | None:
    """Trace every cost, and every draw with its density, as functions of the values drawn."""
    p = as_measure(p)
    q = as_measure(q)
    assert isinstance(p, Program) and isinstance(q, Program)  # they have left records
    # Nothing is computed, so that any keys will do: only which value enters where is looked at.
    key_guide, key_model, key_draws = jr.split(jr.key(0), 3)
    kept: dict[str, Record] = {}

    def arrays(values: dict[str, PyTree]) -> dict[str, dict]:
        with active(None):
            guide = q.record_weights({**values, **q_record.indices}, key_guide)
            model = p.record_weights({**values, **q_record.indices}, key_model)
        kept.update(guide=guide, model=model)
        draws = {}
        for name, site in guide.sites.items():
            if site.distribution is not None and not site.observed:
                # A sampler may use more than the density does.
                sampled = unmask(site.distribution).sample(fold_name(key_draws, name))
                draws[name] = (_cost(site), jnp.asarray(sampled))
        return {
            "model": {name: _cost(site) for name, site in model.sites.items()},
            "guide": {name: _cost(site) for name, site in guide.sites.items()},
            "draws": draws,
        }

    try:
        closed, shapes = jax.make_jaxpr(arrays, return_shape=True)(values)
    except _UNTRACEABLE:
        return None
    plates = {plate for site in q_record.sites.values() for plate in site.plates}
    flow = _Flow({}, {}, {})
    # Which sites are read does not depend on the plate looked at: one round with none, one more for each.
    for plate in (None, *plates):
        inputs = [_input_reads(name, q_record.sites[name], values[name], plate) for name in sorted(values)]
        found = jax.tree.unflatten(jax.tree.structure(shapes), trace_reads(closed.jaxpr, inputs))
        for name, reads in found["model"].items():
            _note(flow.model.setdefault(name, {}), reads, plate, _axis(kept["model"].sites[name], plate))
        for name, reads in found["guide"].items():
            _note(flow.guide.setdefault(name, {}), reads, plate, _axis(kept["guide"].sites[name], plate))
        for name, (by_density, by_sampler) in found["draws"].items():
            site = kept["guide"].sites[name]
            direct = flow.draws.setdefault(name, {})
            both: dict[str, frozenset[str]] = {}
            _note(both, by_density, plate, _axis(site, plate))
            sampled: dict[str, frozenset[str]] = {}
            _note(sampled, by_sampler, plate, _axis(site, plate))
            for read in {**both, **sampled}:
                apart = frozenset.intersection(*(part[read] for part in (both, sampled) if read in part))
                direct[read] = direct.get(read, frozenset()) | apart
    return flow


def _input_reads(name: str, site: Site, value: PyTree, plate: CondIndepStackFrame | None) -> Reads:
    """The drawn value itself: its members lie along the axis of the plate."""
    event_dim = 0 if site.distribution is None else len(site.distribution.event_shape)
    axis = MIXED
    if plate is not None and plate in site.plates and site.distribution is not None:
        axis = np.ndim(value) - event_dim + plate.dim
    return {name: axis}


def _axis(site: Site, plate: CondIndepStackFrame | None) -> int:
    """The axis of the plate in an array that begins with the site's batch shape, or `MIXED`."""
    if plate is None or plate not in site.plates:
        return MIXED
    return np.ndim(site.log_prob) + plate.dim


def _note(into: dict[str, frozenset[str]], reads: Reads, plate: CondIndepStackFrame | None, axis: int) -> None:
    """Note that an array reads these sites, and whether it keeps the members of the plate apart."""
    for name, found in reads.items():
        apart = into.get(name, frozenset())
        if plate is not None and axis != MIXED and found == axis:
            apart = apart | {plate.name}
        into[name] = apart


def _align(entry: Score, cost: Site, apart: frozenset[str]) -> Array:
    """Sum a score over all dimensions but the plates it shares with the cost and whose members stay apart."""
    shared = {plate.dim for plate in entry.plates if plate in cost.plates and plate.name in apart}
    log_prob = jnp.asarray(entry.log_prob)
    summed = tuple(i for i in range(log_prob.ndim) if i - log_prob.ndim not in shared)
    return jnp.sum(log_prob, summed, keepdims=bool(shared))


def with_rest(frame: Frame, own: Array | None) -> Array | None:
    """Scores of everything else in the run, added to `own`."""
    rest = total(frame.scores)
    if own is None or rest is None:
        return rest if own is None else own
    return own + rest
