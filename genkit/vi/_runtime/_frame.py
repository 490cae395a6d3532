"""Frames: the bookkeeping of one run of a function under `E`.

A run either finishes, or stops at the first site whose strategy needs several continuations; that site's strategy is
then given `k`, which runs the same Python function again with everything drawn so far remembered. A frame is one such
run: the values it has drawn, the scores collected on the way, and what is remembered from the run before. Three
examples, with `b ~ Bernoulli(p)` and `cost = 1 + 2 b`:

1. **A site that needs one continuation** (`Score()`). The frame draws `b = 1`, keeps `scores = [log q(1)]`, and runs to
   the end. The result is closed as `cost * dice_factor(log q(1))`: the value 3, the gradient `3 d log q(1)`.

2. **A site that needs two** (`Enum()`). The frame stops at `b` with `NeedsContinuations`. The strategy calls `k(0)` and
   `k(1)`; each opens a new frame whose context remembers `{"b": 0}` or `{"b": 1}`, finds the value there, draws nothing
   and returns its own closed scalar. The strategy returns `q(0) k(0) + q(1) k(1)`.

3. **Two sites, `a` by score and then `b` by enumeration.** The first frame draws `a`, collects its score, and stops at
   `b`. The frames of `k` remember `a`: they reuse its value but not its score. The first frame multiplies the score of
   `a` into what the strategy of `b` returns, so that every score is counted once, and runs nest freely.

The body of `gk.vi.scan`, `vmap` or `cond` has an inner frame (`parent` is set). It cannot be stopped; what it collects
leaves the loop as arrays, and a site that needs alternatives leaves them there as `Pending`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Key, PyTree

from genkit.vi._runtime._keys import NameHashes, fold_name, trace_state
from genkit.vi._runtime._record import AbstractRun
from genkit.vi._runtime._stop import NoDraws, Outcomes
from genkit.vi._runtime._strategy import Strategy, dice_factor


# Cap on the paths that are enumerated jointly, unless the caller gives another.
MAX_PATHS = 4096


class Options(NamedTuple):
    """Settings that stay fixed over all runs below one `E`."""

    token: object
    max_paths: int
    enumerate: bool
    sense: int
    baselines: list


class Override(NamedTuple):
    """A replay of a loop puts `alternative` at one step of one site."""

    steps: tuple
    alternative: PyTree
    tape: list


class Context(NamedTuple):
    """Inputs of one run: its key, remembered values, and the number of continuations around it."""

    options: Options
    key: Key[Array, ""] | None
    memo: dict[str, PyTree]
    override: dict[str, Override]
    paths: int = 1
    copies: bool = False


class Score(NamedTuple):
    """The score of one site: its log-density, of the site's batch shape, and the plates that shape belongs to."""

    address: str
    log_prob: ArrayLike
    plates: tuple


class Term(NamedTuple):
    """A part of the objective together with the scores that must multiply it (one shape for all three)."""

    value: Array
    score: Array | None
    group: Array | None


class Pending(NamedTuple):
    """Alternatives a looped site asks for: outcomes `alts`, zero-valued `coefficients` carrying the gradient."""

    alts: Array
    coefficients: Array
    keep_gradient: bool


class Decomposed(NamedTuple):
    """A scalar computed in this run, and its terms, each with only the scores it needs (None: all scores)."""

    value: Array
    terms: list[Term] | None


class Frame:
    """One run: addresses, remembered values, and the score terms collected on the way.

    Args:
        context: what the run is given.
        parent: the frame around a loop or branch, whose body this frame runs.
        path: the steps of the loops this frame is in, outermost first.
    """

    def __init__(self, context: Context, parent: "Frame | None" = None, path: tuple = ()):
        self.context = context
        self.parent = parent
        self.path = path
        self.state = trace_state()
        self.scope: tuple[str, ...] = ()
        self.forced: Strategy | None = None
        self.fallback: Strategy | None = None
        if parent is not None:
            self.scope = parent.scope
            self.forced = parent.forced
            self.fallback = parent.fallback
        self.counts: dict[str, int] = {}
        self.seen: set[str] = set()
        self.hashes = NameHashes()
        self.memo: dict[str, PyTree] = {}
        self.scores: list[Score] = []
        self.group: list[Score] = []
        self.log_weight: Array | None = None
        self.zeros: list[ArrayLike] = []  # terms of value zero that carry a gradient (baselines)
        self.learned: list = []  # baselines to be trained on the value of this run
        self.pending: dict[str, Pending] = {}
        self.decomposed: list[Decomposed] = []
        self.shifts: Array | None = None  # added to decomposed scalars where a run is asked how it uses them

    @property
    def inner(self) -> bool:
        """True in the body of a loop, a map or a branch, where a run cannot be stopped."""
        return self.parent is not None

    def address(self, name: str) -> str:
        """The full address of a site; a second use of one address in a run is refused."""
        full = "/".join((*self.scope, name))
        if full in self.seen:
            raise ValueError(
                f"`name` must be new at every site of a run; got {name!r} twice (address {full!r}). "
                "Inside a Python loop add the index to the name."
            )
        self.seen.add(full)
        self.hashes.words(full)  # also of remembered sites, so that words are the same in every replay
        return full

    def fresh(self, kind: str) -> str:
        """An unused scope name `kind0`, `kind1`, ...: equal in every replay, because Python runs in one order."""
        stem = "/".join((*self.scope, kind))
        index = self.counts.get(stem, 0)
        self.counts[stem] = index + 1
        return f"{kind}{index}"

    @contextlib.contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """Prefix the addresses of everything inside."""
        before = self.scope
        self.scope = (*self.scope, scope)
        try:
            yield
        finally:
            self.scope = before

    @contextlib.contextmanager
    def forcing(self, strategy: Strategy) -> Iterator[None]:
        """Give every site inside one strategy, whatever it asks for (wake phases detach all draws)."""
        before = self.forced
        self.forced = strategy
        try:
            yield
        finally:
            self.forced = before

    @contextlib.contextmanager
    def falling_back(self, strategy: Strategy) -> Iterator[None]:
        """Give sites inside that have no differentiable sampler and name no strategy this one."""
        before = self.fallback
        self.fallback = strategy
        try:
            yield
        finally:
            self.fallback = before

    def check_trace(self, what: str) -> None:
        """Refuse randomness under a JAX transformation the frame does not know of."""
        if trace_state() != self.state:
            raise RuntimeError(
                f"{what} runs under a raw JAX transformation (`lax.scan`, `lax.cond`, `jax.vmap`, `jax.grad`, "
                "`jax.checkpoint`, `jit`, ...) inside `E`: its draws would be shared or lost and the gradient wrong. "
                "Use `gk.vi.scan`, `gk.vi.vmap` or `gk.vi.cond`, or put the transformation outside `E` "
                "(`jax.vmap(E(fn))` takes one key per lane)."
            )

    def key(self, address: str) -> Key[Array, ""]:
        """The key of an address: the same in every replay."""
        assert self.context.key is not None  # only loops outside `E` have no key, and they have no frame
        return fold_name(self.context.key, address, self.hashes)

    def remembered(self) -> dict[str, PyTree]:
        """Everything known by address: from the runs before and from this one."""
        return {**self.context.memo, **self.memo}

    def add_log_weight(self, log_weight: Array) -> None:
        """Multiply the weight of this run."""
        if self.log_weight is None:  # runs without weights pay nothing for them
            self.log_weight = log_weight
        else:
            self.log_weight = self.log_weight + log_weight

    def decompose(self, value: Array, terms: list[Term] | None) -> Array:
        """Note the terms of a scalar; returns the scalar, to be used in its place."""
        self.decomposed.append(Decomposed(value, terms))
        if self.shifts is None:
            return value
        return value + self.shifts[len(self.decomposed) - 1]

    def close(self, terms: Sequence[Term]) -> list[Term]:
        """Multiply the collected scores into `terms`; only the leave-one-out group stays open."""
        closed = []
        for value, score, group in terms:
            out = value
            if score is not None:
                out = out * dice_factor(score)
            if self.log_weight is not None:
                out = out * jnp.exp(self.log_weight)
            closed.append(Term(jnp.asarray(out), None, group))
        closed.extend(Term(jnp.asarray(zero), None, None) for zero in self.zeros)
        return closed

    def with_all_scores(self, out: ArrayLike) -> Term:
        """A part of the result that every score of this run multiplies."""
        return Term(jnp.asarray(out), total(self.scores), total(self.group))


def total(scores: Sequence[Score]) -> Array | None:
    """The sum of all score terms, or None when there are none."""
    parts = [jnp.sum(score.log_prob) for score in scores]
    if not parts:
        return None
    return sum(parts[1:], parts[0])


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Everything that code deep inside a program may ask about what runs it.

    Immutable and held by one context variable: `changed(frame=...)` gives a block of code another one.

    Attributes:
        frame: the run of the innermost `E`.
        run: the innermost program being run.
        enumeration: the fixed outcomes, while `exact` enumerates the draws of an estimator.
        probe: what `debug` adds to every closed estimate.
        check_traced: True if NaN densities are looked for under `jit` too.
        overrides: strategies by full address, which win over all others.
        decisions: collects the strategy of every site, by address.
    """

    frame: Frame | None = None
    run: AbstractRun | None = None
    enumeration: Outcomes | NoDraws | None = None
    probe: Callable[[Array], Array] | None = None
    check_traced: bool = False
    overrides: Mapping[str, Strategy] | None = None
    decisions: dict | None = None


_OUTSIDE = Interpreter()
_INTERPRETER: ContextVar[Interpreter] = ContextVar("genkit_vi_interpreter", default=_OUTSIDE)


def interpreter() -> Interpreter:
    """The interpreter of the code that asks."""
    return _INTERPRETER.get()


@contextlib.contextmanager
def changed(**fields: object) -> Iterator[None]:
    """Run a block with some fields of the interpreter replaced."""
    token = _INTERPRETER.set(dataclasses.replace(_INTERPRETER.get(), **fields))
    try:
        yield
    finally:
        _INTERPRETER.reset(token)


def current_frame() -> Frame | None:
    """The frame of the innermost `E`, or None."""
    return _INTERPRETER.get().frame


def require_frame(what: str) -> Frame:
    """The current frame, or an error that names `what` needs one."""
    frame = _INTERPRETER.get().frame
    if frame is None:
        raise RuntimeError(f"`{what}` must run inside `gk.vi.E`; write `gk.vi.E(lambda: {what}(...))(key=key)`.")
    return frame


def current_run() -> AbstractRun | None:
    """The innermost program being run, or None."""
    return _INTERPRETER.get().run


@contextlib.contextmanager
def active(frame: Frame | None) -> Iterator[Frame | None]:
    """Make `frame` the current one."""
    with changed(frame=frame):
        yield frame


def is_default_sampled(distribution: dist.Distribution) -> bool:
    """True if `sample_with_intermediates` is numpyro's own, which only calls `sample`."""
    return type(distribution).sample_with_intermediates is dist.Distribution.sample_with_intermediates
