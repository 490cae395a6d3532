"""The factor graph of a function from discrete values to log-densities, read off its jaxpr.

Which values a log-density reads, and along which axis the members of a plate stay apart on the way, decides the sums.
Nothing is asked of the user's code: it sees one value of every discrete site at a time, and `jax.vmap` runs it on all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array, ArrayLike, Int

from genkit.vi._discrete._elimination import Factor, Variable, WidthError
from genkit.vi._objectives._lanes import MIXED, trace_reads


class Spec(NamedTuple):
    """A discrete site.

    Attributes:
        support: the outcomes of one lane, (K,).
        shape: the shape of its value, every entry one lane.
        is_ragged: True if some lanes may have fewer outcomes.
    """

    support: np.ndarray
    shape: tuple[int, ...]
    is_ragged: bool

    @property
    def reference(self) -> Array:
        """A value of the site, for what does not depend on it."""
        return jnp.full(self.shape, self.support[0])


class Graph(NamedTuple):
    """Tables and variables, and how states become values.

    Attributes:
        factors: the tables that read a discrete value.
        variables: the variables by site.
        values: for each site its outcomes, (states, *joint axes).
        joint: for each site the axes that are enumerated together, because their members meet somewhere.
        specs: the discrete sites.
        lanes: the lane along each axis of a log-density that reads a discrete value.
    """

    factors: list[Factor]
    variables: dict[str, Variable]
    values: dict[str, np.ndarray]
    joint: dict[str, tuple[int, ...]]
    specs: Mapping[str, Spec]
    lanes: dict[str, dict[int, int]]

    def value_of(self, name: str, states: Int[Array, "..."]) -> Array:
        """The value of a site whose lanes are in these states."""
        spec = self.specs[name]
        joint = self.joint[name]
        apart = [axis for axis, size in enumerate(spec.shape) if size > 1 and axis not in joint]
        value = jnp.asarray(self.values[name])[states]
        # The axes come as lanes first; those of size one are missing.
        present = [*apart, *joint]
        value = jnp.transpose(value, [present.index(axis) for axis in sorted(present)])
        return value.reshape(spec.shape)


class Costs(NamedTuple):
    """Log-densities as arrays, apart from what does not change with the values.

    Attributes:
        closed: the traced function.
        names: of its outputs, in order.
        inputs: names of its inputs, in order.
    """

    closed: ClosedJaxpr
    names: tuple[str, ...]
    inputs: tuple[str, ...]

    def evaluate(self, wanted: Sequence[str]) -> Callable[[Mapping[str, Array]], list[Array]]:
        """The function that computes some of the outputs and nothing else."""
        jaxpr = self.closed.jaxpr
        outvars = [jaxpr.outvars[self.names.index(name)] for name in wanted]
        needed = {var for var in outvars if not isinstance(var, Literal)}
        equations = []
        for eqn in reversed(jaxpr.eqns):
            if any(var in needed for var in eqn.outvars):
                equations.append(eqn)
                needed |= {var for var in eqn.invars if not isinstance(var, Literal)}
        debug_info = jaxpr.debug_info._replace(result_paths=None)
        pruned = jaxpr.replace(eqns=equations[::-1], outvars=outvars, debug_info=debug_info)
        run = jaxpr_as_fun(ClosedJaxpr(pruned, self.closed.consts))
        return lambda values: run(*(values[name] for name in self.inputs))


def trace_costs(fn: Callable[[dict[str, Array]], dict[str, Array]], values: dict[str, Array]) -> Costs:
    """Trace a function from values to log-densities."""
    inputs = tuple(sorted(values))
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(values)
    return Costs(closed, tuple(sorted(shapes)), inputs)


def reads_of(costs: Costs, inputs: Sequence[str]) -> dict[str, set[str]]:
    """The inputs that each output depends on."""
    start = [{name: MIXED} if name in inputs else {} for name in costs.inputs]
    found = trace_reads(costs.closed.jaxpr, start)
    return {name: set(reads) for name, reads in zip(costs.names, found, strict=True)}


def build_graph(
    costs: Costs,
    specs: Mapping[str, Spec],
    scales: Mapping[str, ArrayLike | None],
    *,
    max_paths: int,
    same: Sequence[tuple[str, str]] = (),
    joint: Mapping[str, tuple[int, ...]] | None = None,
) -> Graph:
    """The factor graph of log-densities over discrete sites.

    Args:
        costs: the traced log-densities.
        specs: the discrete sites among the inputs.
        scales: of each site, None for one.
        max_paths: joint outcomes that one site may have.
        same: pairs of sites whose lanes are the same (a carried value before and after a step).
        joint: axes that must be enumerated together in any case.

    Returns:
        The graph; log-densities that read no discrete site are left out.

    Raises:
        WidthError: if the members of a site meet and have too many joint outcomes.
        ValueError: for a scale that is no single number.
    """
    reads, places = _places(costs, specs)
    joint = _joint_axes(reads, places, specs, same, joint or {})
    parents: dict[tuple, tuple] = {}
    for site, names in reads.items():
        for name in names:
            for axis, size in enumerate(specs[name].shape):
                if size > 1 and axis not in joint[name]:
                    _unite(parents, ("cost", site, places[site, name, axis]), ("site", name, axis))
    for first, second in same:
        for axis in range(len(specs[first].shape)):
            _unite(parents, ("site", first, axis), ("site", second, axis))
    numbers: dict[tuple, int] = {}
    lane = lambda node: numbers.setdefault(_root(parents, node), len(numbers))
    variables = {}
    outcomes = {}
    for name, spec in specs.items():
        outcomes[name] = _outcomes(name, spec, joint[name], max_paths)
        apart = [axis for axis, size in enumerate(spec.shape) if size > 1 and axis not in joint[name]]
        lanes = tuple(lane(("site", name, axis)) for axis in apart)
        variables[name] = Variable(len(outcomes[name]), lanes, scales.get(name))
    graph = Graph([], variables, outcomes, joint, specs, {})
    references = {name: spec.reference for name, spec in specs.items()}
    scopes: dict[tuple[str, ...], list[str]] = {}
    for site, names in reads.items():
        if names:
            _check_scale(site, scales.get(site))
            scopes.setdefault(tuple(sorted(names)), []).append(site)
    for scope, sites in scopes.items():
        tables = _tables(costs.evaluate(sites), graph, scope, references)
        for site, table in zip(sites, tables, strict=True):
            shape = table.shape[len(scope) :]
            graph.lanes[site] = {axis: lane(("cost", site, axis)) for axis, size in enumerate(shape) if size > 1}
            lanes = tuple(graph.lanes[site].values())
            table = table.reshape(*table.shape[: len(scope)], *(size for size in shape if size > 1))
            graph.factors.append(Factor(table, (*scope, *lanes), scales.get(site), frozenset([site])))
    return graph


def _places(costs: Costs, specs: Mapping[str, Spec]) -> tuple[dict[str, set[str]], dict[tuple[str, str, int], int]]:
    """Who reads whom, and where the axes of a value lie in a log-density that reads it."""
    places = {}
    reads = reads_of(costs, list(specs))
    rank = max((len(spec.shape) for spec in specs.values()), default=0)
    for axis in range(rank):
        start = [
            {name: axis if axis < len(specs[name].shape) else MIXED} if name in specs else {} for name in costs.inputs
        ]
        for site, found in zip(costs.names, trace_reads(costs.closed.jaxpr, start), strict=True):
            for name, place in found.items():
                places[site, name, axis] = place
    for name, spec in specs.items():
        # The density of a uniform site is the same for all outcomes, and does not look at them.
        if name in reads and name not in reads[name]:
            reads[name].add(name)
            places.update({(name, name, axis): axis for axis in range(len(spec.shape))})
    return reads, places


def _joint_axes(
    reads: Mapping[str, set[str]],
    places: Mapping[tuple[str, str, int], int],
    specs: Mapping[str, Spec],
    same: Sequence[tuple[str, str]],
    least: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """The axes of each site along which members meet in some log-density."""
    joint: dict[str, set[int]] = {name: set(least.get(name, ())) for name in specs}
    for site, names in reads.items():
        for name in names:
            axes = [axis for axis, size in enumerate(specs[name].shape) if size > 1]
            where = [places[site, name, axis] for axis in axes]
            for axis, place in zip(axes, where, strict=True):
                if place == MIXED or where.count(place) > 1:
                    joint[name].add(axis)
    for first, second in same:
        both = joint[first] | joint[second]
        joint[first] = joint[second] = both
    return {name: tuple(sorted(axes)) for name, axes in joint.items()}


def _outcomes(name: str, spec: Spec, joint: tuple[int, ...], max_paths: int) -> np.ndarray:
    """The outcomes of a site over its joint axes, (states, *joint axes)."""
    shape = tuple(spec.shape[axis] for axis in joint)
    entries = math.prod(shape)
    count = len(spec.support) ** entries
    if count > max_paths:
        raise WidthError([name], count)
    index = np.indices((len(spec.support),) * entries).reshape(entries, count).T
    return spec.support[index].reshape(count, *shape)


def _check_scale(site: str, scale: ArrayLike | None) -> None:
    if scale is not None and np.ndim(scale) > 0:
        raise ValueError(
            f"The scale of site {site!r} must be one number where it depends on a discrete site that is summed out; "
            f"got an array of shape {np.shape(scale)}. Weigh members by hand, with `numpyro.factor`."
        )


def _tables(
    fn: Callable[[Mapping[str, Array]], list[Array]],
    graph: Graph,
    scope: tuple[str, ...],
    values: Mapping[str, Array],
) -> list[Array]:
    """Log-densities at all outcomes of the sites in `scope`, whole plates set to one outcome at a time."""

    def at(*outcomes: Array) -> list[Array]:
        changed = {}
        for name, outcome in zip(scope, outcomes, strict=True):
            spec = graph.specs[name]
            shape = tuple(size if axis in graph.joint[name] else 1 for axis, size in enumerate(spec.shape))
            changed[name] = jnp.broadcast_to(outcome.reshape(shape), spec.shape)
        return fn({**values, **changed})

    for position in reversed(range(len(scope))):
        # What does not read a site is not computed once for each of its outcomes.
        axes = tuple(0 if place == position else None for place in range(len(scope)))
        at = jax.vmap(at, in_axes=axes)
    return at(*(jnp.asarray(graph.values[name]) for name in scope))


def _root(parents: dict[tuple, tuple], node: tuple) -> tuple:
    while node in parents:
        node = parents[node]
    return node


def _unite(parents: dict[tuple, tuple], first: tuple, second: tuple) -> None:
    first = _root(parents, first)
    second = _root(parents, second)
    if first != second:
        parents[first] = second
