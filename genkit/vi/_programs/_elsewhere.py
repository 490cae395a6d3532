"""Control flow where no genkit program runs: numpyro's under its handlers, else JAX's own."""

from collections.abc import Callable

import jax
from jaxtyping import ArrayLike, PyTree
from numpyro.contrib.control_flow import cond as numpyro_cond, scan as numpyro_scan
from numpyro.primitives import _PYRO_STACK as _NUMPYRO_STACK, Messenger

from genkit.vi._runtime._frame import interpreter


class LoopTaker(Messenger):
    """A handler inside a program that wants loops as numpyro's messages, before the program runs them.

    Attributes:
        is_taking: False while a message is on its way to the program.
    """

    is_taking: bool = True


def is_elsewhere() -> bool:
    """True outside of programs and of `E`, and where a handler inside wants to see the loop first."""
    now = interpreter()
    if now.run is None and now.frame is None:
        return True
    return any(isinstance(handler, LoopTaker) and handler.is_taking for handler in _NUMPYRO_STACK)


def scan(f: Callable, init: PyTree, xs: PyTree, length: int, reverse: bool) -> tuple[PyTree, PyTree]:
    """Scan for whoever is listening."""
    if _NUMPYRO_STACK:
        return numpyro_scan(f, init, xs, length=length, reverse=reverse)
    return jax.lax.scan(f, init, xs, length=length, reverse=reverse)


def vmap(lane: Callable, items: PyTree, length: int) -> PyTree:
    """Map for whoever is listening; numpyro has no map, a scan without a carry stands for it."""
    if _NUMPYRO_STACK:
        return numpyro_scan(lambda carry, item: (carry, lane(item)), 0, items, length=length)[1]
    return jax.vmap(lane)(items)


def cond(pred: ArrayLike, true_fn: Callable, false_fn: Callable, operands: tuple) -> PyTree:
    """Branch for whoever is listening."""
    if _NUMPYRO_STACK:
        return numpyro_cond(pred, lambda ops: true_fn(*ops), lambda ops: false_fn(*ops), operands)
    return jax.lax.cond(pred, true_fn, false_fn, *operands)
