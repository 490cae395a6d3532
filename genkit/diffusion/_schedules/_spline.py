"""Monotone rational splines: smooth, increasing, with an inverse in closed form."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from genkit._core._fields import as_number


class Spline(eqx.Module):
    r"""An increasing function through given points with given slopes, rational quadratic between them.

    With $\xi$ the place within a cell, $s$ its mean slope and $d_0, d_1$ the slopes at its ends,

    $$y = y_0 + \Delta y\, \frac{s\,\xi^2 + d_0\,\xi(1 - \xi)}{s + (d_0 + d_1 - 2s)\,\xi(1 - \xi)} .$$

    It increases where the slopes are positive, has a continuous derivative, and solving for $\xi$ takes a square root.

    Args:
        x: places of the points, increasing.
        y: values, increasing.
        slopes: derivatives at the points, positive.
    """

    x: Float[Array, " k"]
    y: Float[Array, " k"]
    slopes: Float[Array, " k"]

    def __call__(self, at: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The value; beyond the ends the spline goes on as a straight line."""
        x, y, slopes, at = self._cast(at)
        cell = self._cell(x, at)
        width = x[cell + 1] - x[cell]
        rise = y[cell + 1] - y[cell]
        place = (jnp.clip(at, x[0], x[-1]) - x[cell]) / width
        inside = y[cell] + rise * _fraction(place, rise / width, slopes[cell], slopes[cell + 1])
        # Each clamped to its side, so that the gradient inside does not see them.
        beyond = slopes[0] * jnp.minimum(at - x[0], 0) + slopes[-1] * jnp.maximum(at - x[-1], 0)
        return inside + beyond

    def inverse(self, value: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The place at which the spline has the given value."""
        x, y, slopes, value = self._cast(value)
        cell = self._cell(y, value)
        width = x[cell + 1] - x[cell]
        rise = y[cell + 1] - y[cell]
        slope = rise / width
        first = slopes[cell]
        last = slopes[cell + 1]
        share = (jnp.clip(value, y[0], y[-1]) - y[cell]) / rise
        bend = share * (first + last - 2 * slope)
        a, b, c = slope - first + bend, first - bend, -slope * share
        # The root formula that does not cancel: b is positive where the slopes are.
        # Rounding may take its argument below zero.
        root = jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0))
        place = -2 * c / (b + root)
        beyond = jnp.minimum(value - y[0], 0) / slopes[0] + jnp.maximum(value - y[-1], 0) / slopes[-1]
        return x[cell] + width * place + beyond

    def _cast(self, at: Float[ArrayLike, " *s"]) -> tuple[Array, ...]:
        """The points and slopes in the precision of the argument, and the argument itself."""
        at = as_number(at)
        return *(jnp.asarray(leaf, at.dtype) for leaf in (self.x, self.y, self.slopes)), at

    def _cell(self, nodes: Array, at: Array) -> Array:
        """Index of the cell that holds each argument; the end cells take what lies beyond."""
        return jnp.clip(jnp.searchsorted(nodes, at, side="right") - 1, 0, len(nodes) - 2)


def monotone_slopes(x: Float[np.ndarray, " k"], y: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Slopes from the points alone: weighted harmonic means of the neighboring chords, one-sided at the ends."""
    widths = np.diff(x)
    chords = np.diff(y) / widths
    if len(chords) == 1:
        return np.repeat(chords, 2)
    before = 2 * widths[1:] + widths[:-1]
    after = widths[1:] + 2 * widths[:-1]
    inner = (before + after) / (before / chords[:-1] + after / chords[1:])
    first = chords[0] ** 2 / inner[0]
    last = chords[-1] ** 2 / inner[-1]
    return np.concatenate([[first], inner, [last]])


def _fraction(place: Array, slope: Array, first: Array, last: Array) -> Array:
    """The share of a cell's rise made at `place` in [0, 1]."""
    both = place * (1 - place)
    return (slope * place**2 + first * both) / (slope + (first + last - 2 * slope) * both)
