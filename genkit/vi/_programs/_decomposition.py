"""The terms of a run's result: which scores must multiply which part of it.

An objective such as `elbo` knows its terms, each with the few scores it depends on. They may be used only where the
result of the run is linear in the objective, with a coefficient no draw enters: `-elbo(p, q)`, `beta * elbo(p, q) + 1`,
a sum of two. Any other result (`elbo(p, q) ** 2`, `x * elbo(p, q)` with `x` drawn) takes all scores as a whole.
To find out, the run is traced once more as a function of its draws and of a shift of every objective.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, PyTree

from genkit.vi._runtime._frame import Frame, Term


# Errors of programs that look at drawn values outside of JAX.
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)

# What an array is made of, in rising order of trouble.
_CONSTANT = 0  # neither draws nor shifts
_DRAWN = 1  # draws, no shifts
_LINEAR = 2  # linear in the shifts, with constant coefficients; draws may be added
_OTHER = 3

_STRUCTURAL = frozenset(
    [
        "add",
        "add_any",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "expand_dims",
        "neg",
        "reduce_sum",
        "reshape",
        "rev",
        "slice",
        "squeeze",
        "sub",
        "transpose",
    ]
)
_CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
    ]
)


def terms_of(frame: Frame, out: Array, run: Callable[[Frame], Array]) -> list[Term]:
    """Split the result of a run into terms, each with the scores that must multiply it.

    Args:
        frame: the frame of the run.
        out: its result.
        run: runs the program again in another frame.

    Returns:
        The terms.
    """
    for known in frame.decomposed:
        if known.value is out and known.terms is not None:
            return known.terms
    if all(known.terms is None for known in frame.decomposed):
        return [frame.with_all_scores(out)]
    coefficients = _coefficients(frame, run)
    if coefficients is None:
        return [frame.with_all_scores(out)]
    rest = out
    terms = []
    for known, coefficient in zip(frame.decomposed, coefficients, strict=True):
        if known.terms is None:
            continue
        rest = rest - coefficient * known.value
        for term in known.terms:
            terms.append(term._replace(value=coefficient * term.value))
    return [*terms, frame.with_all_scores(rest)]


def _coefficients(frame: Frame, run: Callable[[Frame], Array]) -> Array | None:
    """The coefficient of every decomposed scalar in the result, or None where the result is not linear in them."""
    # Draws are remembered by address: as inputs they tell constants from what depends on them.
    arrays, static = eqx.partition(frame.remembered(), eqx.is_array)
    num = len(frame.decomposed)

    def again(arrays: PyTree, shifts: Array) -> Array:
        replay = Frame(frame.context._replace(memo=eqx.combine(arrays, static)))
        replay.shifts = shifts
        out = run(replay)
        if len(replay.decomposed) != num:
            raise _Different
        return out

    zeros = jnp.zeros(num)
    try:
        closed = jax.make_jaxpr(again)(arrays, zeros)
    except (_Different, *_UNTRACEABLE):
        return None
    leaves = jax.tree.leaves(arrays)
    kinds = [*([_DRAWN] * len(leaves)), _LINEAR]
    if _trace_kinds(closed.jaxpr, kinds) != [_LINEAR]:
        return None
    apply = jax.extend.core.jaxpr_as_fun(closed)
    return jax.grad(lambda shifts: apply(*leaves, shifts)[0])(zeros)


class _Different(Exception):
    """A replay met other objectives than the run it replays."""


def _trace_kinds(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
    """The kind of every output of a jaxpr, given those of its inputs."""
    known: dict = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda var: _CONSTANT if isinstance(var, Literal) else known.get(var, _CONSTANT)
    for eqn in jaxpr.eqns:
        kinds = [read(var) for var in eqn.invars]
        if any(kinds):
            known.update(zip(eqn.outvars, _output_kinds(eqn, kinds), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _output_kinds(eqn: JaxprEqn, kinds: list[int]) -> list[int]:
    """The kind of every output of one equation."""
    name = eqn.primitive.name
    num = len(eqn.outvars)
    worst = max(kinds)
    if worst < _LINEAR:
        return [worst] * num
    if name in _CALLS:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            return _trace_kinds(inner.jaxpr, kinds)
    if worst == _LINEAR:
        is_scaled = name in ("mul", "dot_general") and min(kinds) == _CONSTANT
        is_divided = name == "div" and kinds[1] == _CONSTANT
        is_chosen = name == "select_n" and kinds[0] == _CONSTANT
        if name in _STRUCTURAL or is_scaled or is_divided or is_chosen:
            return [_LINEAR] * num
    return [_OTHER] * num
