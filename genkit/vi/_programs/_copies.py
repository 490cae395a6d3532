"""Copies of a part of a program (particles): in parallel, or one after the other where a site must stop the run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PyTree

from genkit.vi._programs._loops import BodyFacts, Collected, run_body, run_loop
from genkit.vi._runtime._enumeration import many, without_enumeration
from genkit.vi._runtime._frame import Frame, Score as ScoreTerm, current_frame, require_frame
from genkit.vi._strategies._alternatives import RLOO
from genkit.vi._strategies._policy import LEAVE_ONE_OUT, Decision, logging_decisions
from genkit.vi._strategies._single import AbstractLocalStrategy, Score


class Copies(NamedTuple):
    """Results of copies that ran in parallel.

    `scores` has one entry per copy; None where there are none or where the run remembers the result (its scores were
    counted then).
    """

    result: PyTree
    scores: ArrayLike | None


def looped_apart(kind: str, lane: Callable[[ArrayLike], PyTree], size: int, plate: str | None = None) -> Copies:
    """Map `lane` over `size` independent copies and hand out the scores of each copy instead of merging them.

    Args:
        kind: the scope of the copies' addresses.
        lane: a function of the number of the copy.
        size: the number of copies.
        plate: the plate along which scores stay apart, or None.

    Returns:
        The results, stacked, and the scores.
    """
    scores: list[ArrayLike | None] = []

    def execute(key: Key[Array, ""] | None, facts: BodyFacts) -> tuple[PyTree, Collected]:
        def one(index: ArrayLike) -> tuple[PyTree, Collected]:
            own_key = None if key is None else jr.fold_in(key, index)
            return run_body(lambda: lane(index), {}, own_key, index, facts, plate=plate)

        result, collected = many(one, np.arange(size))
        scores.append(collected.scores)
        return result, collected._replace(scores=None)

    result = run_loop(kind, execute)
    return Copies(result, scores[0] if scores else None)


def one_by_one(lane: Callable[[], PyTree], size: int) -> list[PyTree]:
    """Run `lane` `size` times in this very run, so that its sites may stop it; finished lanes are not run again."""
    frame = require_frame("one_by_one")
    parts = []
    for index in range(size):
        name = frame.fresh(f"particle{index}-")
        address = "/".join((*frame.scope, name))
        if address not in frame.context.memo:
            with frame.within(name):
                frame.memo[address] = lane()
        parts.append(frame.remembered()[address])
    return parts


def particles(lane: Callable[[], PyTree], size: int) -> PyTree:
    """Run `lane` `size` times and stack: in parallel, or in turn where its sites need several continuations."""
    frame = current_frame()
    assert frame is not None  # callers are inside a frame
    if size == 0:
        return None
    decisions = probe(lane).values()
    stopping = any(_stops(frame, decision) for decision in decisions)
    if stopping and not frame.inner:
        parts = one_by_one(lane, size)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    copies = looped_apart("particles", lambda index: lane(), size)
    if copies.scores is not None:
        frame.scores.append(ScoreTerm("particles", jnp.sum(copies.scores), ()))
    return copies.result


def _stops(frame: Frame, decision: Decision) -> bool:
    """True if a site would rather stop the run than be drawn in parallel."""
    if not isinstance(decision.strategy, AbstractLocalStrategy | RLOO):
        return True
    # The default policy chose RLOO only because a parallel run cannot stop: it would enumerate.
    return decision.finite and decision.reason == LEAVE_ONE_OUT and frame.context.options.enumerate


def probe(fn: Callable[[], PyTree]) -> dict[str, Decision]:
    """The decision every site of `fn` would take, without running anything."""
    frame = require_frame("probe")

    def traced() -> Array:
        run_body(fn, {}, frame.context.key, 0, BodyFacts())
        return jnp.zeros(())

    context = frame.context
    # Nothing is remembered (every replay must see the same sites), and leave-one-out sites shall not stop the run.
    frame.context = context._replace(copies=True, memo={})
    try:
        with without_enumeration(), logging_decisions() as log, frame.falling_back(Score()):
            jax.eval_shape(traced)
    finally:
        frame.context = context
    return log
