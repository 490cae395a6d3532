"""Which strategy a site gets, and why."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import numpyro.distributions as dist

from .._core._checks import describe
from ._frame import Frame, Overflow
from ._laws import is_finite, kind, support_size
from ._multishot import RLOO, Enum
from ._strategies import Reparam, Strategy


class Decision(NamedTuple):
    """Which strategy a site got, and why."""

    address: str
    law: str
    strategy: Strategy
    reason: str
    finite: bool


_OVERRIDES: ContextVar[dict[str, Strategy] | None] = ContextVar("genkit_vi_overrides", default=None)
_DECISIONS: ContextVar[dict[str, Decision] | None] = ContextVar("genkit_vi_decisions", default=None)


@contextlib.contextmanager
def overriding(table: dict[str, Strategy]) -> Iterator[None]:
    """Give the sites at these full addresses another strategy (the variance report compares them)."""
    token = _OVERRIDES.set(table)
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


@contextlib.contextmanager
def logging_decisions() -> Iterator[dict[str, Decision]]:
    """Collect what every site decided, by address."""
    log: dict[str, Decision] = {}
    token = _DECISIONS.set(log)
    try:
        yield log
    finally:
        _DECISIONS.reset(token)


LEAVE_ONE_OUT = "leave-one-out over particles"


def default_strategy(frame: Frame, law: dist.Distribution) -> tuple[Strategy, str]:
    """The policy for sites that name no strategy."""
    if law.has_rsample:
        return Reparam(), "the law has a reparametrised sampler"
    options = frame.context.options
    if frame.fallback is not None:
        return frame.fallback, LEAVE_ONE_OUT
    if frame.inner:
        return RLOO(2), "no reparametrised sampler, and inside a loop the joint support is out of reach"
    if not is_finite(law):
        return RLOO(2), "no reparametrised sampler and no finite support"
    if not options.enumerate:
        return RLOO(2), f"joint support above max_paths={options.max_paths}"
    paths = frame.context.paths * support_size(law)
    if paths > options.max_paths:
        raise Overflow(options.token)
    return Enum(), f"finite support: {paths} joint paths so far, at most max_paths={options.max_paths}"


def decide(frame: Frame, address: str, law: dist.Distribution, named: Strategy | None) -> Strategy:
    """The strategy of a site, checked against its law."""
    table = _OVERRIDES.get()
    if table is not None and address in table:
        strategy, reason = table[address], "chosen for this comparison"
    elif frame.forced is not None:
        strategy, reason = frame.forced, "set by the objective"
    elif named is not None:
        strategy, reason = named, "named"
    else:
        strategy, reason = default_strategy(frame, law)
    if not isinstance(strategy, Strategy):
        raise TypeError(f"`grad` at site {address!r} must be a gk.vi.Strategy; got {describe(strategy)}.")
    refuse_unsuited = getattr(strategy, "check", None)
    if refuse_unsuited is not None:
        refuse_unsuited(law, address)
    log = _DECISIONS.get()
    if log is not None:
        log[address] = Decision(address, kind(law), strategy, reason, is_finite(law))
    return strategy
