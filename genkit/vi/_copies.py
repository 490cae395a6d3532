"""Copies of a part of a program: particles, whose scores are kept apart or which may stop the run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ._control import _body, _looped, _Out
from ._frame import many, require_frame, without_enumeration
from ._policy import logging_decisions
from ._strategies import Score


def looped_apart(kind: str, lane: Callable[[Any], Any], size: int, plate: str | None = None) -> tuple[Any, Any]:
    """Map `lane` over `size` independent copies and hand out the scores of each copy instead of merging them.

    Scores are None where there are none or where the run remembers the result (its scores were counted then).
    """
    static: dict = {"plate": plate}

    def execute(key: Any, own: dict) -> tuple[Any, _Out]:
        own["plate"] = plate

        def one(index: Any) -> tuple[Any, _Out]:
            return _body(lambda: lane(index), {}, jr.fold_in(key, index), index, own)

        result, out = many(one, np.arange(size))
        static["scores"] = out.pop("scores")
        return result, {**out, "scores": None}

    result = _looped(kind, execute)
    return result, static.get("scores")


def one_by_one(lane: Callable[[], Any], size: int) -> list[Any]:
    """Run `lane` `size` times in this very run, so that its sites may stop it; finished lanes are not run again."""
    frame = require_frame("one_by_one")
    parts = []
    for index in range(size):
        name = frame.fresh(f"particle{index}-")
        address = "/".join((*frame.scope, name))
        if address not in frame.context.memo:
            with frame.within(name):
                frame.memo[address] = lane()
        parts.append({**frame.context.memo, **frame.memo}[address])
    return parts


def probe(fn: Callable[[], Any]) -> dict:
    """What every site of `fn` would decide, without running anything."""
    frame = require_frame("probe")

    def traced() -> Any:
        _body(fn, {}, frame.context.key, 0, {})
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
