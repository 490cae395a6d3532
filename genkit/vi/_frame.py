"""Frames: the bookkeeping of one run of a function under `E`.

A run either finishes, or stops at the first site whose strategy needs several continuations; that site's strategy is
then given `k`, which runs the same Python function again with everything drawn so far remembered. Scores collected by
a run multiply whatever follows them, so each run returns one closed scalar and continuations nest freely.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.lax import stop_gradient

from ._laws import joint_support


def magic(score: Any) -> Any:
    """One in value, the gradient of `score` in every derivative (the DiCE operator)."""
    return jnp.exp(score - stop_gradient(score))


def trace_state() -> Any:
    """An opaque, comparable mark of the JAX transformation we are under."""
    return jax.extend.core.get_opaque_trace_state(convention="genkit")


def fold_name(key: Any, name: str) -> Any:
    """A key for `name`, equal in every process (Python's own string hash is not)."""
    return jr.fold_in(key, zlib.crc32(name.encode()))


def site_key(key: Any, address: str) -> Any:
    """A key for a site, at no cost: the hash of the address is mixed into one word of the key.

    Threefry is a block cipher made to be keyed with related keys (JAX's own seeds are), so streams stay independent.
    Only for keys that are drawn from: keys of inner frames are hashed (`fold_name`), or two mixings could undo each
    other.
    """
    if jr.key_impl(key) != "threefry2x32":
        return fold_name(key, address)
    words = jr.key_data(key)
    tweak = np.array([zlib.crc32(address.encode()), 0], np.uint32)
    return jr.wrap_key_data(words ^ tweak, impl="threefry2x32")


class Options(NamedTuple):
    """What stays fixed over all runs below one `E`."""

    token: object
    max_paths: int
    enumerate: bool
    sense: int
    baselines: list


class Context(NamedTuple):
    """What one run is given: its key, what is remembered, and how many continuations surround it."""

    options: Options
    key: Any
    memo: dict[str, Any]
    override: dict[str, Any]
    paths: int = 1
    copies: bool = False


class Score(NamedTuple):
    """The score of one site: its log-density, of the site's batch shape, and the plates that shape belongs to."""

    address: str
    log_prob: Any
    plates: tuple


class Term(NamedTuple):
    """A part of the objective together with the scores that must multiply it (one shape for all three)."""

    value: Any
    score: Any
    group: Any


class Pending(NamedTuple):
    """Alternatives a looped site asks for: outcomes `alts`, zero-valued `coefficients` carrying the gradient."""

    alts: Any
    coefficients: Any
    keep_gradient: bool


class Abort(BaseException):
    """Stops a run at a site that needs several continuations. Not an error: never leaves `E`."""

    def __init__(self, token: object, address: str, resume: Callable, paths: int):
        super().__init__(address)
        self.token, self.address, self.resume, self.paths = token, address, resume, paths


class Overflow(BaseException):
    """The default policy would enumerate too many paths: run again without enumeration."""

    def __init__(self, token: object):
        super().__init__()
        self.token = token


class Frame:
    """One run: addresses, remembered values, and the score terms collected on the way."""

    def __init__(self, context: Context, parent: "Frame | None" = None, path: tuple = ()):
        self.context, self.parent, self.path = context, parent, path
        self.state = trace_state()
        self.scope: tuple[str, ...] = () if parent is None else parent.scope
        self.forced: Any = None if parent is None else parent.forced
        self.fallback: Any = None if parent is None else parent.fallback
        self.counts: dict[str, int] = {}
        self.seen: set[str] = set()
        self.memo: dict[str, Any] = {}
        self.scores: list[Score] = []
        self.group: list[Score] = []
        self.log_weight: Any = None
        self.zeros: list[Any] = []  # terms of value zero that carry a gradient (baselines)
        self.learned: list[Any] = []  # baselines to be trained on the value of this run
        self.pending: dict[str, Pending] = {}
        self.registered: tuple[Any, list] | None = None

    @property
    def inner(self) -> bool:
        """Whether this is the body of a loop, a map or a branch, where a run cannot be stopped."""
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
        before, self.scope = self.scope, (*self.scope, scope)
        try:
            yield
        finally:
            self.scope = before

    @contextlib.contextmanager
    def forcing(self, strategy: Any) -> Iterator[None]:
        """Give every site inside one strategy, whatever it asks for (wake phases detach all draws)."""
        before, self.forced = self.forced, strategy
        try:
            yield
        finally:
            self.forced = before

    @contextlib.contextmanager
    def falling_back(self, strategy: Any) -> Iterator[None]:
        """Give sites inside that have no differentiable sampler and name no strategy this one."""
        before, self.fallback = self.fallback, strategy
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

    def key(self, address: str) -> Any:
        """The key of an address: the same in every replay."""
        return fold_name(self.context.key, address)

    def close(self, terms: Sequence[Term]) -> list[Term]:
        """Multiply the collected scores into `terms`; only the leave-one-out group stays open."""
        closed = []
        for value, score, group in terms:
            out = value if score is None else value * magic(score)
            out = out if self.log_weight is None else out * jnp.exp(self.log_weight)
            closed.append(Term(out, None, group))
        closed.extend(Term(zero, None, None) for zero in self.zeros)
        return closed

    def terms(self, out: Any) -> list[Term]:
        """The decomposition of the run's result: the registered one if exactly that scalar is returned."""
        if self.registered is not None and self.registered[0] is out:
            return self.registered[1]
        return [Term(out, total(self.scores), total(self.group))]


def total(scores: Sequence[Score]) -> Any:
    """The sum of all score terms, or None when there are none."""
    parts = [jnp.sum(score.log_prob) for score in scores]
    return sum(parts[1:], parts[0]) if parts else None


_FRAME: ContextVar[Frame | None] = ContextVar("genkit_vi_frame", default=None)


def current_frame() -> Frame | None:
    """The frame of the innermost `E`, or None."""
    return _FRAME.get()


def require_frame(what: str) -> Frame:
    """The current frame, or an error that names `what` needs one."""
    frame = _FRAME.get()
    if frame is None:
        raise RuntimeError(f"`{what}` must run inside `gk.vi.E`; write `gk.vi.E(lambda: {what}(...))(key=key)`.")
    return frame


@contextlib.contextmanager
def active(frame: Frame | None) -> Iterator[Frame | None]:
    """Make `frame` the current one."""
    token = _FRAME.set(frame)
    try:
        yield frame
    finally:
        _FRAME.reset(token)


# --- exact enumeration of the estimator's own draws -------------------------------------------------------------


class Choice(BaseException):
    """Stops an exact run at the first draw whose outcome is not yet fixed."""

    def __init__(self, state: "Exact", law: dist.Distribution):
        super().__init__()
        self.state, self.law = state, law


class Exact:
    """The outcomes fixed so far, consumed in the order the draws happen."""

    def __init__(self, choices: tuple):
        self.choices, self.used = choices, 0
        self.log: list[Any] = []
        self.tape: list[Any] = []  # outcomes a replayed loop shares with its base run, up to the forced step

    def next(self, law: dist.Distribution) -> Any:
        """The next fixed outcome, or a stop that asks for one."""
        if self.tape:
            return self.tape.pop(0)
        if self.used == len(self.choices):
            raise Choice(self, law)
        self.used += 1
        self.log.append(self.choices[self.used - 1])
        return self.log[-1]


class NeedsDraw(BaseException):
    """A part tried as if it made no draws makes one."""


class NoDraws:
    """The attempt to run a part of an exact run without draws, which is then free to use `vmap` and `scan`."""

    def next(self, law: dist.Distribution) -> Any:
        """Give up the attempt."""
        raise NeedsDraw


_EXACT: ContextVar[Exact | NoDraws | None] = ContextVar("genkit_vi_exact", default=None)


def exact_state() -> Exact | None:
    """The enumeration under way, if any."""
    state = _EXACT.get()
    return state if isinstance(state, Exact) else None


@contextlib.contextmanager
def without_enumeration() -> Iterator[None]:
    """Trace shapes with ordinary draws."""
    token = _EXACT.set(None)
    try:
        yield
    finally:
        _EXACT.reset(token)


def is_exact() -> bool:
    """Whether draws are being enumerated rather than made."""
    return isinstance(_EXACT.get(), Exact)


def draw_law(law: dist.Distribution, key: Any) -> tuple[Any, Any]:
    """Draw from `law` (or take the next enumerated outcome): the only place where `E` makes randomness."""
    state = _EXACT.get()
    if state is None:
        if type(law).sample_with_intermediates is dist.Distribution.sample_with_intermediates:
            return law.sample(key), []
        return law.sample_with_intermediates(key)
    if not law.is_discrete:
        raise ValueError(
            f"`exact` must meet discrete draws only; got a draw from the continuous law {type(law).__name__}. "
            "Integrate continuous sites by quadrature, or estimate with `E` and many keys."
        )
    return state.next(law), []


def many(fn: Callable, xs: Any) -> Any:
    """`jax.vmap(fn)(xs)`, as a Python loop while draws are being enumerated."""
    if not is_exact():
        return jax.vmap(fn)(xs)
    token = _EXACT.set(NoDraws())
    try:
        return jax.vmap(fn)(xs)
    except NeedsDraw:
        pass
    finally:
        _EXACT.reset(token)
    size = jax.tree.leaves(xs)[0].shape[0]
    outs = [fn(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(size)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def enumerate_draws(run: Callable[[], Any], choices: tuple, paths: int, max_paths: int) -> Any:
    """Sum `run` over all outcomes of its draws, weighted by their (undifferentiated) probabilities."""
    state = Exact(choices)
    token = _EXACT.set(state)
    try:
        return run()
    except Choice as choice:
        if choice.state is not state:
            raise
        law = choice.law
    finally:
        _EXACT.reset(token)
    support = joint_support(law, max_paths)
    paths *= support.shape[0]
    if paths > max_paths:
        raise ValueError(
            f"`exact` must enumerate at most max_paths={max_paths} outcomes of the estimator's draws; got {paths}. "
            "Use fewer particles or sites, or raise max_paths."
        )
    weights = jax.vmap(lambda v: stop_gradient(jnp.exp(jnp.sum(law.log_prob(v)))))(support)
    values = jax.vmap(lambda v: enumerate_draws(run, (*choices, v), paths, max_paths))(support)
    return jnp.sum(weights * values)


def as_scalar(out: Any, what: str) -> Any:
    """Check that an objective returned a real scalar."""
    if np.shape(out) == () and jnp.issubdtype(jnp.result_type(out), jnp.integer):
        return jnp.asarray(out).astype(float)
    if np.shape(out) != () or not jnp.issubdtype(jnp.result_type(out), jnp.floating):
        got = jax.tree.map(lambda leaf: (jnp.result_type(leaf).name, np.shape(leaf)), out)
        raise ValueError(f"`{what}` must return a real scalar; got {got}. Sum or average over the batch.")
    return out
