"""Measures made of measures: their densities are estimates, and their draws belong to the surrounding `E`."""

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree

from .._core._checks import check, check_count, check_key, describe
from .._core._measure import Measure, as_measure
from ._control import looped_apart, probe
from ._expectation import LEAVE_ONE_OUT, draw_site
from ._frame import Context, Frame, Options, Score, active, current_frame, draw_law
from ._multishot import RLOO
from ._objectives import log_mean_exp
from ._program import Program, simulate, weigh
from ._strategies import Attached, LocalStrategy, Strategy


class _Plain(LocalStrategy):
    """How a site is drawn outside `E`."""

    def attach(self, key: Key[Array, ""], law: dist.Distribution) -> Attached:
        return Attached(*draw_law(law, key))


@contextlib.contextmanager
def _frame_for(key: Any) -> Iterator[Frame]:
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


def _particles(lane: Callable[[], Any], size: int) -> Any:
    """Run `lane` `size` times: in parallel, or one after the other where its sites need several continuations."""
    frame = current_frame()
    assert frame is not None  # callers are inside `_frame_for`
    if size == 0:
        return None
    decisions = probe(lane).values()
    stopping = any(not isinstance(d.strategy, LocalStrategy | RLOO) or _could_enumerate(frame, d) for d in decisions)
    if stopping and not frame.inner:
        parts = []
        for index in range(size):
            with frame.within(frame.fresh(f"particle{index}-")):
                parts.append(lane())
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


def _propose(proposal: Any, kept: dict[str, Any]) -> Measure:
    """A proposal given as a measure or as a function of earlier values."""
    if isinstance(proposal, Measure | dist.Distribution):
        return as_measure(proposal)
    if not callable(proposal):
        raise TypeError(f"`proposal` must be a Measure or a function of values; got {describe(proposal)}.")
    return as_measure(proposal(kept))


class Marginal(Measure):
    """A program with some sites summed out by importance sampling; made by `marginal`.

    Args:
        measure: the joint program.
        keep: globs of the kept sites.
        algorithm: how the others are proposed.
    """

    measure: Measure
    keep: tuple[str, ...] = eqx.field(static=True)
    algorithm: SIR

    def _split(self, value: dict[str, Any]) -> tuple[dict, dict]:
        kept = {k: v for k, v in value.items() if any(fnmatch.fnmatchcase(k, glob) for glob in self.keep)}
        check(bool(kept), "keep", f"matched by some site of the program ({', '.join(sorted(value))})", str(self.keep))
        return kept, {k: v for k, v in value.items() if k not in kept}

    def _ratios(self, kept: dict[str, Any], size: int) -> Any:
        """Log P(z, u) - log r(u | z) at `size` proposed u."""

        def lane() -> Any:
            dropped, log_r = simulate(_propose(self.algorithm.proposal, kept))[:2]
            return weigh(self.measure, {**kept, **dropped}) - log_r

        return _particles(lane, size)

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        """Draw the kept sites; the estimate reuses the program's own draw of the others as first particle.

        Args:
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The dict of kept values and the log of the estimated density.
        """
        with _frame_for(key):
            value, log_joint, _ = simulate(self.measure)
            kept, dropped = self._split(value)
            first = log_joint - weigh(_propose(self.algorithm.proposal, kept), dropped)
            others = self._ratios(kept, self.algorithm.num_particles - 1)
            ratios = first[None] if others is None else jnp.concatenate([first[None], others])
            return kept, log_mean_exp(ratios)

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log of an unbiased estimate of the marginal density.

        Args:
            value: dict of the kept sites.
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The log of the estimate.
        """
        with _frame_for(key):
            return log_mean_exp(self._ratios(value, self.algorithm.num_particles))


class Normalized(Measure):
    """An unnormalised measure turned into one that can be drawn from; made by `normalize`.

    Args:
        measure: the unnormalised measure.
        algorithm: `SIR` or `SMC`.
    """

    measure: Measure
    algorithm: SIR | SMC

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        r"""Draw particles and keep one; the estimate is $\tilde p(z) / \hat Z$.

        Args:
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The kept particle and the log of the estimated density.
        """
        with _frame_for(key) as frame:
            values, log_p, log_w, log_z = _population(self.measure, self.algorithm, None)
            law = dist.Categorical(logits=log_w)
            index, _ = draw_site(frame, frame.fresh("index"), law, self.algorithm.grad)
            index = index.astype(int)
            return jax.tree.map(lambda x: x[index], values), log_p[index] - log_z

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log of an unbiased estimate of the density of what `sample` draws, with `value` among the particles.

        Args:
            value: a value of the measure.
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The log of the estimate.
        """
        proposals = (self.algorithm.proposal,) if isinstance(self.algorithm, SIR) else self.algorithm.proposals
        for proposal in proposals:
            if isinstance(proposal, Marginal | Normalized):
                raise ValueError(  # noqa: TRY004 - the type is fine, its density is not
                    "`proposal` must have an exact density to weigh a given value; got an estimated one "
                    f"({type(proposal).__name__})."
                )
        with _frame_for(key):
            _, log_p, _, log_z = _population(self.measure, self.algorithm, value)
            return log_p[0] - log_z


def _population(measure: Measure, algorithm: Any, retained: Any) -> tuple[Any, Any, Any, Any]:
    """Particles, their log-densities under the last target, final log-weights and log Z-hat."""
    if isinstance(algorithm, SIR):
        algorithm = SMC(algorithm.num_particles, (algorithm.proposal,), (), algorithm.grad)
    size = algorithm.num_particles
    frame = current_frame()
    assert frame is not None  # callers are inside `_frame_for`
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
    rows = []
    if retained is not None:
        old = jax.tree.map(lambda x: x[0], values)
        new = _new_sites(proposal, old, retained)
        rows.append(_row(target, proposal, old, new, None if log_before is None else log_before[0]))

    if size > start and not values:

        def lane() -> Any:
            return _row(target, proposal, {}, None, None)

        rest = _particles(lane, size - start)
        rows.append(rest)
    elif size > start:

        def numbered(index: Any) -> Any:
            old = jax.tree.map(lambda x: x[index + start], values)
            return _row(target, proposal, old, None, log_before[index + start])

        rest, scores = looped_apart("particles", numbered, size - start)
        if scores is not None:
            current_frame().scores.append(Score("particles", jnp.sum(scores), ()))
        rows.append(rest)
    if retained is None:
        return rows[0]
    first = jax.tree.map(lambda x: jnp.asarray(x)[None], rows[0])
    return first if len(rows) == 1 else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rows[1])


def _new_sites(proposal: Any, old: dict, retained: Any) -> Any:
    """The part of the retained value the proposal of this step draws."""
    if not isinstance(retained, dict):
        return retained
    measure = _propose(proposal, old)
    if not isinstance(measure, Program):
        return {k: v for k, v in retained.items() if k not in old}
    record = measure.trace("density", values=retained)
    return {k: v for k, v in retained.items() if k in record.values}


def _row(target: Any, proposal: Any, old: dict, new: Any, log_before: Any) -> tuple[Any, Any, Any]:
    """One particle: its value, its log-density under the target and its incremental log-weight."""
    measure = _propose(proposal, old)
    if new is None:
        new, log_q, _ = simulate(measure)
    else:
        log_q = weigh(measure, new)
    value = {**old, **new} if isinstance(new, dict) else new
    log_p = weigh(target, value)
    return value, log_p, log_p - log_q - (0.0 if log_before is None else log_before)


class Flow(Measure):
    """The image of a measure under a bijection; made by `flow`.

    Args:
        base: a measure over arrays.
        bijector: a numpyro transform.
    """

    base: Measure
    bijector: Any

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        """Draw from the base and push forward.

        Args:
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The image and its log-density.
        """
        with _frame_for(key):
            x, log_base, _ = simulate(self.base)
        y = self.bijector(x)
        return y, log_base - jnp.sum(self.bijector.log_abs_det_jacobian(x, y))

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log-density through the inverse.

        Args:
            value: a point of the image.
            key: needed only by a base that estimates its density.

        Returns:
            The log-density.
        """
        x = self.bijector.inv(value)
        if current_frame() is None:
            log_base = self.base.log_density(x, key=key)
        else:
            log_base = weigh(self.base, x)
        return log_base - jnp.sum(self.bijector.log_abs_det_jacobian(x, value))


def marginal(measure: Program, keep: str | Sequence[str], algorithm: SIR) -> Marginal:
    r"""Sum sites out of a program by importance sampling, unbiasedly.

    With helper $r(u \mid z)$ and M particles the density estimate is $\frac1M\sum_j P(z, u_j)/r(u_j \mid z)$. As a
    guide inside `elbo` this is hierarchical VI (M = 1) and its importance-weighted form; inside `iwelbo` the doubly
    importance-weighted one.

    Args:
        measure: the joint program.
        keep: names or globs of the sites to keep.
        algorithm: `SIR(M, r)`, `r` a measure over the dropped sites or a function of the kept values returning one.

    Returns:
        A measure over the kept sites.

    Raises:
        TypeError: if `algorithm` is not `SIR` or `measure` is not a program.

    Source: Sobolev & Vetrov, "Importance Weighted Hierarchical Variational Inference", NeurIPS 2019, equation 4.
    """
    if not isinstance(measure, Program):
        raise TypeError(f"`measure` must be a program; got {describe(measure)}.")
    if not isinstance(algorithm, SIR):
        raise TypeError(f"`algorithm` must be gk.vi.SIR; got {describe(algorithm)}.")
    return Marginal(measure, (keep,) if isinstance(keep, str) else tuple(keep), algorithm)


def normalize(measure: Measure, algorithm: SIR | SMC) -> Normalized:
    r"""Make an unnormalised measure one that can be drawn from.

    Args:
        measure: the unnormalised measure, e.g. a program with observations.
        algorithm: `SIR(N, q)` or `SMC(...)`.

    Returns:
        A measure whose draws are the algorithm's, with an unbiased density estimate of their law.

    Raises:
        TypeError: if `algorithm` is neither.

    Source: Lew et al., "Probabilistic Programming with Stochastic Probabilities", PLDI 2023, section 4; Cusumano-Towner
    & Mansinghka, "AIDE", NeurIPS 2017.
    """
    if not isinstance(algorithm, SIR | SMC):
        raise TypeError(f"`algorithm` must be gk.vi.SIR or gk.vi.SMC; got {describe(algorithm)}.")
    return Normalized(as_measure(measure), algorithm)


def flow(base: Any, bijector: Any) -> Flow:
    r"""The image of a measure under a bijection, $\log q(T(x)) = \log q_0(x) - \log|\det T'(x)|$.

    Args:
        base: a measure or numpyro law over arrays.
        bijector: a numpyro transform with `inv` and `log_abs_det_jacobian`.

    Returns:
        The image measure.

    Raises:
        TypeError: if `bijector` lacks what is needed.
    """
    if not (callable(bijector) and hasattr(bijector, "log_abs_det_jacobian")):
        raise TypeError(f"`bijector` must be a numpyro transform; got {describe(bijector)}.")
    return Flow(as_measure(base), bijector)
