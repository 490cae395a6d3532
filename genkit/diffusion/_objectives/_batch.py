"""Batches of examples and conditions, and the regression of clean examples on noisy ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import describe
from genkit.sampling import null_like


def split_batch(batch: PyTree) -> tuple[Float[Array, " b *shape"], PyTree]:
    """Examples and conditions of a batch: an array, or a pair of them.

    Args:
        batch: examples `(b, *shape)`, or a pair of them and their conditions `(b, ...)`.

    Returns:
        The examples, and the conditions or `None`.

    Raises:
        ValueError: for anything else, an empty batch included.
    """
    x0 = batch
    cond = None
    if isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            raise ValueError(f"`batch` must be an array or a pair (x, cond); got {len(batch)} entries.")
        x0, cond = batch
    x0 = jnp.asarray(x0)
    if x0.ndim < 1 or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"`batch` must be floating examples with a leading batch axis; got {describe(x0)}.")
    # A mean over nothing is NaN.
    if x0.shape[0] == 0:
        raise ValueError("`batch` must be at least one example; got none.")
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != x0.shape[:1]:
            raise ValueError(f"`cond` must be one entry for each of the {x0.shape[0]} examples; got {describe(leaf)}.")
    return x0, cond


def drop_conditions(cond: PyTree, probability: Float[Array, ""], *, key: Key[Array, ""]) -> PyTree:
    """Replace the condition of each example by "no condition" with the given probability."""
    leaves = jax.tree.leaves(cond)
    if not leaves:
        return cond
    # One decision per example, whatever parts its condition has.
    dropped = jr.bernoulli(key, probability, (leaves[0].shape[0],))

    def choose(leaf: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *(1,) * (leaf.ndim - 1)), null_like(leaf), leaf)

    return jax.tree.map(choose, cond)


def regress(
    model: Callable,
    x0: Float[Array, " b *shape"],
    noise: Float[Array, " b *shape"],
    sigma: Float[Array, " b"],
    cond: PyTree,
    weight: Float[Array, " b"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted squared distance of the denoised examples to the clean ones, in the denoiser's coordinates.

    Args:
        model: denoiser of one example.
        x0: clean examples.
        noise: standard normals.
        sigma: noise level of each example.
        cond: conditions, or `None`.
        weight: weight of each example.

    Returns:
        The mean over the batch of the weighted squared norms, and `{"mse": unweighted mean over all coordinates}`.

    Raises:
        ValueError: for a model that does not return an array of the shape of the example.
    """
    x = x0 + sigma.reshape(-1, *(1,) * (x0.ndim - 1)) * noise
    estimate = jax.vmap(model)(x, sigma, cond)
    check_output(estimate, x0)
    residual = estimate - x0
    squares = jnp.sum(residual**2, axis=tuple(range(1, x0.ndim)))
    return jnp.mean(weight * squares), {"mse": jnp.mean(residual**2)}


def check_output(output: PyTree, x: Float[Array, " b *shape"]) -> None:
    """Refuse outputs of a model that are not one array of the shape of each example.

    Broadcasting would make of a scalar or a column a loss that falls, and of the model one that learned the mean.
    """
    leaves = jax.tree.leaves(output)
    if len(leaves) != 1:
        raise ValueError(f"`model` must return one array of the shape of an example, {x.shape[1:]}; got {len(leaves)}.")
    (made,) = leaves
    if made.shape != x.shape or not jnp.issubdtype(made.dtype, jnp.floating):
        raise ValueError(
            f"`model` must return a floating array of the shape of an example, {x.shape[1:]}; "
            f"got {made.dtype}{list(made.shape[1:])}."
        )
