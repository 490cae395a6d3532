"""Populations of particles: what nested measures are estimated with."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Key

from .._core._checks import check, check_count, check_key, describe
from .._core._measure import Measure, as_measure
from ._copies import looped_apart, one_by_one, probe
from ._expectation import draw_site
from ._frame import Context, Frame, Options, Score, active, current_frame, draw_law
from ._multishot import RLOO
from ._objectives import log_mean_exp
from ._policy import LEAVE_ONE_OUT
from ._program import Program, simulate, weigh
from ._strategies import AbstractLocalStrategy, Attached, Strategy


class _Plain(AbstractLocalStrategy):
    """How a site is drawn outside `E`."""

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        return Attached(*draw_law(law, key))


@contextlib.contextmanager
def frame_for(key: Any) -> Iterator[Frame]:
    """The current frame, or outside `E` a frame of its own in which every site is simply drawn."""
    frame = current_frame()
    if frame is not None:
        yield frame
        return
    check_key(key)
    frame = Frame(Context(Options(object(), 1, False, 1, []), key, {}, {}))
    frame.forced = _Plain()
    with active(frame):
        yield frame


def particles(lane: Callable[[], Any], size: int) -> Any:
    """Run `lane` `size` times: in parallel, or one after the other where its sites need several continuations."""
    frame = current_frame()
    assert frame is not None  # callers are inside `frame_for`
    if size == 0:
        return None
    decisions = probe(lane).values()
    stopping = any(
        not isinstance(d.strategy, AbstractLocalStrategy | RLOO) or _could_enumerate(frame, d) for d in decisions
    )
    if stopping and not frame.inner:
        parts = one_by_one(lane, size)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    result, scores = looped_apart("particles", lambda index: lane(), size)
    if scores is not None:
        frame.scores.append(Score("particles", jnp.sum(scores), ()))
    return result


def _could_enumerate(frame: Frame, decision: Any) -> bool:
    """Whether the default policy chose RLOO only because a parallel run cannot stop."""
    return decision.finite and decision.reason == LEAVE_ONE_OUT and frame.context.options.enumerate


class SIR(eqx.Module):
    r"""Sampling importance resampling, as an algorithm for `normalize` and `marginal`.

    Args:
        num_particles: number of particles.
        proposal: a `Measure`; in `marginal` also a function from the dict of kept values to a `Measure` over the
            dropped sites.
        grad: the strategy of the resampling index in `normalize`; None leaves it to the default policy.
    """

    num_particles: int = eqx.field(static=True)
    proposal: Any
    grad: Strategy | None = None

    def __check_init__(self) -> None:
        """Validate the number of particles."""
        check_count("num_particles", self.num_particles)


class SMC(eqx.Module):
    r"""Sequential Monte Carlo through growing targets, as an algorithm for `normalize`.

    Target `t` has the sites of target `t-1` and new ones, which `proposals[t]` draws given the earlier values. With
    multinomial resampling between steps, $\hat Z = \prod_t \frac1N \sum_i w_t^i$.

    Args:
        num_particles: number of particles.
        proposals: one per step: a `Measure` (or a function of an empty dict) for the first, functions from the dict of
            earlier values to a `Measure` over the new sites for the others.
        targets: the unnormalised programs before the last one, which is the measure being normalised.
        grad: the strategy of ancestor indices; None leaves them to the default policy.
    """

    num_particles: int = eqx.field(static=True)
    proposals: tuple
    targets: tuple = ()
    grad: Strategy | None = None

    def __check_init__(self) -> None:
        """Validate the counts."""
        check_count("num_particles", self.num_particles)
        check(
            len(self.proposals) == len(self.targets) + 1,
            "proposals",
            "one more than `targets` (the last target is the measure itself)",
            f"{len(self.proposals)} proposals and {len(self.targets)} targets",
        )


def propose(proposal: Any, kept: dict[str, Any]) -> Measure:
    """A proposal given as a measure or as a function of earlier values."""
    if isinstance(proposal, Measure | dist.Distribution):
        return as_measure(proposal)
    if not callable(proposal):
        raise TypeError(f"`proposal` must be a Measure or a function of values; got {describe(proposal)}.")
    return as_measure(proposal(kept))


def population(measure: Measure, algorithm: Any, retained: Any) -> tuple[Any, Any, Any, Any]:
    """Particles, their log-densities under the last target, final log-weights and log Z-hat."""
    if isinstance(algorithm, SIR):
        algorithm = SMC(algorithm.num_particles, (algorithm.proposal,), (), algorithm.grad)
    size = algorithm.num_particles
    frame = current_frame()
    assert frame is not None  # callers are inside `frame_for`
    targets = (*algorithm.targets, measure)
    values: dict[str, Any] = {}
    log_before, log_w, log_z = None, None, jnp.zeros(())
    for step, (target, proposal) in enumerate(zip(targets, algorithm.proposals, strict=True)):
        if step:
            values, log_before = _resample(frame, algorithm, values, log_before, log_w, retained is not None)
        values, log_p, log_w = _extend(target, proposal, values, log_before, size, retained)
        log_z = log_z + log_mean_exp(log_w)
        log_before = log_p
    return values, log_before, log_w, log_z


def _resample(frame: Frame, algorithm: SMC, values: Any, log_p: Any, log_w: Any, retained: bool) -> tuple[Any, Any]:
    """Multinomial ancestors; a retained path keeps its place."""
    size = algorithm.num_particles
    law = dist.Categorical(logits=log_w).expand([size - 1 if retained else size])
    if retained and size == 1:
        return values, log_p
    ancestors, _ = draw_site(frame, frame.fresh("ancestors"), law, algorithm.grad or RLOO(2))
    ancestors = ancestors.astype(int)
    if retained:
        ancestors = jnp.concatenate([jnp.zeros(1, int), ancestors])
    return jax.tree.map(lambda x: x[ancestors], values), log_p[ancestors]


def _extend(target: Any, proposal: Any, values: Any, log_before: Any, size: int, retained: Any) -> tuple:
    """Draw the new sites of every particle and weigh."""
    start = 0 if retained is None else 1
    frame = current_frame()
    assert frame is not None  # callers are inside `frame_for`
    rows = []
    if retained is not None:
        old = jax.tree.map(lambda x: x[0], values)
        new = _new_sites(proposal, old, retained)
        rows.append(_row(target, proposal, old, new, None if log_before is None else log_before[0]))

    if size > start and not values:

        def lane() -> Any:
            return _row(target, proposal, {}, None, None)

        rest = particles(lane, size - start)
        rows.append(rest)
    elif size > start:
        assert log_before is not None  # there is a step before

        def numbered(index: Any) -> Any:
            old = jax.tree.map(lambda x: x[index + start], values)
            return _row(target, proposal, old, None, log_before[index + start])

        rest, scores = looped_apart("particles", numbered, size - start)
        if scores is not None:
            frame.scores.append(Score("particles", jnp.sum(scores), ()))
        rows.append(rest)
    if retained is None:
        return rows[0]
    first = jax.tree.map(lambda x: jnp.asarray(x)[None], rows[0])
    return first if len(rows) == 1 else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rows[1])


def _new_sites(proposal: Any, old: dict, retained: Any) -> Any:
    """The part of the retained value the proposal of this step draws."""
    if not isinstance(retained, dict):
        return retained
    measure = propose(proposal, old)
    if not isinstance(measure, Program):
        return {k: v for k, v in retained.items() if k not in old}
    record = measure.trace("density", values=retained)
    return {k: v for k, v in retained.items() if k in record.values}


def _row(target: Any, proposal: Any, old: dict, new: Any, log_before: Any) -> tuple[Any, Any, Any]:
    """One particle: its value, its log-density under the target and its incremental log-weight."""
    measure = propose(proposal, old)
    if new is None:
        new, log_q, _ = simulate(measure)
    else:
        log_q = weigh(measure, new)
    value = {**old, **new} if isinstance(new, dict) else new
    log_p = weigh(target, value)
    return value, log_p, log_p - log_q - (0.0 if log_before is None else log_before)
