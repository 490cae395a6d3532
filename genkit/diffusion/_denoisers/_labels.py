"""Labels of the members of a family, such as the components of a mixture, and conditions on them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from genkit._core._checks import check, check_count, describe, is_concrete


def check_labels(
    labels: ArrayLike | None, size: int, name: str, num_labels: int | None = None
) -> tuple[Array | None, int | None]:
    """Labels as an array of one label for each of `size` members, and the number of labels.

    Args:
        labels: the labels, or `None`.
        size: number of members.
        name: what to call a member in errors.
        num_labels: number of labels, needed only where the labels are traced.

    Returns:
        The labels `(size,)` and their number; `None` twice where there are none.

    Raises:
        ValueError: for labels that do not fit, leave out a number, or are traced without their number.
    """
    if labels is None:
        return None, None
    # Asked before any conversion: inside jit the JAX form of a NumPy array is already traced.
    known = is_concrete(labels)
    labels = np.asarray(labels) if known else jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"`labels` must be integers; got {describe(labels)}.")
    if labels.shape != (size,):
        raise ValueError(f"`labels` must be of shape ({size},), one for each {name}; got shape {labels.shape}.")
    if num_labels is not None:
        check_count("num_labels", num_labels)
    if not known:
        if num_labels is None:
            raise ValueError(
                "`labels` must be concrete, because their number is part of the structure; got a traced value. "
                "Pass `num_labels=` with it."
            )
        return jnp.asarray(labels, jnp.int32), num_labels
    present = np.unique(labels)
    if present[0] != 0 or present[-1] != len(present) - 1:
        raise ValueError(
            f"`labels` must be 0, 1, ..., each with at least one member; got labels {present[:10].tolist()}."
        )
    if num_labels is not None and num_labels != len(present):
        raise ValueError(f"`num_labels` must be the number of labels, {len(present)}; got {num_labels}.")
    # Their number is known from here on and part of the structure: conditions are checked against it under jit too.
    return jnp.asarray(labels, jnp.int32), len(present)


def label_mask(labels: Array | None, num_labels: int | None, cond: PyTree) -> Array | None:
    """Mask of the members of a labeled family that a condition admits; `None` for all.

    Args:
        labels: label of each member, or `None` for a family without labels.
        num_labels: number of labels.
        cond: one integer label, -1 or `None` for all.

    Returns:
        A mask, or `None` where nothing is masked.

    Raises:
        ValueError: for a condition on a family without labels, or one that is no label.
    """
    if cond is None:
        return None
    check(labels is not None, "cond", "None, because this distribution was given no labels", cond, "Pass `labels=`.")
    assert labels is not None and num_labels is not None
    cond = jnp.asarray(cond)
    integer = cond.shape == () and jnp.issubdtype(cond.dtype, jnp.integer)
    check(integer, "cond", "one integer label (-1 for all)", cond)
    if is_concrete(cond) and not -1 <= int(cond) < num_labels:
        raise ValueError(f"`cond` must be a label below {num_labels}, or -1 for all; got {int(cond)}.")
    return (labels == cond) | (cond < 0)


def draw_members(
    log_prior: Callable[[PyTree], Float[Array, " k"]],
    size: int,
    num_samples: int,
    cond: PyTree,
    *,
    key: Key[Array, ""],
) -> Int[Array, " n"]:
    """Draw members of a family of `size` from `log_prior(cond)`, with one condition for all or one for each draw."""
    if cond is None or jnp.ndim(cond) == 0:
        return jr.categorical(key, log_prior(cond), shape=(num_samples,))
    cond = jnp.asarray(cond)
    if cond.shape != (num_samples,):
        raise ValueError(f"`cond` must be a label or {num_samples} labels; got shape {cond.shape}.")
    # The largest of log-weights plus Gumbel noise is a draw; unlike `categorical` it takes a row of weights per draw.
    gumbel = jr.gumbel(key, (num_samples, size))
    return jnp.argmax(jax.vmap(log_prior)(cond) + gumbel, axis=-1)
