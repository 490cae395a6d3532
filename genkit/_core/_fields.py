"""Fields of modules: numbers as array leaves, and leaves that belong to a model without being trained."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


Fact = TypeVar("Fact")


def as_number(value: PyTree) -> jax.Array:
    """`value` as an array of a floating dtype; Python numbers stay weakly typed, so that they never promote others.

    Fields for numbers that users sweep say `eqx.field(converter=as_number)`: an array leaf, so that another value never
    compiles again. They name the converter in the class body, where type checkers see that a Python float will do.
    """
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    return array.astype(jnp.result_type(float))


def maybe_number(value: PyTree | None) -> jax.Array | None:
    """`as_number` of a number that may be absent."""
    if value is None:
        return None
    return as_number(value)


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
    marks = _marks(tree, is_frozen=False)
    assert len(marks) == len(leaves), "one mark for every leaf"
    return jax.tree_util.tree_unflatten(treedef, marks)


def _marks(node: PyTree, *, is_frozen: bool) -> list[bool]:
    """The marks of the leaves below `node`, in flattening order."""
    # Flattening by one level, nodes of any kind included: paths tell the fields of modules.
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)[0]
    if len(children) == 1 and not children[0][0]:
        return [eqx.is_inexact_array(node) and not is_frozen]
    frozen_fields = set()
    if isinstance(node, eqx.Module):
        frozen_fields = {field.name for field in dataclasses.fields(node) if FROZEN.items() <= field.metadata.items()}
    marks = []
    for (entry, *_), child in children:
        below_frozen = isinstance(entry, jax.tree_util.GetAttrKey) and entry.name in frozen_fields
        marks += _marks(child, is_frozen=is_frozen or below_frozen)
    return marks


def fact_of(thing: object, defaults: Mapping[str, Fact], name: str) -> Fact:
    """Default of a fact that `thing` does not declare; for `__getattr__`, which Python asks where all else failed.

    A class attribute would do for methods and properties, but a subclass that keeps the fact in a field without a
    default would silently take the attribute as the field's default.

    Args:
        thing: the object that is asked.
        defaults: the facts that its base class declares.
        name: the attribute.

    Returns:
        The default.

    Raises:
        AttributeError: for any other name.
    """
    if name in defaults:
        return defaults[name]
    raise AttributeError(f"{type(thing).__name__!r} object has no attribute {name!r}")
