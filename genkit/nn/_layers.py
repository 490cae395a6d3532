"""Parts that several networks share."""

import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genkit._core._checks import check


Layer = TypeVar("Layer", bound=eqx.Module)


def attend(queries_keys_values: Float[Array, " tokens three_width"], num_heads: int) -> Float[Array, " tokens width"]:
    """Softmax self-attention of tokens, each given as its query, key and value side by side."""
    tokens, three_width = queries_keys_values.shape
    width = three_width // 3
    split = queries_keys_values.reshape(tokens, 3, num_heads, width // num_heads)
    query, key, value = jnp.unstack(split, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", query, key) / math.sqrt(width // num_heads)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), value).reshape(tokens, width)


def normalize(x: Float[Array, " *n width"]) -> Float[Array, " *n width"]:
    """Center and scale the last axis to unit variance; the small number only guards a constant vector."""
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-6)


def check_state(x: Array, shape: tuple[int, ...]) -> None:
    """Refuse a state that is not of the shape a network was built for."""
    hint = "Networks take one example; `jax.vmap` them over a batch."
    check(x.shape == shape, "x", f"of shape {shape}", f"shape {x.shape}", hint)


def zeroed(layer: Layer) -> Layer:
    """A layer with all its parameters zero, so that what it feeds begins as if it were not there."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_inexact_array(leaf) else leaf, layer)
