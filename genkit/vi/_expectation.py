"""The boundary `E`: an unbiased value whose derivatives are unbiased, and its exact enumeration."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.lax import stop_gradient

from .._core._checks import check_count, check_key, describe
from ._frame import (
    Abort,
    Context,
    Frame,
    Options,
    Overflow,
    Pending,
    Score as ScoreTerm,
    Term,
    active,
    as_scalar,
    current_frame,
    enumerate_draws,
    exact_state,
    fold_name,
    magic,
    many,
    site_key,
    total,
    trace_state,
)
from ._laws import kind, support_size, unmask
from ._multishot import RLOO, AbstractAlternatives, Enum, Lanes, leave_one_out
from ._policy import decide
from ._strategies import AbstractLocalStrategy, Attached, Learned, Moving, Score, Strategy


def draw_site(frame: Frame, name: str, law: dist.Distribution, named: Strategy | None, plates: tuple = ()) -> tuple:
    """Draw one site inside `E`: returns the value and the law's intermediates, or stops the run."""
    address = frame.address(name)
    frame.check_trace(f"The site {address!r}")
    if address in frame.context.memo:
        return frame.context.memo[address], ()
    law = unmask(law)
    strategy = decide(frame, address, law, named)
    key = site_key(frame.context.key, address)
    if isinstance(strategy, AbstractLocalStrategy):
        got = strategy.attach(key, law)
        _collect(frame, address, got, plates)
    elif isinstance(strategy, RLOO):
        if not frame.context.copies:
            raise Abort(frame.context.options.token, address, _resume_copies(strategy), strategy.num_samples)
        got = Score().attach(key, law)
        frame.group.append(ScoreTerm(address, got.score, plates))
    elif frame.inner:
        got = _looped(frame, address, law, strategy, key)
    else:
        size = support_size(law) if isinstance(strategy, Enum) else 1
        if frame.context.paths * size > frame.context.options.max_paths:
            _too_many(frame, address, law, size)

        def resume(run: Callable, context: Context) -> Any:
            def k(value: Any) -> Any:
                return run(context._replace(memo={**context.memo, address: value}, copies=False))

            return strategy(key, law, k)

        raise Abort(frame.context.options.token, address, resume, size)
    frame.memo[address] = got.value
    return got.value, got.intermediates


def _too_many(frame: Frame, address: str, law: dist.Distribution, size: int) -> None:
    """Enumeration asked for by name exceeds the cap."""
    paths = frame.context.paths * size
    raise ValueError(
        f"`grad` at site {address!r} must enumerate at most max_paths={frame.context.options.max_paths} joint paths; "
        f"got {paths} ({frame.context.paths} before this site, {size} outcomes of {kind(law)} here). Use Lanes() "
        "(one lane at a time), an inner `E` around a part that enters linearly, RLOO(2), or `E(fn, max_paths=...)`."
    )


def _collect(frame: Frame, address: str, got: Attached, plates: tuple) -> None:
    """Store what a local strategy attached to its draw."""
    if got.log_weight is not None:
        frame.log_weight = got.log_weight if frame.log_weight is None else frame.log_weight + got.log_weight
    if got.score is None:
        return
    frame.scores.append(ScoreTerm(address, got.score, plates))
    baseline = got.baseline
    if baseline is None:
        return
    if isinstance(baseline, (Moving, Learned)):
        frame.context.options.baselines.append(baseline)
        if isinstance(baseline, Learned):
            _note_learned(frame, address, baseline)
        baseline = baseline()
    value = jnp.sum(stop_gradient(jnp.asarray(baseline)))
    frame.zeros.append(value * (1 - magic(jnp.sum(got.score))))


def _note_learned(frame: Frame, address: str, baseline: Learned) -> None:
    """Remember a baseline to be trained on the value of the run its site is in."""
    outer = frame
    while outer.parent is not None:
        outer = outer.parent
    if outer is not frame and jax.tree.leaves(baseline.inputs):
        raise ValueError(
            f"`baseline` at site {address!r} must have no inputs inside gk.vi.scan, vmap, cond or among particles: the "
            "value it is trained on is known outside only. Use a learned constant, `Moving`, or RLOO."
        )
    if all(baseline is not known for known in outer.learned):
        outer.learned.append(baseline)


def _looped(frame: Frame, address: str, law: dist.Distribution, strategy: Strategy, key: Any) -> Any:
    """A site with alternatives inside a loop: draw it, or take the alternative this replay puts at this step."""
    if isinstance(strategy, Enum):
        strategy = Lanes(second_order=False)
    if not isinstance(strategy, AbstractAlternatives):
        raise ValueError(  # noqa: TRY004 - a strategy of the wrong kind for the place
            f"`grad` at site {address!r} must be a local strategy, RLOO, Lanes, MVD or Enum inside gk.vi.scan, vmap or "
            f"cond; got {type(strategy).__name__}, which needs to stop the run there."
        )
    value, alts, coefficients, score = strategy.alternatives(key, law)
    if score is not None:
        frame.scores.append(ScoreTerm(address, score, ()))
    forced = frame.context.override.get(address)
    if forced is not None:
        steps, alternative, _ = forced
        here = np.asarray(True)  # stays concrete while draws are enumerated
        for mine, step in zip(frame.path, steps, strict=True):
            here = here & (mine == step)
        state = exact_state()
        if state is not None and bool(here):
            state.tape = []  # from here on the replay differs from its base run and draws afresh
        value = jnp.where(here, alternative, value)
    frame.pending[address] = Pending(alts, coefficients, strategy.keep_gradient)
    return Attached(value)


def _resume_copies(strategy: RLOO) -> Callable:
    """Leave-one-out over whole copies of the rest of the run."""

    def resume(run: Callable, context: Context) -> Any:
        def copy(index: Any) -> list[tuple]:
            key = jr.fold_in(fold_name(context.key, "copy"), index)
            terms = run(context._replace(key=key, copies=True), open_group=True)
            return [(t.value, jnp.zeros(jnp.shape(t.value)) if t.group is None else t.group) for t in terms]

        parts = many(copy, jnp.arange(strategy.num_samples))
        return sum(jnp.sum(leave_one_out(values, scores)) for values, scores in parts)

    return resume


def run_segment(fn: Callable[[], Any], context: Context, open_group: bool = False) -> Any:
    """Run `fn` once; at an abort, hand over to the strategy. Returns a closed scalar (or terms, for copies)."""
    frame = Frame(context)
    try:
        with active(frame):
            out = as_scalar(fn(), "fn")
        terms = frame.terms(out)
    except Abort as abort:
        if abort.token is not context.options.token:
            raise
        memo = {**context.memo, **frame.memo}
        rest = context._replace(memo=memo, paths=context.paths * abort.paths)

        def again(inner: Context, open_group: bool = False) -> Any:
            return run_segment(fn, inner, open_group)

        value = as_scalar(abort.resume(again, rest), f"strategy at {abort.address}")
        terms = [Term(value, total(frame.scores), total(frame.group))]
    terms = _with_learned(frame, frame.close(terms))
    if open_group:
        return terms
    return sum(jnp.sum(term.value) for term in terms)


def _with_learned(frame: Frame, terms: list[Term]) -> list[Term]:
    """Add the zero-valued training term of learned baselines."""
    if not frame.learned:
        return terms
    target = stop_gradient(sum(jnp.sum(term.value) for term in terms))
    losses = [(baseline() - target) ** 2 for baseline in frame.learned]
    sense = frame.context.options.sense
    return [*terms, *(Term(-sense * (loss - stop_gradient(loss)), None, None) for loss in losses)]


def expectation(
    fn: Callable[[], Any], key: Any, max_paths: int, *, sense: int = 1, enumerated: bool = False
) -> tuple[Any, list]:
    """The surrogate of `fn` and the stateful baselines it met."""
    from ._run import boundary

    last: list = []
    for enumerate_sites in (True, False):
        options = Options(object(), max_paths, enumerate_sites, sense, last := [])
        context = Context(options, key, {}, {})

        def run(context: Context = context) -> Any:
            return run_segment(lambda: _in_boundary(boundary, fn), context)

        try:
            value = enumerate_draws(run, (), 1, _EXACT_PATHS) if enumerated else run()
        except Overflow as overflow:
            if overflow.token is not options.token:
                raise
            continue
        return value, last
    raise AssertionError("unreachable: without enumeration the default policy cannot overflow")


_EXACT_PATHS = 2**18


def _in_boundary(boundary: Callable, fn: Callable[[], Any]) -> Any:
    with boundary():
        return fn()


def E(fn: Callable, *, max_paths: int = 4096) -> Callable:
    r"""The expectation of a program: an unbiased value whose derivatives are unbiased.

    `E(fn)(*args, key=key)` is a scalar $s$ with $E[s] = E[fn(args)]$, where the right-hand side averages over every
    site `fn` draws (by `gk.vi.sample`, `gk.vi.draw` or inside an objective), and with
    $E[\partial s] = \partial E[fn(args)]$ for `jax.grad`, `eqx.filter_grad` and, where the strategies allow,
    `jax.hessian`. It is an ordinary differentiable JAX function: jit it, or `jax.vmap` it with one key per lane.

    Inside another `E` it closes a part of the objective early; its value may then be used linearly only (see
    `gk.vi.debug`).

    Args:
        fn: a function returning a real scalar; may hold sites.
        max_paths: cap on the number of jointly enumerated paths.

    Returns:
        A function of the arguments of `fn` and a keyword `key` (may be omitted inside another `E`).

    Raises:
        TypeError: if no key is given outside `E`.
        ValueError: if `fn` returns no scalar, addresses repeat, or enumeration exceeds `max_paths`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def cost(p):
        ...     return jnp.where(vi.sample("b", dist.Bernoulli(p), grad=vi.Enum()) == 1, 3.0, 1.0)
        >>> float(jax.grad(lambda p: vi.E(cost)(p, key=jax.random.key(0)))(0.3))
        2.0

    Source: Becker et al., "Probabilistic Programming with Programmable Variational Inference", PLDI 2024; surrogate
    form after Foerster et al., "DiCE", ICML 2018.
    """
    check_count("max_paths", max_paths)
    if not callable(fn):
        raise TypeError(f"`fn` must be callable; got {describe(fn)}.")

    def estimate(*args: Any, key: Any = None, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is None:
            if key is None:
                raise TypeError("`key` must be given outside `E`: call `E(fn)(*args, key=jax.random.key(0))`.")
            check_key(key)
            return inject(expectation(lambda: fn(*args, **kwargs), key, max_paths)[0])
        if key is None:
            frame.check_trace("A nested `E` without its own key")
        elif frame.state != trace_state():  # a lane of the caller's own vmap: nothing can be remembered
            check_key(key)
            return inject(expectation(lambda: fn(*args, **kwargs), key, max_paths)[0])
        address = "/".join((*frame.scope, frame.fresh("E")))
        if address not in frame.context.memo:
            inner = frame.key(address) if key is None else key
            check_key(inner)
            frame.memo[address] = expectation(lambda: fn(*args, **kwargs), inner, max_paths)[0]
        return inject({**frame.context.memo, **frame.memo}[address])

    return estimate


def exact(fn: Callable, *, max_paths: int = 4096) -> Callable:
    r"""The expectation of the estimator `E(fn)` as configured, by enumerating every draw it makes.

    Not only the program's sites but all randomness of the estimator is summed out: the draws of score sites, the
    copies of RLOO, the particles of a bound, the index of a resampling step. Outcomes are weighted by undifferentiated
    probabilities, so the gradient of `exact(fn)` is the expected gradient of the estimator: comparing it with a
    closed form tests unbiasedness deterministically.

    Args:
        fn: as for `E`.
        max_paths: cap on the paths enumerated by the estimator itself, as for `E`.

    Returns:
        A differentiable function of the arguments of `fn`, without a key.

    Raises:
        ValueError: at a draw from a continuous law, or above 2**18 outcomes of the estimator's draws.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Score())
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0
    """
    check_count("max_paths", max_paths)

    @eqx.filter_jit  # thousands of small operations: compiled as a whole
    def enumerate_fn(*args: Any, **kwargs: Any) -> Any:
        value, _ = expectation(lambda: fn(*args, **kwargs), jr.key(0), max_paths, enumerated=True)
        return value

    return enumerate_fn


_INJECTION: ContextVar[Callable | None] = ContextVar("genkit_vi_injection", default=None)


def inject(value: Any) -> Any:
    """Add a probe to a closed estimate while `gk.vi.debug` checks that it is used linearly."""
    probe = _INJECTION.get()
    return value if probe is None else probe(value)
