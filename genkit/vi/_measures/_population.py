"""Populations of particles: what nested measures are estimated with."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Key, PyTree

from genkit._core._checks import check, check_count, check_key, describe
from genkit.inference import Measure, as_measure
from genkit.vi._objectives._bounds import log_mean_exp
from genkit.vi._programs._copies import looped_apart, particles
from genkit.vi._programs._program import Program, simulate, weigh
from genkit.vi._programs._sites import draw_site
from genkit.vi._runtime._enumeration import draw_from
from genkit.vi._runtime._frame import Context, Frame, Options, Score, active, current_frame, require_frame
from genkit.vi._runtime._strategy import AbstractLocalStrategy, Attached, Strategy
from genkit.vi._strategies._alternatives import RLOO


class _PlainDraw(AbstractLocalStrategy):
    """How a site is drawn outside `E`."""

    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        return Attached(*draw_from(distribution, key))


@contextlib.contextmanager
def frame_for(key: Key[Array, ""] | None) -> Iterator[Frame]:
    """The current frame, or outside `E` a frame of its own in which every site is simply drawn."""
    frame = current_frame()
    if frame is not None:
        yield frame
        return
    check_key(key)
    frame = Frame(Context(Options(object(), 1, False, 1, []), key, {}, {}))
    frame.forced = _PlainDraw()
    with active(frame):
        yield frame


# A proposal: a measure, or a function of the values known so far that returns one.
Proposal = Measure | dist.Distribution | Callable


class SIR(eqx.Module):
    r"""Sampling importance resampling, as an algorithm for `normalize` and `marginal`.

    Args:
        num_particles: number of particles.
        proposal: a `Measure`; in `marginal` also a function from the dict of kept values to a `Measure` over the
            dropped sites.
        grad: the strategy of the resampling index in `normalize`; None leaves it to the default policy.
    """

    num_particles: int = eqx.field(static=True)
    proposal: Proposal
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
        targets: the unnormalized programs before the last one, which is the measure being normalized.
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


def propose(proposal: Proposal, kept: dict[str, PyTree]) -> Measure:
    """A proposal given as a measure or as a function of earlier values."""
    if isinstance(proposal, Measure | dist.Distribution):
        return as_measure(proposal)
    if not callable(proposal):
        raise TypeError(f"`proposal` must be a Measure or a function of values; got {describe(proposal)}.")
    return as_measure(proposal(kept))


class Population(NamedTuple):
    """Particles with their log-densities under the last target, final log-weights and the log of Z-hat."""

    values: PyTree
    log_p: Array
    log_w: Array
    log_z: Array


class Particle(NamedTuple):
    """One particle (or a stack of them): value, log-density under its target, incremental log-weight."""

    value: PyTree
    log_p: Array
    log_w: Array


def population(measure: Measure, algorithm: SIR | SMC, retained: PyTree) -> Population:
    """Run the algorithm.

    Args:
        measure: the last target.
        algorithm: the algorithm.
        retained: a value that must be the first particle, or None.

    Returns:
        The particles.
    """
    if isinstance(algorithm, SIR):
        algorithm = SMC(algorithm.num_particles, (algorithm.proposal,), (), algorithm.grad)
    frame = require_frame("population")
    targets = (*algorithm.targets, measure)
    now: Particle | None = None
    log_z = jnp.zeros(())
    for target, proposal in zip(targets, algorithm.proposals, strict=True):
        if now is not None:
            now = _resample(frame, algorithm, now, retained is not None)
        now = _extend(target, proposal, now, algorithm.num_particles, retained)
        log_z = log_z + log_mean_exp(now.log_w)
    assert now is not None  # there is at least one target
    return Population(now.value, now.log_p, now.log_w, log_z)


def _resample(frame: Frame, algorithm: SMC, now: Particle, has_retained: bool) -> Particle:
    """Multinomial ancestors; a retained path keeps its place."""
    size = algorithm.num_particles
    if has_retained and size == 1:
        return now
    num_drawn = size - 1 if has_retained else size
    distribution = dist.Categorical(logits=now.log_w).expand([num_drawn])
    ancestors, _ = draw_site(frame, frame.fresh("ancestors"), distribution, algorithm.grad or RLOO(2))
    ancestors = ancestors.astype(int)
    if has_retained:
        ancestors = jnp.concatenate([jnp.zeros(1, int), ancestors])
    return jax.tree.map(lambda x: x[ancestors], now)


def _extend(target: Measure, proposal: Proposal, before: Particle | None, size: int, retained: PyTree) -> Particle:
    """Draw the new sites of every particle and weigh."""
    frame = require_frame("population")
    first = None
    num_retained = 0
    if retained is not None:
        num_retained = 1
        known = None if before is None else jax.tree.map(lambda x: x[0], before)
        old = {} if known is None else known.value
        new = _new_sites(proposal, old, retained)
        first = jax.tree.map(lambda x: jnp.asarray(x)[None], _particle(target, proposal, known, new))
        if size == 1:
            return first
    if before is None:
        rest = particles(lambda: _particle(target, proposal, None, None), size - num_retained)
    else:

        def numbered(index: ArrayLike) -> Particle:
            # The retained particle comes first, and is its own ancestor.
            known = jax.tree.map(lambda x: x[index + num_retained], before)
            return _particle(target, proposal, known, None)

        rest, scores = looped_apart("particles", numbered, size - num_retained)
        if scores is not None:
            frame.scores.append(Score("particles", jnp.sum(scores), ()))
    if first is None:
        return rest
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)


def _new_sites(proposal: Proposal, old: dict, retained: PyTree) -> PyTree:
    """The part of the retained value the proposal of this step draws."""
    if not isinstance(retained, dict):
        return retained
    measure = propose(proposal, old)
    if not isinstance(measure, Program):
        return {k: v for k, v in retained.items() if k not in old}
    record = measure.record_weights(retained)
    return {k: v for k, v in retained.items() if k in record.values}


def _particle(target: Measure, proposal: Proposal, before: Particle | None, new: PyTree) -> Particle:
    """Extend one particle by new sites, drawn where they are not given."""
    old = {} if before is None else before.value
    measure = propose(proposal, old)
    if new is None:
        new, log_q, _ = simulate(measure)
    else:
        log_q = weigh(measure, new)
    value = {**old, **new} if isinstance(new, dict) else new
    log_p = weigh(target, value)
    log_w = log_p - log_q
    if before is not None:
        log_w = log_w - before.log_p
    return Particle(value, log_p, log_w)
