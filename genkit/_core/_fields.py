"""Fields of modules: numbers as array leaves, and leaves that belong to a model without being trained."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


_FROZEN = "genkit_frozen"


def as_number(value: Any) -> jax.Array:
    """`value` as an array of a floating dtype; Python numbers stay weakly typed, so that they never promote others."""
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(jnp.result_type(float))


def number_field(**kwargs: Any) -> Any:
    """A field for a number (or array) that users sweep: an array leaf, so that another value never recompiles."""
    return eqx.field(converter=as_number, **kwargs)


def frozen_field(**kwargs: Any) -> Any:
    """A field whose leaves are part of the model but not parameters: the optimizer must not touch or decay them."""
    metadata = dict(kwargs.pop("metadata", {}))
    return eqx.field(metadata={**metadata, _FROZEN: True}, **kwargs)


def trainable(tree: PyTree) -> PyTree[bool]:
    """Mark what an optimizer may change: inexact arrays that do not sit under a `frozen_field`.

    Args:
        tree: a model, or any part of one.

    Returns:
        A tree of the structure of `tree` with a boolean at every leaf, as `equinox.partition` takes it.

    Example:
        >>> import equinox as eqx
        >>> import jax.numpy as jnp
        >>> from genkit._core._fields import frozen_field, trainable
        >>> class Scaled(eqx.Module):
        ...     weight: object
        ...     scale: object = frozen_field()
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
        held = name in fields and bool(fields[name].metadata.get(_FROZEN, False))
        marks += _marks(child, frozen=frozen or held)
    return marks
