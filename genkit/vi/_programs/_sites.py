"""One site under `E`: drawn and remembered, or the run stops and its strategy takes over."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.lax import stop_gradient
from jaxtyping import Array, ArrayLike, Key, PyTree

from genkit.vi._runtime._distributions import kind, support_size, unmask
from genkit.vi._runtime._enumeration import many, outcomes
from genkit.vi._runtime._frame import Context, Frame, Pending, Score as ScoreTerm, Term
from genkit.vi._runtime._keys import fold_name, site_key
from genkit.vi._runtime._stop import NeedsContinuations, Stop
from genkit.vi._runtime._strategy import AbstractLocalStrategy, Attached, Strategy, dice_factor
from genkit.vi._strategies._alternatives import RLOO, AbstractAlternatives, Enum, LocalExpectation, leave_one_out
from genkit.vi._strategies._policy import decide
from genkit.vi._strategies._single import LearnedBaseline, MovingBaseline, Score


@runtime_checkable
class Rerun(Protocol):
    """Runs the rest of a program again under another context."""

    def __call__(self, context: Context) -> Array:
        """The closed scalar."""
        ...

    def open(self, context: Context) -> list[Term]:
        """The terms, whose leave-one-out group is still open."""
        ...


def draw_site(
    frame: Frame, name: str, distribution: dist.Distribution, named: Strategy | None, plates: tuple = ()
) -> tuple[PyTree, PyTree]:
    """Draw one site inside `E`: returns the value and the distribution's intermediates, or stops the run."""
    address = frame.address(name)
    frame.check_trace(f"The site {address!r}")
    if address in frame.context.memo:
        return frame.context.memo[address], ()
    distribution = unmask(distribution)
    strategy = decide(frame, address, distribution, named)
    assert frame.context.key is not None  # frames of runs have one
    key = site_key(frame.context.key, address, frame.hashes)
    token = frame.context.options.token
    if isinstance(strategy, AbstractLocalStrategy):
        got = strategy.attach(key, distribution)
        _collect(frame, address, got, plates)
    elif isinstance(strategy, RLOO):
        if not frame.context.copies:
            raise Stop(token, NeedsContinuations(address, _resume_copies(strategy), strategy.num_samples))
        got = Score().attach(key, distribution)
        assert got.score is not None
        frame.group.append(ScoreTerm(address, got.score, plates))
    elif frame.inner:
        got = _draw_in_loop(frame, address, distribution, strategy, key)
    else:
        size = support_size(distribution) if isinstance(strategy, Enum) else 1
        if frame.context.paths * size > frame.context.options.max_paths:
            _refuse_paths(frame, address, distribution, size)

        def resume(run: Rerun, context: Context) -> Array:
            def k(value: PyTree) -> Array:
                return run(context._replace(memo={**context.memo, address: value}, copies=False))

            return strategy(key, distribution, k)

        raise Stop(token, NeedsContinuations(address, resume, size))
    frame.memo[address] = got.value
    return got.value, got.intermediates


def _refuse_paths(frame: Frame, address: str, distribution: dist.Distribution, size: int) -> None:
    """Enumeration asked for by name exceeds the cap."""
    paths = frame.context.paths * size
    raise ValueError(
        f"`grad` at site {address!r} must enumerate at most max_paths={frame.context.options.max_paths} joint paths; "
        f"got {paths} ({frame.context.paths} before this site, {size} outcomes of {kind(distribution)} here). "
        "Use LocalExpectation() (one lane at a time), an inner `E` around a part that enters linearly, RLOO(2), or "
        "`E(fn, max_paths=...)`."
    )


def _collect(frame: Frame, address: str, got: Attached, plates: tuple) -> None:
    """Store what a local strategy attached to its draw."""
    if got.log_weight is not None:
        frame.add_log_weight(jnp.asarray(got.log_weight))
    if got.score is None:
        return
    frame.scores.append(ScoreTerm(address, got.score, plates))
    baseline = got.baseline
    if baseline is None:
        return
    if isinstance(baseline, (MovingBaseline, LearnedBaseline)):
        frame.context.options.baselines.append(baseline)
        if isinstance(baseline, LearnedBaseline):
            _note_learned(frame, address, baseline)
        baseline = baseline()
    value = jnp.sum(stop_gradient(jnp.asarray(baseline)))
    frame.zeros.append(value * (1 - dice_factor(jnp.sum(got.score))))


def _note_learned(frame: Frame, address: str, baseline: LearnedBaseline) -> None:
    """Remember a baseline to be trained on the value of the run its site is in."""
    outer = frame
    while outer.parent is not None:
        outer = outer.parent
    if outer is not frame and jax.tree.leaves(baseline.inputs):
        raise ValueError(
            f"`baseline` at site {address!r} must have no inputs inside gk.vi.scan, vmap, cond or among particles: the "
            "value it is trained on is known outside only. Use a learned constant, `MovingBaseline`, or RLOO."
        )
    if all(baseline is not known for known in outer.learned):
        outer.learned.append(baseline)


def _draw_in_loop(
    frame: Frame, address: str, distribution: dist.Distribution, strategy: Strategy, key: Key[Array, ""]
) -> Attached:
    """A site with alternatives inside a loop: draw it, or take the alternative this replay puts at this step."""
    if isinstance(strategy, Enum):
        strategy = LocalExpectation(second_order=False)
    if not isinstance(strategy, AbstractAlternatives):
        raise ValueError(  # noqa: TRY004 - a strategy of the wrong kind for the place
            f"`grad` at site {address!r} must be a local strategy, RLOO, LocalExpectation, MVD or Enum inside "
            f"gk.vi.scan, vmap or cond; got {type(strategy).__name__}, which needs to stop the run there."
        )
    value, alts, coefficients, score = strategy.alternatives(key, distribution)
    if score is not None:
        frame.scores.append(ScoreTerm(address, score, ()))
    override = frame.context.override.get(address)
    if override is not None:
        here: ArrayLike = np.asarray(True)  # stays concrete while draws are enumerated
        for mine, step in zip(frame.path, override.steps, strict=True):
            here = here & (mine == step)
        state = outcomes()
        if state is not None and bool(here):
            state.tape = []  # from here on the replay differs from its base run and draws afresh
        value = jnp.where(here, override.alternative, value)
    frame.pending[address] = Pending(alts, coefficients, strategy.keep_gradient)
    return Attached(value)


def _resume_copies(strategy: RLOO) -> Callable[..., Array]:
    """Leave-one-out over whole copies of the rest of the run."""

    def resume(run: Rerun, context: Context) -> Array:
        def copy(index: ArrayLike) -> list[tuple]:
            assert context.key is not None  # frames of runs have one
            key = jr.fold_in(fold_name(context.key, "copy"), index)
            terms: list[Term] = run.open(context._replace(key=key, copies=True))
            pairs = []
            for term in terms:
                group = jnp.zeros(jnp.shape(term.value)) if term.group is None else term.group
                pairs.append((term.value, group))
            return pairs

        parts = many(copy, jnp.arange(strategy.num_samples))
        sums = [jnp.sum(leave_one_out(values, scores)) for values, scores in parts]
        return sum(sums[1:], sums[0])

    return resume
