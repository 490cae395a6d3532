"""Branches that may hold sites, and numpyro's own control flow answered with ours."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped
from numpyro.primitives import _PYRO_STACK as _NUMPYRO_STACK

from .._core._checks import describe
from ._control import _body, _looped, _Out, scan
from ._frame import (
    current_frame,
    is_exact,
    without_enumeration,
)
from ._run import current_run


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
    run = current_run()
    if run is None and current_frame() is None:
        if _NUMPYRO_STACK:
            from numpyro.contrib.control_flow import cond as numpyro_cond

            return numpyro_cond(pred, lambda ops: true_fn(*ops), lambda ops: false_fn(*ops), operands)
        return jax.lax.cond(pred, true_fn, false_fn, *operands)

    def execute(key: Any, static: dict) -> tuple[Any, _Out]:
        branches, shapes, statics = [], [], []
        for fn in (true_fn, false_fn):
            own: dict = {}

            def branch(ops: tuple, fn: Callable = fn, own: dict = own) -> tuple[Any, _Out]:
                values = {} if run is None else run.values
                return _body(lambda: fn(*ops), values, key, 0, own)

            branches.append(branch)
            statics.append(own)
            shapes.append(_quiet_shape(branch, operands))
        if jax.tree.structure(shapes[0][0]) != jax.tree.structure(shapes[1][0]):
            raise TypeError(
                f"`true_fn` and `false_fn` must return one structure; got {describe(shapes[0][0])} and "
                f"{describe(shapes[1][0])}."
            )
        union = _union(shapes[0][1], shapes[1][1])
        padded = [lambda ops, b=b: _pad(b(ops), union) for b in branches]
        if is_exact():
            results = [p(operands) for p in padded]
            merged = jax.tree.map(lambda a, b: jnp.where(pred, a, b), *results)
        else:
            merged = jax.lax.cond(pred, *padded, operands)
        for part in ("sites", "keep"):
            static[part] = {**statics[1].get(part, {}), **statics[0].get(part, {})}
        static["used"] = statics[0]["used"] | statics[1]["used"]
        return merged

    return _looped_once(execute)


def _looped_once(execute: Callable) -> Any:
    """A branch is a loop of one step at index 0."""

    def with_axis(key: Any, static: dict) -> tuple[Any, _Out]:
        result, out = execute(key, static)
        out = dict(out)
        out["pending"] = (
            {name: jax.tree.map(lambda a: a[None], pair) for name, pair in out["pending"].items()}
            if ("pending" in out)
            else {}
        )
        return result, out

    return _looped("cond", with_axis)


def _quiet_shape(branch: Callable, operands: tuple) -> Any:
    """The shapes a branch returns, without enumerating its draws."""
    with without_enumeration():
        return jax.eval_shape(branch, operands)


def _union(a: _Out, b: _Out) -> _Out:
    """The structure that holds the outputs of both branches."""
    union: _Out = {}
    for part in {*a, *b}:
        left, right = a.get(part), b.get(part)
        if isinstance(left, dict) or isinstance(right, dict):
            union[part] = {**(right or {}), **(left or {})}
        else:
            union[part] = left if left is not None else right
    return union


def _pad(pair: tuple[Any, _Out], union: _Out) -> tuple[Any, _Out]:
    """Fill the outputs of the other branch with zeros."""
    result, out = pair
    full: _Out = {}
    zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)
    for part, shape in union.items():
        if isinstance(shape, dict):
            full[part] = {k: out[part].get(k) if out[part].get(k) is not None else zeros(v) for k, v in shape.items()}
        else:
            full[part] = out[part] if out.get(part) is not None else zeros(shape)
    return result, full


def numpyro_control_flow(msg: dict) -> None:
    """Answer numpyro's own `scan` and `cond` with ours."""
    from numpyro.ops.pytree import PytreeTrace

    if msg["fn"].__name__ == "scan_wrapper":
        f, init, xs, length, reverse = msg["args"]
        carry, ys = scan(f, init, xs, length, reverse=reverse)
        msg["value"] = ((length, None, carry), (PytreeTrace({}), ys))
    else:
        pred, true_fn, false_fn, operand = msg["args"]
        msg["value"] = (cond(pred, true_fn, false_fn, operand), PytreeTrace({}))
