"""The boundary `E`: an unbiased value whose derivatives are unbiased, and its exact enumeration."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check_count, check_key, describe
from genkit.vi._programs._decomposition import terms_of
from genkit.vi._programs._handler import ExpectationHandler, Settings
from genkit.vi._runtime._enumeration import as_scalar, enumerate_draws
from genkit.vi._runtime._frame import MAX_PATHS, Context, Frame, Options, Term, active, current_frame, interpreter
from genkit.vi._runtime._keys import trace_state
from genkit.vi._runtime._stop import NeedsContinuations, Stop, TooManyPaths


# Cap on the outcomes `exact` enumerates: above it the compiled program does not fit into memory.
_EXACT_PATHS = 2**18


def run_segment(fn: Callable[[], PyTree], context: Context) -> Array:
    """Run `fn` once and close the result: a scalar whose gradient is complete."""
    return _sum_of(run_open(fn, context))


def run_open(fn: Callable[[], PyTree], context: Context) -> list[Term]:
    """Run `fn` once; where it stops, hand over to the strategy. Only the leave-one-out group of the terms is open."""
    frame = Frame(context)

    def in_frame(frame: Frame) -> Array:
        with active(frame), ExpectationHandler(Settings(), frame=frame):
            return as_scalar(fn(), "fn")

    try:
        out = in_frame(frame)
        terms = terms_of(frame, out, in_frame)
    except Stop as stop:
        reason = stop.reason
        if stop.owner is not context.options.token or not isinstance(reason, NeedsContinuations):
            raise
        rest = context._replace(memo=frame.remembered(), paths=context.paths * reason.paths)

        value = as_scalar(reason.resume(_Rest(fn), rest), f"strategy at {reason.address}")
        terms = [frame.with_all_scores(value)]
    return _with_learned(frame, frame.close(terms))


class _Rest(NamedTuple):
    """The rest of a program, run again under another context: the `run` of `NeedsContinuations.resume`."""

    fn: Callable[[], PyTree]

    def __call__(self, context: Context) -> Array:
        """The closed scalar."""
        return run_segment(self.fn, context)

    def open(self, context: Context) -> list[Term]:
        """The terms, whose leave-one-out group is still open."""
        return run_open(self.fn, context)


def _sum_of(terms: list[Term]) -> Array:
    values = [jnp.sum(term.value) for term in terms]
    return sum(values[1:], values[0])


def _with_learned(frame: Frame, terms: list[Term]) -> list[Term]:
    """Add the zero-valued training term of learned baselines."""
    if not frame.learned:
        return terms
    target = stop_gradient(_sum_of(terms))
    sense = frame.context.options.sense
    training = []
    for baseline in frame.learned:
        loss = (baseline() - target) ** 2
        training.append(Term(-sense * (loss - stop_gradient(loss)), None, None))
    return [*terms, *training]


def expectation(
    fn: Callable[[], PyTree],
    key: Key[Array, ""],
    max_paths: int = MAX_PATHS,
    *,
    sense: int = 1,
    enumerated: bool = False,
) -> tuple[Array, list]:
    """The surrogate of `fn` and the stateful baselines it met.

    Args:
        fn: a function returning a real scalar; may hold sites.
        key: typed PRNG key.
        max_paths: cap on the number of jointly enumerated paths.
        sense: +1 if the result is maximized, -1 if it is minimized (learned baselines are always minimized).
        enumerated: enumerate the draws instead of making them.

    Returns:
        The scalar and the baselines.
    """

    def attempt(enumerate_sites: bool) -> tuple[Array, list]:
        options = Options(object(), max_paths, enumerate_sites, sense, [])
        context = Context(options, key, {}, {})
        run = lambda: run_segment(fn, context)
        try:
            value = enumerate_draws(run, (), 1, _EXACT_PATHS) if enumerated else run()
        except Stop as stop:
            if stop.owner is options.token and isinstance(stop.reason, TooManyPaths):
                # Without enumeration the default policy cannot meet too many paths again.
                return attempt(False)
            raise
        return value, options.baselines

    return attempt(True)


def E(fn: Callable, *, max_paths: int = MAX_PATHS) -> Callable:
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

    def estimate(*args: PyTree, key: Key[Array, ""] | None = None, **kwargs: PyTree) -> Array:
        frame = current_frame()
        if frame is None and key is None:
            raise TypeError("`key` must be given outside `E`: call `E(fn)(*args, key=jax.random.key(0))`.")
        if key is not None:
            check_key(key)
        elif frame is not None:
            frame.check_trace("A nested `E` without its own key")

        def close(key: Key[Array, ""]) -> Array:
            return expectation(lambda: fn(*args, **kwargs), key, max_paths)[0]

        if frame is None or frame.state != trace_state():
            # Outside, or in a lane of the caller's own vmap inside `E`, where nothing can be remembered.
            assert key is not None  # checked above
            return inject(close(key))
        address = "/".join((*frame.scope, frame.fresh("E")))
        if address not in frame.context.memo:
            frame.memo[address] = close(frame.key(address) if key is None else key)
        return inject(frame.remembered()[address])

    return estimate


def exact(fn: Callable, *, max_paths: int = MAX_PATHS) -> Callable:
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
        ValueError: at a draw from a continuous distribution, or above 2**18 outcomes of the estimator's draws.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Score())
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0
    """
    check_count("max_paths", max_paths)

    @eqx.filter_jit  # thousands of small operations: compiled as a whole
    def enumerate_fn(*args: PyTree, **kwargs: PyTree) -> Array:
        value, _ = expectation(lambda: fn(*args, **kwargs), jr.key(0), max_paths, enumerated=True)
        return value

    return enumerate_fn


def inject(value: Array) -> Array:
    """Add a probe to a closed estimate while `gk.vi.debug` checks that it is used linearly."""
    probe = interpreter().probe
    return value if probe is None else probe(value)
