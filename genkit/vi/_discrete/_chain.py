"""Discrete sites of a loop summed out as a Markov chain.

The state of the chain is what the carry says of the discrete sites of the step before. With `k` for the state of the
step before and `l` for that of the step, the sum over all paths is a product of matrices

    M_t[k, l] = sum over the step's other discrete sites of prod (densities of step t that read a discrete site),

each computed at all steps at once (`jax.vmap`); the carry of a step in state `k` comes from running the step before at
`k`. Densities that read no discrete site are handed on as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, Key, PyTree

from genkit.vi._discrete._elimination import (
    Factor,
    Step,
    WidthError,
    aligned,
    backward_messages,
    chain_product,
    draw_states,
    eliminate,
    over_lanes,
    reduce_states,
    relative,
)
from genkit.vi._discrete._graph import Graph, Spec, build_graph, reads_of, trace_costs
from genkit.vi._discrete._world import Body, Found, Slices, World, concrete_scale
from genkit.vi._objectives._lanes import MIXED, trace_reads


# Up to this many states the product of matrices by halving costs less than going through the steps one by one.
_FEW_STATES = 2

_BEFORE = "@before"


class Carried(NamedTuple):
    """How discrete sites reach the next step.

    Attributes:
        sites: those that the carry depends on.
        leaves: for each leaf of the carry whether it does.
        outputs: for each leaf of the output whether it depends on any discrete site.
    """

    sites: tuple[str, ...]
    leaves: tuple[bool, ...]
    outputs: tuple[bool, ...]


def carried_sites(body: Body, init: PyTree, step: Slices, facts: Found) -> Carried | None:
    """The sites that the carry depends on; None if it also depends on those of earlier steps."""
    specs = facts.specs
    references = {name: spec.reference for name, spec in specs.items()}

    def run(carry: PyTree, states: dict[str, Array]) -> tuple[PyTree, PyTree]:
        return body.step(carry, step, states)[:2]

    closed, shapes = jax.make_jaxpr(run, return_shape=True)(init, references)
    num_carry = len(jax.tree.leaves(init))
    start: list[dict] = [{f"carry {i}": MIXED} for i in range(num_carry)]
    start += [{name: MIXED} for name in sorted(references)]
    reads = [set(found) for found in trace_reads(closed.jaxpr, start)]
    num_outputs = len(jax.tree.leaves(shapes[1]))
    after = reads[: len(reads) - num_outputs]
    tainted: set[str] = set()
    while True:
        grown = {f"carry {i}" for i, found in enumerate(after) if found & (set(specs) | tainted)}
        if grown == tainted:
            break
        tainted = grown
    for i in range(len(after)):
        if f"carry {i}" in tainted and after[i] & tainted:
            return None
    sites = {name for found in after for name in found if name in specs}
    outputs = tuple(bool(found & (set(specs) | tainted)) for found in reads[len(after) :])
    return Carried(tuple(sorted(sites)), tuple(f"carry {i}" in tainted for i in range(len(after))), outputs)


class Table(NamedTuple):
    """The log-densities of one step.

    Attributes:
        logits: over states before and after, then lanes; at the first step over states alone.
        rest: factors of sites that do not meet the chain.
        steps: how the other discrete sites were summed out.
    """

    logits: Array
    rest: list[Array]
    steps: list[Array]


@dataclasses.dataclass
class Link:
    """A step of the chain: its graph as found while it is traced, and its table.

    Args:
        chain: the chain.
        has_before: False at the first step.
    """

    chain: "Chain"
    has_before: bool
    graph: Graph | None = None
    order: tuple[str, ...] = ()
    steps: list[Step] = dataclasses.field(default_factory=list)
    rest: list[Factor] = dataclasses.field(default_factory=list)

    def table(
        self, costs: Callable[[dict[str, Array]], dict[str, Array]], joint: Mapping[str, tuple[int, ...]]
    ) -> Table:
        """Sum out what is not carried.

        Args:
            costs: the log-densities of the step, of the values of its sites and of the carried ones before.
            joint: axes to enumerate together.

        Returns:
            The table.
        """
        chain = self.chain
        specs = dict(chain.specs)
        before = tuple(name + _BEFORE for name in chain.carried) if self.has_before else ()
        for name in before:
            specs[name] = chain.specs[name.removesuffix(_BEFORE)]
        references = {name: spec.reference for name, spec in specs.items()}
        settings = chain.world.settings
        graph = build_graph(
            trace_costs(lambda values: chain.counted(costs(values)), references),
            specs,
            chain.scales,
            max_paths=settings.max_paths,
            same=[(name, name.removesuffix(_BEFORE)) for name in before],
            joint=joint,
        )
        keep = frozenset((*before, *chain.carried))
        factors, steps = eliminate(
            graph.factors, graph.variables, keep=keep, max_paths=settings.max_paths, is_mode=settings.is_mode
        )
        self.graph = graph
        self.steps = steps
        self.rest = [factor for factor in factors if not factor.variables]
        linked = [factor for factor in factors if factor.variables]
        states = (*before, *chain.carried)
        if not states:
            return Table(jnp.zeros(()), [factor.table for factor in self.rest], [step.logits for step in steps])
        lanes = graph.variables[states[-1]].lanes
        if any(set(graph.variables[name].lanes) != set(lanes) for name in states):
            raise WidthError(states, -1)
        count = math.prod(graph.variables[name].size for name in chain.carried)
        if count**2 > settings.max_paths:
            raise WidthError(states, count**2)
        scale = graph.variables[states[-1]].scale
        dims = (*states, *lanes)
        sizes = [len(graph.values[name]) for name in states]
        shape = tuple(size for size in _lane_sizes(graph, states[-1]))
        logits = jnp.zeros((*sizes, *shape))
        for factor in linked:
            logits = logits + relative(aligned(over_lanes(factor, lanes, graph.variables), dims), factor.scale, scale)
        groups = (count, count) if self.has_before else (count,)
        return Table(
            logits.reshape(*groups, *shape),
            [factor.table for factor in self.rest],
            [step.logits for step in steps],
        )

    def values(
        self, steps: list[Array], before: dict[str, Array], after: dict[str, Array], key: Key[Array, ""] | None
    ) -> dict[str, Array]:
        """Values of all sites of a step, given the carried states before and after."""
        assert self.graph is not None
        assigned = {**{name + _BEFORE: state for name, state in before.items()}, **after}
        filled = [step._replace(logits=logits) for step, logits in zip(self.steps, steps, strict=True)]
        states = draw_states(filled, assigned, self.graph.variables, key=key)
        return {name: self.graph.value_of(name, states[name]) for name in self.chain.specs}


def _lane_sizes(graph: Graph, name: str) -> list[int]:
    spec = graph.specs[name]
    return [size for axis, size in enumerate(spec.shape) if size > 1 and axis not in graph.joint[name]]


class Chain:
    """The discrete sites of one loop.

    Args:
        world: the world of the loop.
        body: its body.
        facts: the sites inside.
        carried: the sites that the next step depends on.
    """

    def __init__(self, world: World, body: Body, facts: Found, carried: Sequence[str]):
        self.world = world
        self.body = body
        self.specs: dict[str, Spec] = facts.specs
        self.facts = facts
        self.carried = tuple(carried)
        self.scales = {name: concrete_scale(scale) for name, scale in facts.scales.items()}
        self.tainted: frozenset[str] = frozenset()

    def counted(self, costs: dict[str, Array]) -> dict[str, Array]:
        """The costs that depend on a discrete site of the loop."""
        return {name: cost for name, cost in costs.items() if name in self.tainted}

    def find_tainted(self, init: PyTree, step: Slices) -> None:
        """Find the costs that depend on a discrete site of the loop, of this step or of the one before."""
        references = {name: spec.reference for name, spec in self.specs.items()}
        before = {name + _BEFORE: references[name] for name in self.carried}
        costs = trace_costs(lambda values: self.later(init, step, step)(values), {**references, **before})
        reads = reads_of(costs, [*references, *before])
        self.tainted = frozenset(name for name, found in reads.items() if found) | self.facts.forced | set(self.specs)

    def first(self, init: PyTree, step: Slices) -> Callable[[dict[str, Array]], dict[str, Array]]:
        """The costs of the first step."""
        return lambda values: self.body.step(init, step, values)[2].costs

    def later(self, carry: PyTree, before: Slices, step: Slices) -> Callable[[dict[str, Array]], dict[str, Array]]:
        """The costs of a step whose carry comes from the step before."""

        def costs(values: dict[str, Array]) -> dict[str, Array]:
            states = {name: value for name, value in values.items() if not name.endswith(_BEFORE)}
            put = {name: spec.reference for name, spec in self.specs.items()}
            put |= {name: values[name + _BEFORE] for name in self.carried}
            following, _, _ = self.body.step(carry, before, put)
            return self.body.step(following, step, states)[2].costs

        return costs


def sum_chain(
    world: World, body: Body, init: PyTree, steps: Slices, facts: Found
) -> tuple[PyTree, PyTree, dict[str, Array]] | None:
    """Sum out the discrete sites of a loop; `Settings.sum_loop` says what is returned."""
    carried = carried_sites(body, init, steps.at(0), facts)
    if carried is None:
        return None
    chain = Chain(world, body, facts, carried.sites)
    references = {name: spec.reference for name, spec in facts.specs.items()}

    def reference_step(carry: PyTree, step: Slices) -> tuple[PyTree, tuple]:
        following, y, found = body.step(carry, step, references)
        return following, (carry, y, found.costs)

    last, (carries, ys, costs) = jax.lax.scan(reference_step, init, steps, body.length)
    chain.find_tainted(init, steps.at(0))
    try:
        draws = _sum(chain, init, carries, steps)
    except WidthError:
        return None
    for name, cost in costs.items():
        if name not in chain.tainted:
            world.found.costs[name] = cost
            world.found.scales[name] = facts.scales[name]
    last, ys = _marked(world, body.name, carried, last, ys)
    return last, ys, draws


def _marked(world: World, name: str, carried: Carried, last: PyTree, ys: PyTree) -> tuple[PyTree, PyTree]:
    """Let what the loop hands out be seen to depend on its discrete sites."""
    if not (any(carried.leaves) or any(carried.outputs)):
        return last, ys
    world.found.tokens.add(name)
    token = world.tokens.get(name)
    if token is None:
        return last, ys

    def mark(tree: PyTree, flags: tuple[bool, ...]) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        marked = [
            jnp.where(token == 0, leaf, jnp.zeros_like(leaf)) if flag else leaf
            for leaf, flag in zip(leaves, flags, strict=True)
        ]
        return jax.tree.unflatten(structure, marked)

    return mark(last, carried.leaves), mark(ys, carried.outputs)


def _record(world: World, name: str, sites: frozenset[str], cost: Array, scale: float | None) -> None:
    """Hand on the density of a sum."""
    world.found.costs[name] = cost
    world.found.scales[name] = scale
    world.found.loops[name] = sites
    world.found.forced.add(name)


def _sum(chain: Chain, init: PyTree, carries: PyTree, steps: Slices) -> dict[str, Array]:
    """Sum over all paths; with a key in the world also draw one of them."""
    world = chain.world
    name = chain.body.name
    length = chain.body.length
    sites = chain.tainted
    if not chain.carried:
        link = Link(chain, has_before=False)
        tables = jax.vmap(lambda carry, step: link.table(chain.first(carry, step), {}))(carries, steps)
        for number, (factor, table) in enumerate(zip(link.rest, tables.rest, strict=True)):
            _record(world, f"{name}.{number}", factor.sites, table, concrete_scale(factor.scale))
        return _draw_apart(chain, link, tables, length)

    later = Link(chain, has_before=True)
    first = Link(chain, has_before=False)
    joint: dict[str, tuple[int, ...]] = {}
    tables = None
    if length > 1:
        carries = jax.tree.map(lambda leaf: leaf[:-1], carries)

        def at(carry: PyTree, before: Slices, step: Slices) -> Table:
            return later.table(chain.later(carry, before, step), {})

        tables = jax.vmap(at)(carries, steps.at(slice(None, -1)), steps.at(slice(1, None)))
        assert later.graph is not None
        joint = {site: later.graph.joint[site] for site in chain.specs}
    start = first.table(chain.first(init, steps.at(0)), joint)
    assert first.graph is not None
    if any(first.graph.joint[site] != axes for site, axes in joint.items()):
        raise WidthError(chain.carried, -1)
    is_mode = world.settings.is_mode
    total = start.logits
    messages = None
    if tables is not None:
        if total.shape[0] <= _FEW_STATES and world.key is None:
            product = chain_product(tables.logits, is_mode)
            total = reduce_states(total[:, None] + product, 0, is_mode)
        else:
            messages = backward_messages(tables.logits, is_mode)
            total = total + messages[0]
    scale = first.graph.variables[chain.carried[0]].scale
    _record(world, name, sites, reduce_states(total, 0, is_mode), concrete_scale(scale))
    for link, found in ((first, start), (later, tables)):
        if found is None:
            continue
        for number, (factor, table) in enumerate(zip(link.rest, found.rest, strict=True)):
            label = f"{name}.{'later' if link is later else 'first'}{number}"
            _record(world, label, factor.sites, table, concrete_scale(factor.scale))
    # What the first step does not let depend on any discrete site is part of the sum all the same.
    missing = chain.tainted - frozenset().union(*(factor.sites for factor in first.graph.factors))
    if missing:
        plain = chain.first(init, steps.at(0))({name: spec.reference for name, spec in chain.specs.items()})
        for site in sorted(missing):
            _record(world, f"{name}.{site}", frozenset([site]), plain[site], chain.scales[site])
    return _draw_path(chain, first, start, later, tables, messages)


def _draw_apart(chain: Chain, link: Link, tables: Table, length: int) -> dict[str, Array]:
    """Draw the sites of a loop whose steps do not depend on each other."""
    key = chain.world.key
    if key is None:
        return {}
    keys = jr.split(key, length)
    is_mode = chain.world.settings.is_mode
    return jax.vmap(lambda steps, key: link.values(steps, {}, {}, None if is_mode else key))(tables.steps, keys)


def _draw_path(
    chain: Chain, first: Link, start: Table, later: Link, tables: Table | None, messages: Array | None
) -> dict[str, Array]:
    """Draw a path of the chain forward, and the other sites of every step given it."""
    key = chain.world.key
    if key is None:
        return {}
    is_mode = chain.world.settings.is_mode
    keys = jr.split(key, 2 * chain.body.length).reshape(2, -1)

    def pick(logits: Array, key: Key[Array, ""]) -> Int[Array, "..."]:
        return jnp.argmax(logits, 0) if is_mode else jr.categorical(key, logits, 0)

    def own(key: Key[Array, ""]) -> Key[Array, ""] | None:
        return None if is_mode else key

    def split(state: Int[Array, "..."], graph: Graph) -> dict[str, Array]:
        sizes = tuple(len(graph.values[name]) for name in chain.carried)
        return dict(zip(chain.carried, jnp.unravel_index(state, sizes), strict=True))

    assert first.graph is not None
    total = start.logits if messages is None else start.logits + messages[0]
    state = pick(total, keys[0, 0])
    values = first.values(start.steps, {}, split(state, first.graph), own(keys[1, 0]))
    values = jax.tree.map(lambda leaf: leaf[None], values)
    if tables is None:
        return values
    assert later.graph is not None and messages is not None
    graph = later.graph

    def advance(state: Int[Array, "..."], inputs: tuple) -> tuple[Int[Array, "..."], tuple]:
        matrix, message, key = inputs
        row = jnp.take_along_axis(matrix, state[None, None], 0)[0]
        following = pick(row + message, key)
        return following, (state, following)

    _, (before, after) = jax.lax.scan(advance, state, (tables.logits, messages[1:], keys[0, 1:]))

    def at(steps: list[Array], before: Array, after: Array, key: Key[Array, ""]) -> dict[str, Array]:
        return later.values(steps, split(before, graph), split(after, graph), own(key))

    rest = jax.vmap(at)(tables.steps, before, after, keys[1, 1:])
    return jax.tree.map(lambda one, others: jnp.concatenate([one, others]), values, rest)
