"""The strategy a site gets, and why."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpyro.distributions as dist

from genkit._core._checks import describe
from genkit.vi._runtime._distributions import is_finite, kind, support_size
from genkit.vi._runtime._frame import Frame, changed, interpreter
from genkit.vi._runtime._stop import Stop, TooManyPaths
from genkit.vi._runtime._strategy import Strategy
from genkit.vi._strategies._alternatives import RLOO, Enum
from genkit.vi._strategies._single import Reparam


class Decision(NamedTuple):
    """The strategy of one site, and the reason for it."""

    address: str
    distribution: str
    strategy: Strategy
    reason: str
    finite: bool


@contextlib.contextmanager
def logging_decisions() -> Iterator[dict[str, Decision]]:
    """Collect the decisions of all sites, by address."""
    log: dict[str, Decision] = {}
    with changed(decisions=log):
        yield log


LEAVE_ONE_OUT = "leave-one-out over particles"


def default_strategy(frame: Frame, distribution: dist.Distribution) -> tuple[Strategy, str]:
    """The policy for sites that name no strategy."""
    if distribution.has_rsample:
        return Reparam(), "the distribution has a reparametrized sampler"
    options = frame.context.options
    if frame.fallback is not None:
        return frame.fallback, LEAVE_ONE_OUT
    if frame.inner:
        return RLOO(2), "no reparametrized sampler, and inside a loop the joint support is too large"
    if not is_finite(distribution):
        return RLOO(2), "no reparametrized sampler and no finite support"
    if not options.enumerate:
        return RLOO(2), f"joint support above max_paths={options.max_paths}"
    paths = frame.context.paths * support_size(distribution)
    if paths > options.max_paths:
        raise Stop(options.token, TooManyPaths())
    return Enum(), f"finite support: {paths} joint paths so far, at most max_paths={options.max_paths}"


def decide(frame: Frame, address: str, distribution: dist.Distribution, named: Strategy | None) -> Strategy:
    """The strategy of a site, checked against its distribution."""
    now = interpreter()
    if now.overrides is not None and address in now.overrides:
        strategy = now.overrides[address]
        reason = "chosen for this comparison"
    elif frame.forced is not None:
        strategy = frame.forced
        reason = "set by the objective"
    elif named is not None:
        strategy = named
        reason = "named"
    else:
        strategy, reason = default_strategy(frame, distribution)
    if not isinstance(strategy, Strategy):
        raise TypeError(f"`grad` at site {address!r} must be a gk.vi.Strategy; got {describe(strategy)}.")
    strategy.check(distribution, address)
    if now.decisions is not None:
        now.decisions[address] = Decision(address, kind(distribution), strategy, reason, is_finite(distribution))
    return strategy
