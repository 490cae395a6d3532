"""Draws, and the exact enumeration of the draws an estimator makes."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.lax import stop_gradient
from jaxtyping import Array, Key, PyTree

from genkit.vi._runtime._distributions import joint_support
from genkit.vi._runtime._frame import changed, interpreter, is_default_sampled
from genkit.vi._runtime._stop import DrawMade, NextDraw, NoDraws, Outcomes, Stop


def outcomes() -> Outcomes | None:
    """The enumeration under way, if any."""
    state = interpreter().enumeration
    return state if isinstance(state, Outcomes) else None


def is_exact() -> bool:
    """True while draws are enumerated rather than made."""
    return outcomes() is not None


@contextlib.contextmanager
def without_enumeration() -> Iterator[None]:
    """Trace shapes with ordinary draws."""
    with changed(enumeration=None):
        yield


def draw_from(distribution: dist.Distribution, key: Key[Array, ""] | None) -> tuple[PyTree, PyTree]:
    """Draw a value and its intermediates (or take the next enumerated outcome).

    The only place where `E` makes randomness.
    """
    state = interpreter().enumeration
    if state is None:
        if is_default_sampled(distribution):
            return distribution.sample(key), []
        return distribution.sample_with_intermediates(key)
    if not distribution.is_discrete:
        raise ValueError(
            f"`exact` must meet discrete draws only; got a draw from the continuous {type(distribution).__name__}. "
            "Integrate continuous sites by quadrature, or estimate with `E` and many keys."
        )
    return state.next(distribution), []


def many(fn: Callable, xs: PyTree) -> PyTree:
    """`jax.vmap(fn)(xs)`, as a Python loop while draws are being enumerated."""
    if not is_exact():
        return jax.vmap(fn)(xs)
    # A part without draws can be mapped even then, which spares thousands of small operations.
    attempt = NoDraws()
    try:
        with changed(enumeration=attempt):
            return jax.vmap(fn)(xs)
    except Stop as stop:
        if stop.owner is not attempt or not isinstance(stop.reason, DrawMade):
            raise
    size = jax.tree.leaves(xs)[0].shape[0]
    outs = [fn(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(size)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def enumerate_draws(run: Callable[[], Array], choices: tuple, paths: int, max_paths: int) -> Array:
    """Sum `run` over all outcomes of its draws, weighted by their (undifferentiated) probabilities."""
    state = Outcomes(choices)
    try:
        with changed(enumeration=state):
            return run()
    except Stop as stop:
        if stop.owner is not state or not isinstance(stop.reason, NextDraw):
            raise
        distribution = stop.reason.distribution
    support = joint_support(distribution, max_paths)
    paths *= support.shape[0]
    if paths > max_paths:
        raise ValueError(
            f"`exact` must enumerate at most max_paths={max_paths} outcomes of the estimator's draws; got {paths}. "
            "Use fewer particles or sites, or raise max_paths."
        )
    weights = jax.vmap(lambda v: stop_gradient(jnp.exp(jnp.sum(distribution.log_prob(v)))))(support)
    values = jax.vmap(lambda v: enumerate_draws(run, (*choices, v), paths, max_paths))(support)
    return jnp.sum(weights * values)


def as_scalar(out: PyTree, what: str) -> Array:
    """Check that an objective returned a real scalar."""
    if np.shape(out) == () and jnp.issubdtype(jnp.result_type(out), jnp.integer):
        return jnp.asarray(out).astype(float)
    if np.shape(out) != () or not jnp.issubdtype(jnp.result_type(out), jnp.floating):
        got = jax.tree.map(lambda leaf: (jnp.result_type(leaf).name, np.shape(leaf)), out)
        raise ValueError(f"`{what}` must return a real scalar; got {got}. Sum or average over the batch.")
    return out
