"""The one exception that `E` uses to leave a run early, and what it may carry."""

from collections.abc import Callable
from typing import NamedTuple

import numpyro.distributions as dist
from jaxtyping import PyTree


class NeedsContinuations(NamedTuple):
    """A site needs several continuations: `resume(run, context)` evaluates them."""

    address: str
    resume: Callable[..., PyTree]
    paths: int


class TooManyPaths(NamedTuple):
    """The default policy would enumerate too many paths: run again without enumeration."""


class NextDraw(NamedTuple):
    """An enumeration has to branch: the next draw has no outcome yet."""

    distribution: dist.Distribution


class DrawMade(NamedTuple):
    """A part that was tried as if it made no draws makes one."""


class Stop(BaseException):
    """Leaves a run for the code that started it. Not an error: it never leaves `E`.

    A `BaseException`, so that a program's own `except Exception` does not swallow it.

    Args:
        owner: who catches it; everybody else lets it pass.
        reason: why the run stops.
    """

    def __init__(self, owner: object, reason: NeedsContinuations | TooManyPaths | NextDraw | DrawMade):
        super().__init__(type(reason).__name__)
        self.owner = owner
        self.reason = reason


class Outcomes:
    """The outcomes an enumeration has fixed so far, consumed in the order the draws happen."""

    def __init__(self, choices: tuple):
        self.choices = choices
        self.used = 0
        self.log: list[PyTree] = []
        self.tape: list[PyTree] = []  # outcomes a replayed loop shares with its base run, up to the forced step

    def next(self, distribution: dist.Distribution) -> PyTree:
        """The next fixed outcome, or a stop that asks for one."""
        if self.tape:
            return self.tape.pop(0)
        if self.used == len(self.choices):
            raise Stop(self, NextDraw(distribution))
        outcome = self.choices[self.used]
        self.used += 1
        self.log.append(outcome)
        return outcome


class NoDraws:
    """The attempt to run a part of an enumeration without draws, which is then free to use `vmap` and `scan`."""

    def next(self, distribution: dist.Distribution) -> PyTree:
        """Give up the attempt."""
        del distribution
        raise Stop(self, DrawMade())
