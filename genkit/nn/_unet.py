"""A small U-Net for images, conditioned through its normalizations."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core._checks import check, check_count
from genkit.nn._embeddings import ConditionEmbedding
from genkit.nn._layers import attend, check_state, zeroed


class UNet(eqx.Module):
    """A U-Net `(x, t, cond) -> array` for images `(channels, height, width)`.

    Residual blocks of two 3 by 3 convolutions with group normalization, whose second one is scaled and shifted by the
    embedding of the time and the condition; the resolution is halved between the levels on the way down and doubled on
    the way up, where the states of the way down come in beside. Optional self-attention at the lowest resolution. The
    output begins at zero. Convolutions are matrix products over nine shifted copies of the state.

    Args:
        shape: `(channels, height, width)` of one image; height and width divisible by `2 ** (len(widths) - 1)`.
        widths: number of channels at each level, from the full resolution down; even.
        depth: residual blocks per level, on the way down and up each.
        attention: whether the lowest resolution has self-attention.
        num_heads: number of attention heads, a divisor of the last width.
        num_labels: number of classes, for a network conditioned on labels; label -1 or `None` is "no condition".
        cond_size: length of the condition, for a network conditioned on vectors; NaN or `None` is "no condition".
        key: typed PRNG key.

    Raises:
        ValueError: for sizes that do not fit each other, or both kinds of condition.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> net = gk.nn.UNet((1, 8, 8), widths=(8, 16), num_labels=10, key=jax.random.key(0))
        >>> net(jnp.ones((1, 8, 8)), jnp.array(0.5), jnp.array(3)).shape
        (1, 8, 8)

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, appendix B; Dhariwal and Nichol,
    "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, section 3 (adaptive group normalization).
    """

    embed: ConditionEmbedding
    first: "_Conv"
    down: tuple[tuple["_Block", ...], ...]
    shrink: tuple["_Conv", ...]
    middle: "_Attention | None"
    grow: tuple["_Conv", ...]
    up: tuple[tuple["_Block", ...], ...]
    last: "_Conv"
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        widths: Sequence[int] = (32, 64),
        depth: int = 1,
        attention: bool = True,
        num_heads: int = 4,
        num_labels: int | None = None,
        cond_size: int | None = None,
        key: Key[Array, ""],
    ):
        check(len(shape) == 3, "shape", "(channels, height, width)", str(tuple(shape)))
        check(len(widths) >= 1, "widths", "at least one level", str(tuple(widths)))
        for name, count in (("depth", depth), ("num_heads", num_heads), *(("widths", width) for width in widths)):
            check_count(name, count)
        check(all(width % 2 == 0 for width in widths), "widths", "even", str(tuple(widths)))
        check(not attention or widths[-1] % num_heads == 0, "num_heads", f"a divisor of {widths[-1]}", num_heads)
        factor = 2 ** (len(widths) - 1)
        fits = shape[1] % factor == 0 and shape[2] % factor == 0
        check(fits, "shape", f"of height and width divisible by {factor}", str(tuple(shape)), "Use fewer `widths`.")
        levels = range(len(widths))
        # Width of the embedding, as in the paper.
        size = 4 * widths[0]
        key_embed, key_first, key_down, key_shrink, key_middle, key_grow, key_up, key_last = jr.split(key, 8)
        self.shape = tuple(shape)
        self.embed = ConditionEmbedding(size, num_labels=num_labels, cond_size=cond_size, key=key_embed)
        self.first = _Conv(shape[0], widths[0], key=key_first)
        self.down = tuple(
            tuple(_Block(widths[i], widths[i], size, key=jr.fold_in(key_down, i * depth + j)) for j in range(depth))
            for i in levels
        )
        self.shrink = tuple(
            _Conv(4 * widths[i], widths[i + 1], side=1, key=jr.fold_in(key_shrink, i)) for i in levels[:-1]
        )
        self.middle = None
        if attention:
            # Only at the lowest resolution: the cost grows with the fourth power of the side.
            self.middle = _Attention(widths[-1], num_heads, key=key_middle)
        self.grow = tuple(_Conv(widths[i + 1], 4 * widths[i], side=1, key=jr.fold_in(key_grow, i)) for i in levels[:-1])
        self.up = tuple(
            tuple(_Block(2 * widths[i], widths[i], size, key=jr.fold_in(key_up, i * depth + j)) for j in range(depth))
            for i in levels
        )
        self.last = zeroed(_Conv(widths[0], shape[0], key=key_last))

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
        hidden = self.first(jnp.moveaxis(x, 0, -1))
        kept = []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                hidden = block(hidden, embedding)
                # One state per block: the way up takes them back in reverse.
                kept.append(hidden)
            if level < len(self.shrink):
                hidden = self.shrink[level](_space_to_depth(hidden))
        if self.middle is not None:
            hidden = self.middle(hidden)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                hidden = block(jnp.concatenate([hidden, kept.pop()], axis=-1), embedding)
            if level > 0:
                hidden = _depth_to_space(self.grow[level - 1](hidden))
        return jnp.moveaxis(self.last(jax.nn.silu(_group_normalize(hidden))), -1, 0)


class _Conv(eqx.Module):
    """A convolution that keeps the resolution, channels last; a side of one is a matrix product."""

    weight: Float[Array, " side side n_in n_out"]
    bias: Float[Array, " n_out"]

    def __init__(self, n_in: int, n_out: int, *, side: int = 3, key: Key[Array, ""]):
        limit = 1 / math.sqrt(n_in * side**2)
        # Drawn as a matrix, because drawing four axes at once takes XLA several times as long to compile.
        flat = jr.uniform(key, (side**2 * n_in, n_out), minval=-limit, maxval=limit)
        self.weight = flat.reshape(side, side, n_in, n_out)
        self.bias = jnp.zeros(n_out)

    def __call__(self, x: Float[Array, " h w n_in"]) -> Float[Array, " h w n_out"]:
        side = self.weight.shape[0]
        if side > 1:
            # Shifted copies beside each other and one matrix product: inside a compiled loop, where training and
            # sampling happen, XLA runs this about five times faster on a CPU than its own convolution.
            margin = side // 2
            height, width, _ = x.shape
            padded = jnp.pad(x, ((margin, margin), (margin, margin), (0, 0)))
            shifts = [padded[i : i + height, j : j + width] for i in range(side) for j in range(side)]
            x = jnp.concatenate(shifts, axis=-1)
        return x @ self.weight.reshape(-1, self.weight.shape[-1]) + self.bias


class _Block(eqx.Module):
    """Two convolutions beside a shortcut; the embedding scales and shifts between them."""

    modulate: eqx.nn.Linear
    conv_in: _Conv
    conv_out: _Conv
    shortcut: _Conv | None

    def __init__(self, n_in: int, n_out: int, size: int, *, key: Key[Array, ""]):
        key_modulate, key_in, key_out, key_shortcut = jr.split(key, 4)
        self.modulate = eqx.nn.Linear(size, 2 * n_out, key=key_modulate)
        self.conv_in = _Conv(n_in, n_out, key=key_in)
        self.conv_out = zeroed(_Conv(n_out, n_out, key=key_out))
        self.shortcut = None
        if n_in != n_out:
            self.shortcut = _Conv(n_in, n_out, side=1, key=key_shortcut)

    def __call__(self, x: Float[Array, " h w n_in"], embedding: Float[Array, " size"]) -> Float[Array, " h w n_out"]:
        hidden = self.conv_in(jax.nn.silu(_group_normalize(x)))
        scale, shift = jnp.split(self.modulate(embedding), 2)
        hidden = self.conv_out(jax.nn.silu(_group_normalize(hidden) * (1 + scale) + shift))
        if self.shortcut is None:
            return hidden + x
        return hidden + self.shortcut(x)


class _Attention(eqx.Module):
    """Self-attention of all places, beside a shortcut; begins as if it were not there."""

    attend_in: eqx.nn.Linear
    attend_out: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, width: int, num_heads: int, *, key: Key[Array, ""]):
        key_in, key_out = jr.split(key)
        self.attend_in = eqx.nn.Linear(width, 3 * width, key=key_in)
        self.attend_out = zeroed(eqx.nn.Linear(width, width, key=key_out))
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, " h w c"]) -> Float[Array, " h w c"]:
        tokens = _group_normalize(x).reshape(-1, x.shape[-1])
        attended = attend(jax.vmap(self.attend_in)(tokens), self.num_heads)
        return x + jax.vmap(self.attend_out)(attended).reshape(x.shape)


def _group_normalize(x: Float[Array, " h w c"]) -> Float[Array, " h w c"]:
    """Center and scale groups of up to 16 neighboring channels; the small number only guards a constant image."""
    channels = x.shape[-1]
    groups = max(1, channels // 16)
    # Channels that do not divide evenly make one group rather than groups of different sizes.
    if channels % groups:
        groups = 1
    grouped = x.reshape(*x.shape[:-1], groups, channels // groups)
    centered = grouped - jnp.mean(grouped, axis=(0, 1, 3), keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centered**2, axis=(0, 1, 3), keepdims=True) + 1e-5)
    return (centered * scale).reshape(x.shape)


def _space_to_depth(x: Float[Array, " h w c"]) -> Float[Array, " h2 w2 c4"]:
    """Halve the resolution; each two by two places become one with four times the channels."""
    height, width, channels = x.shape
    blocks = x.reshape(height // 2, 2, width // 2, 2, channels)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(height // 2, width // 2, 4 * channels)


def _depth_to_space(x: Float[Array, " h w c4"]) -> Float[Array, " h2 w2 c"]:
    """Double the resolution: the inverse of `_space_to_depth`."""
    height, width, channels = x.shape
    blocks = x.reshape(height, width, 2, 2, channels // 4)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(2 * height, 2 * width, channels // 4)
