"""A small transformer on image patches, conditioned through its normalizations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core._checks import check, check_count
from genkit.nn._embeddings import ConditionEmbedding
from genkit.nn._layers import attend, check_state, normalize, zeroed


class DiT(eqx.Module):
    """A diffusion transformer `(x, t, cond) -> array` for images `(channels, height, width)`.

    The image is cut into square patches, which become tokens with learned positions; blocks of self-attention and a
    two-layer network are shifted, scaled and gated by the embedding of the time and the condition. Gates and output
    begin at zero.

    Args:
        shape: `(channels, height, width)` of one image.
        patch: side of a patch, a divisor of height and width.
        width: size of a token, a multiple of `num_heads` and even.
        depth: number of blocks.
        num_heads: number of attention heads.
        num_labels: number of classes, for a network conditioned on labels; label -1 or `None` is "no condition".
        cond_size: length of the condition, for a network conditioned on vectors; NaN or `None` is "no condition".
        key: typed PRNG key.

    Raises:
        ValueError: for sizes that do not fit each other, or both kinds of condition.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> net = gk.nn.DiT((1, 8, 8), width=32, depth=1, num_labels=10, key=jax.random.key(0))
        >>> net(jnp.ones((1, 8, 8)), jnp.array(0.5), jnp.array(3)).shape
        (1, 8, 8)

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, figure 3 (adaLN-Zero).
    """

    embed: ConditionEmbedding
    first: eqx.nn.Linear
    position: Float[Array, " tokens width"]
    blocks: tuple["_Block", ...]
    last_modulate: eqx.nn.Linear
    last: eqx.nn.Linear
    shape: tuple[int, ...] = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        num_labels: int | None = None,
        cond_size: int | None = None,
        key: Key[Array, ""],
    ):
        for name, count in (("patch", patch), ("width", width), ("depth", depth), ("num_heads", num_heads)):
            check_count(name, count)
        check(len(shape) == 3, "shape", "(channels, height, width)", str(tuple(shape)))
        channels, height, breadth = shape
        fits = height % patch == 0 and breadth % patch == 0
        check(fits, "patch", f"a divisor of height {height} and width {breadth}", patch)
        check(
            width % num_heads == 0 and width % 2 == 0,
            "width",
            f"even and a multiple of `num_heads` = {num_heads}",
            width,
        )
        tokens = (height // patch) * (breadth // patch)
        size = channels * patch**2
        key_embed, key_first, key_position, key_blocks, key_modulate, key_last = jr.split(key, 6)
        self.shape = tuple(shape)
        self.patch = patch
        self.embed = ConditionEmbedding(width, num_labels=num_labels, cond_size=cond_size, key=key_embed)
        self.first = eqx.nn.Linear(size, width, key=key_first)
        self.position = 0.3 * jr.normal(key_position, (tokens, width))
        self.blocks = tuple(_Block(width, num_heads, key=block_key) for block_key in jr.split(key_blocks, depth))
        # Zero gates and output: at first every block is the identity, which deep transformers need to train at all.
        self.last_modulate = zeroed(eqx.nn.Linear(width, 2 * width, key=key_modulate))
        self.last = zeroed(eqx.nn.Linear(width, size, key=key_last))

    @property
    def num_labels(self) -> int | None:
        """Number of classes, or `None` where the condition is not a label."""
        return self.embed.num_labels

    def __call__(
        self, x: Float[Array, " channels height width"], t: Float[ArrayLike, ""], cond: ArrayLike | None = None
    ) -> Float[Array, " channels height width"]:
        """Evaluate the network on one image.

        Args:
            x: state, of the network's `shape`.
            t: time, or a function of the noise level of the order of one.
            cond: label, vector or `None`.

        Returns:
            An array of the shape of `x`.
        """
        check_state(x, self.shape)
        embedding = self.embed(jnp.asarray(t, x.dtype), cond)
        tokens = jax.vmap(self.first)(_to_patches(x, self.patch)) + self.position
        for block in self.blocks:
            tokens = block(tokens, embedding)
        shift, scale = jnp.split(self.last_modulate(embedding), 2)
        return _from_patches(jax.vmap(self.last)(normalize(tokens) * (1 + scale) + shift), self.shape, self.patch)


class _Block(eqx.Module):
    """Self-attention and a two-layer network, each modulated and gated by an embedding."""

    modulate: eqx.nn.Linear
    attend_in: eqx.nn.Linear
    attend_out: eqx.nn.Linear
    widen: eqx.nn.Linear
    narrow: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, width: int, num_heads: int, *, key: Key[Array, ""]):
        key_modulate, key_in, key_out, key_widen, key_narrow = jr.split(key, 5)
        self.modulate = zeroed(eqx.nn.Linear(width, 6 * width, key=key_modulate))
        self.attend_in = eqx.nn.Linear(width, 3 * width, key=key_in)
        self.attend_out = eqx.nn.Linear(width, width, key=key_out)
        self.widen = eqx.nn.Linear(width, 4 * width, key=key_widen)
        self.narrow = eqx.nn.Linear(4 * width, width, key=key_narrow)
        self.num_heads = num_heads

    def __call__(
        self, tokens: Float[Array, " tokens width"], embedding: Float[Array, " width"]
    ) -> Float[Array, " tokens width"]:
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = jnp.split(self.modulate(embedding), 6)
        attended = attend(jax.vmap(self.attend_in)(normalize(tokens) * (1 + scale_a) + shift_a), self.num_heads)
        tokens = tokens + gate_a * jax.vmap(self.attend_out)(attended)
        widened = jax.nn.gelu(jax.vmap(self.widen)(normalize(tokens) * (1 + scale_b) + shift_b))
        return tokens + gate_b * jax.vmap(self.narrow)(widened)


def _to_patches(x: Float[Array, " c h w"], patch: int) -> Float[Array, " tokens size"]:
    """Cut an image into flattened square patches."""
    channels, height, width = x.shape
    blocks = x.reshape(channels, height // patch, patch, width // patch, patch)
    # Patches first, row by row; within a patch channel, row, column.
    return blocks.transpose(1, 3, 0, 2, 4).reshape(-1, channels * patch**2)


def _from_patches(tokens: Float[Array, " tokens size"], shape: tuple[int, ...], patch: int) -> Float[Array, " c h w"]:
    """Put patches back together."""
    channels, height, width = shape
    blocks = tokens.reshape(height // patch, width // patch, channels, patch, patch)
    return blocks.transpose(2, 0, 3, 1, 4).reshape(shape)
