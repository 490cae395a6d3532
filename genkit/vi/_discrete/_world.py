"""Runs of a model that nothing outside sees: the log-density of every site at given values, loops summed out."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Key, PyTree
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger

from genkit._core._checks import is_concrete
from genkit.vi._discrete._graph import Spec
from genkit.vi._discrete._states import lane_costs, spec_of
from genkit.vi._runtime._frame import changed


class Settings(NamedTuple):
    """Facts that hold for all runs of a model.

    Attributes:
        chosen: the sites to sum out, None for all discrete ones.
        bounds: largest values of sites whose support has no end.
        max_paths: entries a table may have.
        is_mode: maximize instead of summing.
        sum_loop: sums out the discrete sites of a loop: `(world, body, init, steps, facts)` to the last carry, the
            outputs and draws; None where the steps do not make a Markov chain.
        unrolled: loops that are written out step by step.
    """

    chosen: frozenset[str] | None
    bounds: Mapping[str, int]
    max_paths: int
    is_mode: bool
    sum_loop: Callable[..., tuple[PyTree, PyTree, dict[str, Array]] | None]
    unrolled: frozenset[str] = frozenset()

    def sums_out(self, msg: dict) -> bool:
        """True for the message of a latent discrete site that is to go."""
        if msg["is_observed"] or not msg["fn"].support.is_discrete:
            return False
        return self.chosen is None or msg["name"] in self.chosen


@dataclasses.dataclass
class Given:
    """Values that the visible run of a model has taken, by site.

    Attributes:
        values: of latent sites; those in loops stacked.
        params: of `numpyro.param` sites.
        indices: of subsampled plates.
        keys: answers to `numpyro.prng_key()`, in order.
    """

    values: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    params: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    indices: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    keys: list[PyTree] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Found:
    """What a run has met.

    Attributes:
        costs: log-densities by site, one entry for each lane.
        scales: of each site, None for one.
        specs: the discrete sites to sum out.
        latent: the other latent sites.
        discrete: all discrete latent sites, whether they are summed out or not.
        observed: the observed sites.
        loops: for each loop that was summed out the sites inside; its cost goes by the loop's name.
        forced: costs that count although they may read no discrete site.
        tokens: loops that hand out a value which depends on a discrete site inside.
        draws: values of discrete sites in loops.
        steps: for each name made in a loop that is written out the site and the step.
    """

    costs: dict[str, Array] = dataclasses.field(default_factory=dict)
    scales: dict[str, ArrayLike | None] = dataclasses.field(default_factory=dict)
    specs: dict[str, Spec] = dataclasses.field(default_factory=dict)
    latent: set[str] = dataclasses.field(default_factory=set)
    discrete: set[str] = dataclasses.field(default_factory=set)
    observed: set[str] = dataclasses.field(default_factory=set)
    loops: dict[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    forced: set[str] = dataclasses.field(default_factory=set)
    tokens: set[str] = dataclasses.field(default_factory=set)
    draws: dict[str, Array] = dataclasses.field(default_factory=dict)
    steps: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)

    def sites(self, cost: str) -> frozenset[str]:
        """The model's sites behind a cost."""
        if cost in self.steps:
            return frozenset([self.steps[cost][0]])
        return self.loops.get(cost, frozenset([cost]))


class World(Messenger):
    """Answers every message of a model and lets none out.

    Args:
        settings: what to sum out.
        given: values of everything that stays; None while only shapes matter.
        states: values of the discrete sites; others take their first outcome.
        tokens: a zero for each loop, which marks what the loop hands out.
        key: typed PRNG key to draw the discrete sites in loops with, or None.
        path: the loops around.
    """

    def __init__(
        self,
        settings: Settings,
        given: Given | None,
        states: Mapping[str, Array],
        *,
        tokens: Mapping[str, Array] | None = None,
        key: Key[Array, ""] | None = None,
        path: str = "",
    ):
        super().__init__()
        self.settings = settings
        self.given = given
        self.states = states
        self.tokens = dict(tokens or {})
        self.key = key
        self.path = path
        self.found = Found()
        self.num_loops = 0
        self.num_keys = 0
        self.step: int | None = None  # of a loop that is written out

    def process_message(self, msg: dict) -> None:
        """Answer one message."""
        match msg["type"]:
            case "sample":
                self._sample(msg)
            case "param":
                if self.given is not None:
                    msg["value"] = self.given.params[msg["name"]]
            case "plate":
                if msg["value"] is None and self.given is not None:
                    msg["value"] = self.given.indices[msg["name"]]
                elif msg["value"] is None:
                    msg["value"] = jnp.arange(msg["args"][1])
            case "prng_key":
                self._prng_key(msg)
            case "control_flow":
                if len(msg["args"]) == 4:  # numpyro's `cond`, which then goes on by itself
                    pred, true_fn, false_fn, operand = msg["args"]
                    msg["args"] = (pred, _without_latents(true_fn), _without_latents(false_fn), operand)
                else:
                    f, init, xs, length, reverse = msg["args"]
                    carry, ys = self.loop(f, init, xs, length, reverse)
                    msg["value"] = ((length, None, carry), (PytreeTrace({}), ys))
            case _:
                pass
        msg["stop"] = True

    def _prng_key(self, msg: dict) -> None:
        if self.given is None or self.num_keys >= len(self.given.keys):
            msg["value"] = jr.key(0)
        else:
            msg["value"] = self.given.keys[self.num_keys]
        self.num_keys += 1

    def _sample(self, msg: dict) -> None:
        site = msg["name"]
        name = site
        if self.step is not None:
            name = f"<{site} at step {self.step}>"
            self.found.steps[name] = (site, self.step)
        if name in self.found.costs:
            raise ValueError(f"`name` must be new at every site of a model; got {site!r} twice.")
        distribution = msg["fn"]
        sample_shape = tuple(msg["kwargs"].get("sample_shape", ()))
        if sample_shape:
            distribution = distribution.expand(sample_shape + tuple(distribution.batch_shape))
            msg["kwargs"]["sample_shape"] = ()
        spec = None
        if not msg["is_observed"] and distribution.support.is_discrete:
            self.found.discrete.add(site)
        if msg["is_observed"]:
            self.found.observed.add(site)
        elif msg["value"] is None and self.settings.sums_out(msg):
            spec = spec_of(site, distribution, self.settings.bounds)
            self.found.specs[name] = spec
            msg["value"] = self.states.get(name, spec.reference)
        elif msg["value"] is None:  # else a handler inside the model has put it
            self.found.latent.add(site)
            msg["value"] = self._value(site, distribution)
        self.found.costs[name] = lane_costs(distribution, msg["value"], spec)
        self.found.scales[name] = msg["scale"]

    def _value(self, site: str, distribution: dist.Distribution) -> PyTree:
        if self.given is None:
            # Nothing is computed from it: only its shape and kind matter.
            return jnp.zeros(distribution.shape(), int if distribution.support.is_discrete else float)
        value = self.given.values[site]
        return value if self.step is None else jax.tree.map(lambda leaf: leaf[self.step], value)

    def loop(self, f: Callable, init: PyTree, xs: PyTree, length: int | None, reverse: bool) -> tuple[PyTree, PyTree]:
        """Run a loop; discrete sites inside are summed out."""
        name = f"{self.path}<loop {self.num_loops}>"
        if self.step is not None:
            raise ValueError(
                "`model` must not hold a loop inside a loop that is written out, because its carry says more of the "
                "discrete sites than their last state; got one in "
                f"{self.path or 'the model'}. Let the carry of the outer loop be the last state alone, or write the "
                "inner loop with a plate."
            )
        self.num_loops += 1
        if length is None:
            length = jax.tree.leaves(xs)[0].shape[0]
        assert length is not None
        init = jax.tree.map(jnp.asarray, init)
        flip = _flipped if reverse else lambda tree: tree
        body = Body(self, name, f, length)
        facts = body.discover(init, jax.tree.map(lambda x: x[0], xs))
        steps = Slices(flip(xs), flip(self.slices(facts.latent)))
        if not facts.specs:
            carry, ys, costs = body.run(init, steps)
            self.found.costs.update(costs)
            self._add_facts(facts)
            return carry, flip(ys)
        self._add_facts(facts)
        result = None
        if name not in self.settings.unrolled:
            result = self.settings.sum_loop(self, body, init, steps, facts)
        if result is None:
            return self._written_out(f, init, xs, length, reverse)
        carry, ys, draws = result
        self.found.draws.update(flip(draws))
        return carry, flip(ys)

    def _add_facts(self, facts: Found) -> None:
        self.found.latent |= facts.latent
        self.found.discrete |= facts.discrete
        self.found.observed |= facts.observed
        if not facts.specs:
            self.found.scales.update(facts.scales)
            self.found.loops.update(facts.loops)
            self.found.forced |= facts.forced

    def _written_out(self, f: Callable, init: PyTree, xs: PyTree, length: int, reverse: bool) -> tuple[PyTree, PyTree]:
        """The loop step by step, each with sites of its own."""
        carry = init
        outs = []
        for step in reversed(range(length)) if reverse else range(length):
            with self.at_step(step):
                carry, y = f(carry, jax.tree.map(lambda x, step=step: x[step], xs))
            outs.append(y)
        if reverse:
            outs.reverse()
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)

    @contextmanager
    def at_step(self, step: int) -> Iterator[None]:
        """Name sites after a step of a loop that is written out."""
        self.step = step
        try:
            yield
        finally:
            self.step = None

    def slices(self, names: set[str]) -> dict[str, PyTree]:
        """Stacked values of the latent sites in a loop."""
        if self.given is None:
            return {}
        return {name: self.given.values[name] for name in sorted(names)}

    def child(
        self, name: str, values: dict[str, PyTree], states: Mapping[str, Array], key: Key[Array, ""] | None
    ) -> "World":
        """The world of one step of a loop."""
        given = None
        if self.given is not None:
            given = dataclasses.replace(self.given, values={**self.given.values, **values}, keys=[])
        return World(self.settings, given, states, tokens=self.tokens, key=key, path=f"{name}/")


class Slices(NamedTuple):
    """Everything that comes in step by step: the loop's input and the values of latent sites."""

    xs: PyTree
    values: dict[str, PyTree]

    def at(self, where: int | slice) -> "Slices":
        """Some steps."""
        return jax.tree.map(lambda leaf: leaf[where], self)


class Body:
    """The body of a loop as a function.

    Args:
        world: the world the loop is in.
        name: of the loop.
        f: numpyro's `f(carry, x)`.
        length: number of steps.
    """

    def __init__(self, world: World, name: str, f: Callable, length: int):
        self.world = world
        self.name = name
        self.f = f
        self.length = length

    def step(
        self, carry: PyTree, step: Slices, states: Mapping[str, Array], key: Key[Array, ""] | None = None
    ) -> tuple[PyTree, PyTree, Found]:
        """One step at given values of its discrete sites: the next carry, the output, and what was met."""
        child = self.world.child(self.name, step.values, states, key)
        with child:
            carry, y = self.f(carry, step.xs)
        return jax.tree.map(jnp.asarray, carry), y, child.found

    def discover(self, init: PyTree, x: PyTree) -> Found:
        """The facts about its sites that are no arrays."""
        kept: list[Found] = []

        def run(carry: PyTree, x: PyTree) -> None:
            # Shapes are all that matters, so that values need not be at hand.
            child = World(self.world.settings, None, {}, tokens=self.world.tokens, path=f"{self.name}/")
            with child:
                self.f(carry, x)
            kept.append(child.found)

        jax.eval_shape(run, init, x)
        found = kept[-1]
        return dataclasses.replace(found, costs={}, draws={})

    def run(self, init: PyTree, steps: Slices) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """All steps of a loop without discrete sites."""

        def body(carry: PyTree, step: Slices) -> tuple[PyTree, tuple]:
            carry, y, found = self.step(carry, step, {})
            return carry, (y, found.costs)

        carry, (ys, costs) = jax.lax.scan(body, init, steps, self.length)
        return carry, ys, costs


def run_world(
    call: Callable[[], object],
    settings: Settings,
    given: Given | None,
    states: Mapping[str, Array],
    *,
    tokens: Mapping[str, Array] | None = None,
    key: Key[Array, ""] | None = None,
) -> Found:
    """Run a model apart from everything around it."""
    world = World(settings, given, states, tokens=tokens, key=key)
    with changed(run=None, frame=None, enumeration=None), world:
        call()
    return world.found


class _Branch(Messenger):
    """Refuses latent sites in the branch of a `cond`."""

    def process_message(self, msg: dict) -> None:
        """Look at one message."""
        if msg["type"] == "sample" and not msg["is_observed"]:
            raise ValueError(
                f"`model` must draw its latent sites outside the branches of `cond` to have discrete sites summed out; "
                f"got {msg['name']!r} inside one. Draw it before, and use it in the branch."
            )


def _without_latents(fn: Callable) -> Callable:
    def branch(operand: PyTree) -> PyTree:
        with _Branch():
            return fn(operand)

    return branch


def _flipped(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.flip(leaf, 0), tree)


def concrete_scale(scale: ArrayLike | None) -> float | None:
    """A scale as a number, which may leave a loop."""
    if scale is None:
        return None
    if not is_concrete(scale) or np.ndim(scale) > 0:
        raise ValueError(
            "`scale` must be one Python number at sites in a loop with discrete sites; got an array of shape "
            f"{np.shape(scale)}. Scale inside the body is for subsampled plates."
        )
    return float(np.asarray(scale))
