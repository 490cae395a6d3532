"""A residual multilayer perceptron conditioned on the noise level and on a label or a vector."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core._checks import check_count
from genkit.nn._embeddings import ConditionEmbedding
from genkit.nn._layers import check_state, normalize, zeroed


class MLP(eqx.Module):
    """A residual multilayer perceptron `(x, t, cond) -> array` for examples of any shape, fast on small ones.

    Blocks `h + W2 silu(W1 modulate(norm(h)))`, where the scale and shift of `modulate` are linear in the embedding of
    the time and the condition. The output begins at zero.

    Args:
        shape: shape of one example.
        width: size of the hidden state, even.
        depth: number of residual blocks.
        num_labels: number of classes, for a network conditioned on labels; label -1 or `None` is "no condition".
        cond_size: length of the condition, for a network conditioned on vectors; NaN or `None` is "no condition".
        key: typed PRNG key.

    Raises:
        ValueError: for sizes that are no positive integers, or both kinds of condition.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> net = gk.nn.MLP((2,), width=32, depth=2, num_labels=3, key=jax.random.key(0))
        >>> net(jnp.ones(2), jnp.array(0.5), jnp.array(1)).tolist()
        [0.0, 0.0]
    """

    embed: ConditionEmbedding
    first: eqx.nn.Linear
    blocks: tuple["_Block", ...]
    last: eqx.nn.Linear
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 3,
        num_labels: int | None = None,
        cond_size: int | None = None,
        key: Key[Array, ""],
    ):
        check_count("width", width, 2)
        check_count("depth", depth)
        key_embed, key_first, key_blocks, key_last = jr.split(key, 4)
        size = math.prod(shape)
        self.shape = tuple(shape)
        self.embed = ConditionEmbedding(width, num_labels=num_labels, cond_size=cond_size, key=key_embed)
        self.first = eqx.nn.Linear(size, width, key=key_first)
        self.blocks = tuple(_Block(width, key=block_key) for block_key in jr.split(key_blocks, depth))
        # Zero output: a preconditioned network starts as its skip connection.
        self.last = zeroed(eqx.nn.Linear(width, size, key=key_last))

    @property
    def num_labels(self) -> int | None:
        """Number of classes, or `None` where the condition is not a label."""
        return self.embed.num_labels

    def __call__(
        self, x: Float[Array, " *shape"], t: Float[ArrayLike, ""], cond: ArrayLike | None = None
    ) -> Float[Array, " *shape"]:
        """Evaluate the network on one example.

        Args:
            x: state, of the network's `shape`.
            t: time, or a function of the noise level of the order of one.
            cond: label, vector or `None`.

        Returns:
            An array of the shape of `x`.
        """
        check_state(x, self.shape)
        embedding = self.embed(jnp.asarray(t, x.dtype), cond)
        hidden = self.first(x.ravel())
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.last(jax.nn.silu(normalize(hidden))).reshape(x.shape)


class _Block(eqx.Module):
    """One residual block, modulated by an embedding."""

    modulate: eqx.nn.Linear
    widen: eqx.nn.Linear
    narrow: eqx.nn.Linear

    def __init__(self, width: int, *, key: Key[Array, ""]):
        key_modulate, key_widen, key_narrow = jr.split(key, 3)
        self.modulate = eqx.nn.Linear(width, 2 * width, key=key_modulate)
        self.widen = eqx.nn.Linear(width, width, key=key_widen)
        self.narrow = zeroed(eqx.nn.Linear(width, width, key=key_narrow))

    def __call__(self, hidden: Float[Array, " width"], embedding: Float[Array, " width"]) -> Float[Array, " width"]:
        scale, shift = jnp.split(self.modulate(embedding), 2)
        modulated = normalize(hidden) * (1 + scale) + shift
        return hidden + self.narrow(jax.nn.silu(self.widen(modulated)))
