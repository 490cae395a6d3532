"""Loops and maps that may hold sites."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Key, PyTree
from numpyro.distributions.constraints import Constraint

from genkit._core._checks import check
from genkit.vi._programs import _elsewhere
from genkit.vi._programs._outside import LoopEdge, advance_seeds, seeded_for_step
from genkit.vi._runtime._enumeration import is_exact, many, outcomes
from genkit.vi._runtime._frame import (
    Context,
    Frame,
    Override,
    Pending,
    Score as ScoreTerm,
    active,
    current_frame,
    current_run,
)
from genkit.vi._runtime._keys import fold_name
from genkit.vi._runtime._record import Given, Loop, Record, Site
from genkit.vi._runtime._stop import NeedsContinuations, Stop
from genkit.vi._runtime._strategy import dice_factor
from genkit.vi._strategies._alternatives import contrast


class Collected(NamedTuple):
    """The arrays a body hands out of its loop, besides its result: sites by name, and the terms of its frame."""

    values: dict[str, PyTree] = {}  # noqa: RUF012 - never mutated
    auxiliary: dict[str, PyTree] = {}  # noqa: RUF012
    indices: dict[str, PyTree] = {}  # noqa: RUF012
    deterministic: dict[str, PyTree] = {}  # noqa: RUF012
    log_prob: dict[str, ArrayLike] = {}  # noqa: RUF012 - scales included
    scores: ArrayLike | None = None
    group: ArrayLike | None = None
    log_weight: ArrayLike | None = None
    zeros: ArrayLike | None = None
    pending: dict[str, tuple[Array, Array]] = {}  # noqa: RUF012 - alternatives and their coefficients

    def without_terms(self) -> "Collected":
        """The sites alone, for a loop whose terms an earlier run has counted."""
        return self._replace(scores=None, group=None, log_weight=None, zeros=None, pending={})


class SiteFacts(NamedTuple):
    """Facts about a site that are no arrays."""

    observed: bool
    auxiliary: bool
    support: Constraint | None
    num_given: int  # steps at the front whose value is given from outside


@dataclasses.dataclass
class BodyFacts:
    """Facts about a body that are no arrays, written while it is traced."""

    sites: dict[str, SiteFacts] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    keep_gradient: dict[str, bool] = dataclasses.field(default_factory=dict)
    tape: list[PyTree] = dataclasses.field(default_factory=list)  # outcomes of the base run, while enumerating


class Remembered(NamedTuple):
    """A loop that has run."""

    result: PyTree
    collected: Collected
    facts: BodyFacts


Execute = Callable[[Key[Array, ""] | None, BodyFacts], tuple[PyTree, Collected]]


def run_body(
    fn: Callable[[], PyTree],
    values: dict[str, Given],
    key: Key[Array, ""] | None,
    index: ArrayLike,
    facts: BodyFacts,
    *,
    loop: Loop | None = None,
    plate: str | None = None,
) -> tuple[PyTree, Collected]:
    """Run one step under its own frame and record; everything collected leaves as arrays.

    Args:
        fn: the body.
        values: the values given for its latent sites.
        key: the key of this step, or None.
        index: the number of this step.
        facts: filled with what is no array.
        loop: the loop as sites see it; None for branches and particles, which do not stack their sites.
        plate: the plate along which scores stay apart, or None.

    Returns:
        The result of the body and what it collected.
    """
    run = current_run()
    parent = current_frame()
    frame = None
    if parent is not None:
        frame = Frame(parent.context._replace(key=key), parent, (*parent.path, index))
    with active(frame):
        if run is None:
            result = fn()
            record = Record()
        else:
            with LoopEdge(len(run.loops)), seeded_for_step(run, index), run.nested(loop, values, key, frame) as record:
                result = fn()
    for name, site in record.sites.items():
        num_given = record.num_given.get(name, 0)
        facts.sites[name] = SiteFacts(site.observed, site.auxiliary, site.support, num_given)
    facts.used |= record.used
    collected = Collected(
        values=dict(record.values),
        auxiliary=dict(record.auxiliary),
        indices=dict(record.indices),
        deterministic=dict(record.deterministic),
        log_prob={name: _with_scale(site) for name, site in record.sites.items()},
    )
    if frame is None:
        return result, collected
    facts.keep_gradient.update({name: pending.keep_gradient for name, pending in frame.pending.items()})
    return result, collected._replace(
        scores=_sum([along_plate(s.log_prob, s.plates, plate) for s in frame.scores]),
        group=_sum([jnp.sum(s.log_prob) for s in frame.group]),
        log_weight=frame.log_weight,
        zeros=_sum([jnp.sum(zero) for zero in frame.zeros]),
        pending={name: (pending.alts, pending.coefficients) for name, pending in frame.pending.items()},
    )


def _with_scale(site: Site) -> ArrayLike:
    # Scales do not leave a body: two branches may scale the same site differently.
    return site.log_prob if site.scale is None else site.log_prob * site.scale


def _sum(parts: list[Array]) -> Array | None:
    if not parts:
        return None
    return sum(parts[1:], parts[0])


def along_plate(log_prob: ArrayLike, plates: tuple, name: str | None) -> Array:
    """Sum a site's log-density over everything but the plate `name` (over everything, for None)."""
    if name is None:
        return jnp.sum(log_prob)
    dims = [frame.dim for frame in plates if frame.name == name]
    if not dims:
        raise ValueError(
            f"`plate` must hold every site that is weighed per member; got a site outside plate {name!r} "
            f"(its plates: {[frame.name for frame in plates]}). Give sites outside the plate their own term, or "
            "leave `plate` out."
        )
    axis = jnp.ndim(log_prob) + dims[0]
    return jnp.sum(log_prob, tuple(i for i in range(jnp.ndim(log_prob)) if i != axis))


def _merge(collected: Collected, facts: BodyFacts, scope: str) -> None:
    """Put what a loop collected into the surrounding record and frame."""
    run = current_run()
    if run is not None and run.is_measured:
        _merge_sites(run.record, collected, facts, scope)
    frame = current_frame()
    if frame is None:
        return
    if collected.scores is not None:
        frame.scores.append(ScoreTerm(scope, jnp.sum(collected.scores), ()))
    if collected.group is not None:
        frame.group.append(ScoreTerm(scope, jnp.sum(collected.group), ()))
    if collected.log_weight is not None:
        frame.add_log_weight(jnp.sum(collected.log_weight))
    if collected.zeros is not None:
        frame.zeros.append(jnp.sum(collected.zeros))
    if frame.inner:
        for name, (alts, coefficients) in collected.pending.items():
            frame.pending[name] = Pending(alts, coefficients, facts.keep_gradient[name])


def _merge_sites(record: Record, collected: Collected, facts: BodyFacts, scope: str) -> None:
    clash = set(collected.log_prob) & set(record.sites)
    if clash:
        raise ValueError(f"`name` must be new at every site of a program; got {sorted(clash)[0]!r} twice.")
    record.values.update(collected.values)
    record.auxiliary.update(collected.auxiliary)
    record.indices.update(collected.indices)
    record.deterministic.update(collected.deterministic)
    record.used |= facts.used
    for name, site in facts.sites.items():
        if site.num_given:  # of a value given for the first steps only the rest is latent
            record.values[name] = record.values[name][site.num_given :]
        log_prob = collected.log_prob[name]
        support = site.support
        if support is not None and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(support)):
            support = None  # its bounds belong to one step and must not leave the loop
        record.sites[name] = Site(log_prob, None, (), site.observed, site.auxiliary, scope, None, support)


def run_loop(kind: str, execute: Execute) -> PyTree:
    """Run a loop inside the current frame: remember its result, or replay it for its alternatives."""
    frame = current_frame()
    run = current_run()
    facts = BodyFacts()
    if frame is None:
        assert run is not None  # callers outside both went elsewhere
        key = None
        if run.key is not None:
            key = fold_name(run.key, f"{kind}{len(run.record.sites)}", run.record.hashes)
        result, collected = execute(key, facts)
        advance_seeds(run)
        _merge(collected, facts, kind)
        return result
    frame.check_trace(f"gk.vi.{kind}")
    name = frame.fresh(kind)
    address = "/".join((*frame.scope, name))
    if address in frame.context.memo:
        # The run that drew the loop has counted its scores and weights.
        known: Remembered = frame.context.memo[address]
        _merge(known.collected.without_terms(), known.facts, address)
        return known.result
    state = outcomes()
    overrides = [entry for site, entry in frame.context.override.items() if site.startswith(address + "/")]
    start = 0
    if state is not None:
        start = len(state.log)
        if overrides:
            state.tape = list(overrides[0].tape)
    with frame.within(name):
        result, collected = execute(frame.key(address), facts)
    advance_seeds(run)
    if state is not None:
        facts.tape = state.log[start:]
    remembered = Remembered(result, collected, facts)
    if collected.pending and not frame.inner and not overrides:
        resume = _resume_alternatives(address, remembered)
        raise Stop(frame.context.options.token, NeedsContinuations(address, resume, 1))
    _merge(collected, facts, address)
    frame.memo[address] = remembered
    return result


def _resume_alternatives(address: str, base: Remembered) -> Callable[..., Array]:
    """Compare the loop as it ran with the loop replayed under each alternative of each step."""

    def resume(run: Callable, context: Context) -> Array:
        inner = context._replace(copies=False)
        # The scores of the loop itself belong to each replay, so the remembered base run must add its own.
        value = run(inner._replace(memo={**inner.memo, address: base})) * _factor_of(base.collected)
        out = value
        if base.collected.zeros is not None:
            out = out + jnp.sum(base.collected.zeros)
        for site, (alts, coefficients) in base.collected.pending.items():
            shape = np.shape(coefficients)
            steps = np.stack(np.unravel_index(np.arange(int(np.prod(shape))), shape), -1)[:, :-1]
            flat = alts.reshape(-1, *alts.shape[len(shape) :])

            def replay(pair: tuple, site: str = site) -> Array:
                step, alternative = pair
                forced = Override(tuple(step), alternative, base.facts.tape)
                return run(inner._replace(override={**inner.override, site: forced}))

            values = many(replay, (steps, flat))
            out = out + contrast(value, values, coefficients.reshape(-1), base.facts.keep_gradient[site])
        return out

    return resume


def _factor_of(collected: Collected) -> Array:
    """The factor a remembered loop contributes to what follows it."""
    factor = jnp.ones(())
    if collected.scores is not None:
        factor = factor * dice_factor(jnp.sum(collected.scores))
    if collected.log_weight is not None:
        factor = factor * jnp.exp(jnp.sum(collected.log_weight))
    return factor


class _Slices:
    """The values given to a program, as the steps of one loop see them."""

    def __init__(self, length: int):
        run = current_run()
        self.values: dict[str, Given] = {}
        self.depth = 0
        if run is not None:
            self.values = run.values
            self.depth = len(run.loops)
        self.stacked: dict[str, PyTree] = {}
        for name, given in self.values.items():
            shape = np.shape(given.current)
            if given.num_sliced == self.depth and shape and shape[0] == length:
                self.stacked[name] = given.current

    def at(self, slices: dict[str, PyTree]) -> dict[str, Given]:
        """The values of one step, given the slices of the stacked ones."""
        inside = dict(self.values)
        for name, part in slices.items():
            inside[name] = Given(self.values[name].whole, part, self.depth + 1)
        return inside


def _step_key(key: Key[Array, ""] | None, index: ArrayLike) -> Key[Array, ""] | None:
    return None if key is None else jr.fold_in(key, index)


def scan(
    f: Callable, init: PyTree, xs: PyTree = None, length: int | None = None, *, reverse: bool = False
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` whose body may hold sites.

    Inside a program the values of a site are stacked along a new leading axis under the site's name. Local strategies
    run once; `LocalExpectation`, `MVD` and `Enum` replay the loop once per step and alternative. Handlers around the
    loop (`condition`, `substitute`, `replay`, `mask`, `scale`, ...) may hold the stacked array, cut to each step; a
    value for the first steps only leaves the site latent at the others.

    Args:
        f: `(carry, x) -> (carry, y)`; may hold sites.
        init: the initial carry.
        xs: arrays with a common leading axis, or None.
        length: number of steps, needed where `xs` is None.
        reverse: run from the last step to the first.

    Returns:
        The final carry and the stacked outputs.

    Raises:
        ValueError: if neither `xs` nor `length` says the number of steps.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> step = lambda m: lambda total, _: (total + vi.sample("x", dist.Normal(m, 1.0)), None)
        >>> fn = lambda m: vi.scan(step(m), jnp.zeros(()), None, length=3)[0]
        >>> float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.0))
        3.0
    """
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(xs)}
    if length is not None:
        sizes.add(length)
    check(len(sizes) == 1, "length", "given, and equal to the leading axis of every array in `xs`", sorted(sizes))
    size = sizes.pop()
    if _elsewhere.is_elsewhere():
        return _elsewhere.scan(f, init, xs, size, reverse)
    slices = _Slices(size)

    def execute(key: Key[Array, ""] | None, facts: BodyFacts) -> tuple[PyTree, Collected]:
        def step(carry: PyTree, item: tuple) -> tuple[PyTree, tuple]:
            index, x, parts = item
            body = lambda: f(carry, x)
            (carry, y), out = run_body(
                body, slices.at(parts), _step_key(key, index), index, facts, loop=Loop(size, index)
            )
            return carry, (y, out)

        # NumPy's counter stays concrete where `exact` unrolls the loop.
        items = (np.arange(size), xs, slices.stacked)
        carry, (ys, out) = _scan_or_unroll(step, init, items, size, reverse)
        return (carry, ys), out

    return run_loop("scan", execute)


def _scan_or_unroll(step: Callable, init: PyTree, items: PyTree, size: int, reverse: bool) -> tuple[PyTree, PyTree]:
    """`lax.scan`, unrolled while draws are being enumerated."""
    if not is_exact():
        return jax.lax.scan(step, init, items, reverse=reverse)
    carry = init
    outs = []
    order = range(size - 1, -1, -1) if reverse else range(size)
    for i in order:
        carry, out = step(carry, jax.tree.map(lambda a, i=i: a[i], items))
        outs.append(out)
    if reverse:
        outs.reverse()
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def vmap(f: Callable, in_axes: int | tuple | None = 0) -> Callable:
    """`jax.vmap` of a function that may hold sites: every lane draws for itself.

    Inside a program the values of a site get a new leading axis under the site's name.

    Args:
        f: the function of one lane.
        in_axes: the mapped axis, or one per positional argument, as in `jax.vmap`; None for arguments not mapped.

    Returns:
        The mapped function of positional arguments.

    Raises:
        ValueError: if no argument is mapped or sizes differ.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> lane = lambda m: lambda w: w * vi.sample("x", dist.Normal(m, 1.0))
        >>> fn = lambda m: jnp.sum(vi.vmap(lane(m))(jnp.arange(3.0)))
        >>> float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.0))
        3.0
    """

    def mapped(*args: PyTree) -> PyTree:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        check(len(axes) == len(args), "in_axes", "one entry per positional argument", axes)
        moved = []
        for arg, axis in zip(args, axes, strict=True):
            if axis is not None:
                arg = jax.tree.map(lambda leaf, axis=axis: jnp.moveaxis(leaf, axis, 0), arg)
            moved.append(arg)
        mapped_args = [arg for arg, axis in zip(moved, axes, strict=True) if axis is not None]
        sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(mapped_args)}
        check(len(sizes) == 1, "in_axes", "such that all mapped arguments have one common size", sorted(sizes))

        def lane(items: list) -> PyTree:
            rest = iter(items)
            return f(*[arg if axis is None else next(rest) for arg, axis in zip(moved, axes, strict=True)])

        return _map_lanes(lane, mapped_args, sizes.pop())

    return mapped


def _map_lanes(lane: Callable, items: list, size: int) -> PyTree:
    """Run one lane per leading entry of `items`."""
    if _elsewhere.is_elsewhere():
        return _elsewhere.vmap(lane, items, size)
    slices = _Slices(size)

    def execute(key: Key[Array, ""] | None, facts: BodyFacts) -> tuple[PyTree, Collected]:
        def one(item: tuple) -> tuple[PyTree, Collected]:
            index, x, parts = item
            body = lambda: lane(x)
            return run_body(body, slices.at(parts), _step_key(key, index), index, facts, loop=Loop(size, index))

        return many(one, (np.arange(size), items, slices.stacked))

    return run_loop("vmap", execute)
