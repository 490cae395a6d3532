"""The form in which a class enters the battery of `test_contracts.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax


@dataclass(frozen=True)
class Case:
    """One module and one way to use it.

    Args:
        name: unique within its wing.
        make: builds the module, in the dtype that is the default when it is called (no arrays made at import).
        use: a pure function of the module that returns arrays (make its inputs inside); `None` for pure records.
        grad: whether the floating leaves have finite gradients, not all of them zero.
        zero_grad: all-zero gradients are fine.
        vmap: whether a stack of two modules may be vectorised.
        dtype: whether floating results have the default dtype.
        rtol: what compilation may change.
    """

    name: str
    make: Callable[[], eqx.Module]
    use: Callable[[Any], Any] | None = None
    grad: bool = True
    zero_grad: bool = False
    vmap: bool = True
    dtype: bool = True
    rtol: float = 1e-5

    def classes(self) -> set[type]:
        """Every module class inside the module made."""
        found: set[type] = set()

        def visit(node: Any) -> bool:
            if isinstance(node, eqx.Module):
                found.add(type(node))
            return False

        jax.tree.leaves(self.make(), is_leaf=visit)
        return found
