"""The form in which a class enters the battery of `test_contracts.py`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax


@dataclass(frozen=True)
class Case:
    """One module and one way to use it.

    Args:
        name: unique within its submodule.
        make: builds the module, in the dtype that is the default when it is called (no arrays made at import).
        use: a pure function of the module that returns arrays (make its inputs inside); `None` for pure records.
        grad: whether the floating leaves have finite gradients, not all of them zero.
        zero_grad: all-zero gradients are fine.
        eager: whether to compare with the result without compilation (not for deep networks: every operation is
            compiled by itself then).
        vmap: whether a stack of two modules may be vectorized.
        dtype: whether floating results have the default dtype.
        rtol: what compilation may change.
    """

    name: str
    make: Callable[[], eqx.Module]
    use: Callable[[Any], Any] | None = None
    grad: bool = True
    zero_grad: bool = False
    eager: bool = True
    vmap: bool = True
    dtype: bool = True
    rtol: float = 1e-5

    @functools.cached_property
    def made(self) -> eqx.Module:
        """One module made in float32, shared by the tests."""
        return self.make()

    def classes(self) -> set[type]:
        """Every module class inside the module made."""
        found: set[type] = set()

        def visit(node: Any) -> bool:
            if isinstance(node, eqx.Module):
                found.add(type(node))
            return False

        jax.tree.leaves(self.made, is_leaf=visit)
        return found
