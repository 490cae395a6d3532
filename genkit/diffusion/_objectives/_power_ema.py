"""Averages over the course of training whose width is chosen afterwards."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int, PyTree

from genkit._core._checks import check, check_count, check_interval
from genkit._core._fields import trainable


def ema_exponent(width: float) -> float:
    r"""The exponent $\gamma$ of the power-function average of a relative width.

    The average at step $t$ weighs step $\tau$ by $\tau^\gamma$; its width is the standard deviation of those weights
    over $t$: $w^2 = (\gamma + 1)(\gamma + 2)^{-2}(\gamma + 3)^{-1}$.

    Args:
        width: relative width, in (0, 0.28).

    Returns:
        The exponent.

    Raises:
        ValueError: for a width out of range.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, equation 126.
    """
    check_interval("width", width, 0, 0.28, open_lo=True)
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(roots.real.max())


class PowerEMA(eqx.Module):
    r"""Two running power-function averages of a model, from whose snapshots any other width follows afterwards.

    $m_t = \beta_t m_{t-1} + (1 - \beta_t) x_t$ with $\beta_t = (1 - 1/t)^{\gamma + 1}$, for the two exponents.

    Args:
        averages: the two averages of the trained leaves, in single precision or better.
        step: steps seen.
        widths: the two relative widths.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> ema = gk.diffusion.PowerEMA.start(jnp.zeros(2))
        >>> ema = ema.update(jnp.ones(2)).update(jnp.ones(2))
        >>> int(ema.step)
        2

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, section 3.1.
    """

    averages: tuple[PyTree, PyTree]
    step: Int[Array, ""]
    widths: tuple[float, float] = eqx.field(static=True)

    @classmethod
    def start(cls, model: PyTree, widths: tuple[float, float] = (0.05, 0.1)) -> "PowerEMA":
        """Averages of nothing yet.

        Args:
            model: the model, whose trained leaves are averaged.
            widths: the two relative widths, different.

        Returns:
            The state to `update` after each step.
        """
        check(len(set(widths)) == 2, "widths", "two different widths", widths)
        for width in widths:
            ema_exponent(width)
        # At least float32: the increments of a long average vanish in the digits of a half-precision one.
        held = jax.tree.map(_at_least_single, eqx.filter(model, trainable(model)))
        return cls((held, held), jnp.zeros((), jnp.int32), (float(widths[0]), float(widths[1])))

    def update(self, model: PyTree) -> "PowerEMA":
        """Take in the model after a step; traceable.

        Args:
            model: the model.

        Returns:
            The new state.
        """
        held = eqx.filter(model, trainable(model))
        step = self.step + 1

        def average(mean: PyTree, width: float) -> PyTree:
            # (1 - 1/t)^(gamma + 1), through expm1 because the rest is tiny late in training.
            first = step == 1
            log = jnp.log1p(-1 / jnp.where(first, 2, step).astype(float))
            rate = jnp.where(first, 1, -jnp.expm1((ema_exponent(width) + 1) * log))
            return jax.tree.map(lambda m, x: m + rate.astype(m.dtype) * (x.astype(m.dtype) - m), mean, held)

        first_mean, second_mean = self.averages
        first_width, second_width = self.widths
        averages = (average(first_mean, first_width), average(second_mean, second_width))
        return PowerEMA(averages, step, self.widths)


def posthoc_ema(snapshots: Sequence[PowerEMA], width: float, *, model: PyTree, step: int | None = None) -> PyTree:
    r"""The model averaged with any width, from snapshots of two averages taken along the training.

    The weights of the snapshots are the least-squares fit of their weights over time to the wanted one.

    Args:
        snapshots: states of `PowerEMA` at several steps, in any order.
        width: relative width of the average that is wanted.
        model: the model, into which the averaged leaves are put.
        step: the step of training at which the average is meant; default the last snapshot's.

    Returns:
        The model with averaged leaves.

    Raises:
        ValueError: without snapshots, or for a width or step out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> ema = gk.diffusion.PowerEMA.start(jnp.zeros(2))
        >>> snapshots = []
        >>> for i in range(8):
        ...     ema = ema.update(jnp.full(2, float(i)))
        ...     snapshots.append(ema)
        >>> gk.diffusion.posthoc_ema(snapshots, 0.07, model=jnp.zeros(2)).shape
        (2,)

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, algorithm 3.
    """
    check(len(snapshots) > 0, "snapshots", "at least one", "none")
    steps = np.array([int(s.step) for s in snapshots])
    check(bool((steps > 0).all()), "snapshots", "taken after a step", "one without any")
    end = int(steps.max()) if step is None else step
    check_count("step", end)
    exponents = np.array([[ema_exponent(w) for w in s.widths] for s in snapshots])
    coefficients = _fit(np.repeat(steps, 2), exponents.ravel(), end, ema_exponent(width))
    parts = [average for s in snapshots for average in s.averages]
    mixed = jax.tree.map(lambda *leaves: _combine(coefficients, leaves), *parts)
    held = eqx.filter(model, trainable(model))
    return eqx.combine(jax.tree.map(lambda mean, x: mean.astype(x.dtype), mixed, held), model)


def _at_least_single(leaf: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """A leaf in single precision or better."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _combine(coefficients: Float[np.ndarray, " k"], leaves: Sequence[Array]) -> Array:
    """The sum of leaves with coefficients, in double precision: large terms of both signs cancel."""
    total = sum(np.asarray(leaf, np.float64) * c for leaf, c in zip(leaves, coefficients, strict=True))
    return jnp.asarray(total, leaves[0].dtype)


def _fit(steps: np.ndarray, exponents: np.ndarray, step: int, exponent: float) -> Float[np.ndarray, " k"]:
    """Least-squares weights of power-function weights for another one."""
    inner = _inner(steps[:, None], exponents[:, None], steps[None], exponents[None])
    right = _inner(steps, exponents, np.asarray(step), np.asarray(exponent))
    # Neighboring snapshots are almost the same function of time: what rounding alone tells apart is cut off.
    return np.linalg.lstsq(inner, right, rcond=1e-13)[0]


def _inner(t: np.ndarray, gamma: np.ndarray, u: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Inner product of two weights over time, on [0, t] with exponent gamma and on [0, u] with exponent delta."""
    ratio = t / u
    # The integral runs over the shorter of both, whose exponent then belongs to the other.
    power = np.where(ratio < 1, delta, -gamma)
    return (gamma + 1) * (delta + 1) * ratio**power / ((gamma + delta + 1) * np.maximum(t, u))
