"""Branches that may hold sites, and numpyro's own control flow answered with ours."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree, Shaped
from numpyro.contrib.control_flow import cond as numpyro_cond, scan as numpyro_scan
from numpyro.ops.pytree import PytreeTrace

from genkit._core._checks import describe
from genkit.vi._programs import _elsewhere
from genkit.vi._programs._loops import BodyFacts, Collected, run_body, run_loop, scan
from genkit.vi._runtime._enumeration import is_exact, without_enumeration
from genkit.vi._runtime._frame import current_run


def cond(pred: Shaped[Array, ""] | bool, true_fn: Callable, false_fn: Callable, *operands: PyTree) -> PyTree:
    """`jax.lax.cond` whose branches may hold sites.

    The sites of both branches belong to the program; those of the branch not taken have value zero and do not count.

    Args:
        pred: a boolean scalar.
        true_fn: the branch taken where `pred` holds.
        false_fn: the other branch; returns the same structure.
        *operands: arguments of both.

    Returns:
        The result of the branch taken.

    Raises:
        TypeError: if the branches return different structures.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda p: vi.cond(vi.sample("b", dist.Bernoulli(p)) == 1, lambda: 3.0, lambda: 1.0)
        >>> round(float(vi.E(fn)(0.3, key=jax.random.key(0))), 4)
        1.6
    """
    if _elsewhere.is_elsewhere():
        return _elsewhere.cond(pred, true_fn, false_fn, operands)
    run = current_run()
    values = {} if run is None else run.values

    def execute(key: Key[Array, ""] | None, facts: BodyFacts) -> tuple[PyTree, Collected]:
        branch_facts = (BodyFacts(), BodyFacts())

        def branch_of(fn: Callable, own: BodyFacts) -> Callable[[tuple], tuple[PyTree, Collected]]:
            return lambda ops: run_body(lambda: fn(*ops), values, key, 0, own)

        branches = [branch_of(fn, own) for fn, own in zip((true_fn, false_fn), branch_facts, strict=True)]
        with without_enumeration():  # only shapes are asked for
            shapes = [jax.eval_shape(branch, operands) for branch in branches]
        if jax.tree.structure(shapes[0][0]) != jax.tree.structure(shapes[1][0]):
            raise TypeError(
                f"`true_fn` and `false_fn` must return one structure; got {describe(shapes[0][0])} and "
                f"{describe(shapes[1][0])}."
            )
        union = _union(shapes[0][1], shapes[1][1])
        padded = [lambda ops, branch=branch: _pad(branch(ops), union) for branch in branches]
        if is_exact():
            taken, other = [branch(operands) for branch in padded]
            result, out = jax.tree.map(lambda a, b: jnp.where(pred, a, b), taken, other)
        else:
            result, out = jax.lax.cond(pred, *padded, operands)
        for own in reversed(branch_facts):  # the facts of the first branch win
            facts.sites.update(own.sites)
            facts.keep_gradient.update(own.keep_gradient)
            facts.used |= own.used
        # A branch is a loop of one step: alternatives get an axis of steps.
        return result, out._replace(pending=jax.tree.map(lambda a: a[None], out.pending))

    return run_loop("cond", execute)


def _union(first: Collected, second: Collected) -> Collected:
    """The structure that holds the outputs of both branches."""
    merged = {}
    others = second._asdict()
    for name, left in first._asdict().items():
        right = others[name]
        if isinstance(left, dict):
            merged[name] = {**right, **left}
        else:
            merged[name] = right if left is None else left
    return Collected(**merged)


def _pad(pair: tuple[PyTree, Collected], union: Collected) -> tuple[PyTree, Collected]:
    """Fill the outputs of the other branch with zeros."""
    result, out = pair
    full = {}
    mine = out._asdict()
    for name, shape in union._asdict().items():
        own = mine[name]
        if isinstance(shape, dict):
            full[name] = {k: own[k] if k in own else _zeros(v) for k, v in shape.items()}
        else:
            full[name] = _zeros(shape) if own is None else own
    return result, Collected(**full)


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _argument_names(fn: Callable, num: int) -> tuple[str, ...]:
    return tuple(inspect.signature(fn).parameters)[:num]


def answer_control_flow(msg: dict) -> None:
    """Answer numpyro's own `scan` and `cond` with ours.

    A message is known by the names of its arguments, which are those of numpyro's public functions.

    Raises:
        RuntimeError: for control flow of another kind.
    """
    args = msg["args"]
    names = _argument_names(msg["fn"], len(args))
    if len(args) == 5 and names == _argument_names(numpyro_scan, 5):
        f, init, xs, length, reverse = args
        carry, ys = scan(f, init, xs, length, reverse=reverse)
        msg["value"] = ((length, None, carry), (PytreeTrace({}), ys))
    elif len(args) == 4 and names == _argument_names(numpyro_cond, 4):
        msg["value"] = (cond(*args), PytreeTrace({}))
    else:
        raise RuntimeError(
            f"Control flow inside a program must be numpyro's `scan` or `cond`, or gk.vi.scan, vmap or cond; got a "
            f"message with the arguments {names}, which this version of genkit does not know."
        )
