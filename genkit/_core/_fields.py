"""Fields of modules: numbers as array leaves, and leaves that belong to a model without being trained."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def as_number(value: Any) -> jax.Array:
    """`value` as an array of a floating dtype; Python numbers stay weakly typed, so that they never promote others.

    Fields for numbers that users sweep say `eqx.field(converter=as_number)`: an array leaf, so that another value never
    compiles again. They name the converter in the class body, where type checkers see that a Python float will do.
    """
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(jnp.result_type(float))


def maybe_number(value: Any) -> jax.Array | None:
    """`as_number` of a number that may be absent."""
    return None if value is None else as_number(value)


# Metadata of a field whose leaves are part of the model but not parameters: `eqx.field(..., metadata=FROZEN)`. The
# optimizer must not touch or decay them.
FROZEN = {"genkit_frozen": True}


def trainable(tree: PyTree) -> PyTree[bool]:
    """Mark what an optimizer may change: inexact arrays that do not sit under a field marked `FROZEN`.

    Args:
        tree: a model, or any part of one.

    Returns:
        A tree of the structure of `tree` with a boolean at every leaf, as `equinox.partition` takes it.

    Example:
        >>> import equinox as eqx
        >>> import jax.numpy as jnp
        >>> from genkit._core._fields import FROZEN, trainable
        >>> class Scaled(eqx.Module):
        ...     weight: object
        ...     scale: object = eqx.field(metadata=FROZEN)
        >>> marks = trainable(Scaled(jnp.ones(2), jnp.array(0.5)))
        >>> (marks.weight, marks.scale)
        (True, False)
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    marks = _marks(tree, frozen=False)
    assert len(marks) == len(leaves), "one mark for every leaf"
    return jax.tree_util.tree_unflatten(treedef, marks)


def _marks(node: Any, *, frozen: bool) -> list[bool]:
    """The marks of the leaves below `node`, in flattening order."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)[0]
    if len(children) == 1 and not children[0][0]:
        return [eqx.is_inexact_array(node) and not frozen]
    fields = type(node).__dataclass_fields__ if isinstance(node, eqx.Module) else {}
    marks = []
    for (entry, *_), child in children:
        name = getattr(entry, "name", None)
        held = name in fields and bool(fields[name].metadata.get("genkit_frozen", False))
        marks += _marks(child, frozen=frozen or held)
    return marks
