"""Scales that change from step to step: functions of where a draw stands."""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Shaped

from genkit._core._checks import check, check_finite, describe, fail
from genkit._core._fields import as_number
from genkit._core._known import is_known
from genkit.sampling import AbstractPart, Context, Table


class AbstractWeight(AbstractPart):
    """A scale as a function of noise level and step; it may know the next noise level.

    Args:
        needs_grid: whether it uses step numbers or the next noise level, which adaptive solvers do not have.
    """

    @abc.abstractmethod
    def __call__(self, ctx: Context) -> Float[Array, ""]:
        """The scale now.

        Args:
            ctx: where the draw stands. Use `sigma_start`, `sigma_next`, `step` and `num_steps`, so that all evaluations
                of a step agree.

        Returns:
            A scalar.
        """


class Constant(AbstractWeight):
    """The same scale at every step.

    Args:
        value: the scale.

    Raises:
        ValueError: if the scale is no scalar.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import genkit as gk
        >>> float(gk.guidance.Constant(2.0).value)
        2.0
    """

    value: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self) -> None:
        """Refuse scales that are not one finite number."""
        check(self.value.ndim == 0, "scale", "a scalar", self.value)
        check_finite("scale", self.value)

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        return self.value


class PerStep(AbstractWeight):
    """A table of scales, one per step: a policy. At scale 1 or 0 a step takes one evaluation.

    Args:
        values: scales `(num_steps,)`.

    Raises:
        ValueError: if they are not one-dimensional; when drawing, if there is not one per step.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import genkit as gk
        >>> table = gk.diffusion.ddim(gk.diffusion.karras(4, 0.1, 10.0))
        >>> gk.guidance.PerStep([4.0, 4.0, 1.0, 1.0]).values.shape == (table.num_steps,)
        True
    """

    values: Float[Array, " num_steps"] = eqx.field(converter=as_number)
    needs_grid: ClassVar[bool] = True

    def __check_init__(self) -> None:
        """Refuse anything but a finite column."""
        check(self.values.ndim == 1 and self.values.size > 0, "scale", "a scalar or one per step", self.values)
        check_finite("scale", self.values)

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        # Past the end JAX would repeat the last entry: `check_draw` has compared the lengths.
        return self.values[ctx.step]

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        check_steps("scale", self.values, table)


class Ramp(AbstractWeight):
    r"""From one scale to another over the steps: $w = a + (b - a) u^p$, $u$ from 0 in the first step to 1 in the last.

    Args:
        first: scale $a$ of the first step.
        last: scale $b$ of the last step.
        power: exponent $p$, positive: 1 is linear.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.cfg(gk.guidance.Ramp(1.0, 5.0))
    """

    first: Float[Array, ""] = eqx.field(converter=as_number)
    last: Float[Array, ""] = eqx.field(converter=as_number)
    power: Float[Array, ""] = eqx.field(converter=as_number, default=1.0)
    needs_grid: ClassVar[bool] = True

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        return self.first + (self.last - self.first) * _progress(ctx, self.power)


class PowerCosine(AbstractWeight):
    r"""Rising from 1 to `scale` along a cosine: $w = 1 + (s - 1) (1 - \cos \pi u^p) / 2$, $u$ as in `Ramp`.

    Args:
        scale: scale $s$ of the last step.
        power: exponent $p$, positive: larger ones start later.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.cfg(gk.guidance.PowerCosine(4.0, power=2.0))

    Source: Gao et al., "Masked Diffusion Transformer", ICCV 2023, section 3.3.
    """

    scale: Float[Array, ""] = eqx.field(converter=as_number)
    power: Float[Array, ""] = eqx.field(converter=as_number, default=1.0)
    needs_grid: ClassVar[bool] = True

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        return 1 + (self.scale - 1) * (1 - jnp.cos(jnp.pi * _progress(ctx, self.power))) / 2


class FunctionOfSigma(AbstractWeight):
    """Any function of the noise level at the start of the step.

    Args:
        fn: `sigma -> scale`, traceable; arrays it should learn or sweep belong to it as leaves of a module.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> guidance = gk.guidance.cfg(gk.guidance.FunctionOfSigma(lambda sigma: 1 + 3 * jnp.exp(-sigma)))
    """

    fn: Callable

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        return jnp.asarray(self.fn(ctx.sigma_start))


class CFGPlusPlus(AbstractWeight):
    r"""The scale that makes classifier-free guidance CFG++: $w = \lambda / (1 - \sigma' / \sigma)$, next level $\sigma'$.

    Args:
        strength: $\lambda$, from 0 to 1.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.negative(gk.guidance.CFGPlusPlus(0.6), 3)

    Source: Chung et al., "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models", ICLR 2025; as a
    scale it is derived here from their algorithm 2.
    """  # noqa: E501

    strength: Float[Array, ""] = eqx.field(converter=as_number)
    needs_grid: ClassVar[bool] = True

    def __check_init__(self) -> None:
        """Refuse what is not one finite number."""
        check(self.strength.ndim == 0, "strength", "a scalar", self.strength)
        check_finite("strength", self.strength)

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        # With r = sigma' / sigma a step of DDIM is x' = (1 - r) D + r x, and one of CFG++
        # x' = (1 - r) D_uncond + r x + lambda (D_cond - D_uncond): the same where (1 - r) w = lambda.
        return self.strength / (1 - ctx.sigma_next / ctx.sigma_start)


class Complement(AbstractWeight):
    """One minus another weight."""

    weight: AbstractWeight

    @property
    def needs_grid(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if the other weight needs it."""
        return self.weight.needs_grid

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        return 1 - self.weight(ctx)


class Negated(AbstractWeight):
    """Minus another weight."""

    weight: AbstractWeight

    @property
    def needs_grid(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if the other weight needs it."""
        return self.weight.needs_grid

    def __call__(self, ctx: Context) -> Float[Array, ""]:
        return -self.weight(ctx)


Scale = AbstractWeight | ArrayLike | float | list


def as_weight(scale: Scale | Callable) -> AbstractWeight:
    """A number, an array with one entry per step, or a weight, as a weight."""
    if isinstance(scale, AbstractWeight):
        return scale
    if callable(scale):
        raise TypeError(
            f"`scale` must be a number, an array or a weight; got {describe(scale)}. Wrap a function of the noise "
            "level: `gk.guidance.FunctionOfSigma(fn)`."
        )
    try:
        value = as_number(scale)
    except TypeError:
        raise TypeError(f"`scale` must be a number, one number per step, or a weight; got {describe(scale)}.") from None
    if value.ndim == 0:
        return Constant(value)
    return PerStep(value)


def check_steps(name: str, values: Shaped[Array, " num_steps"], table: Table) -> None:
    """Refuse a column that has not one entry per step of the table."""
    if not is_known(table.step):
        return
    steps = table.num_steps
    if values.shape != (steps,):
        fail(name, f"one number per step ({steps})", f"{values.shape[0]} numbers")


def _progress(ctx: Context, power: Float[Array, ""]) -> Float[Array, ""]:
    """From 0 in the first step to 1 in the last, to a power."""
    # A single step counts as the last one.
    last = jnp.maximum(ctx.num_steps - 1, 1)
    u = jnp.where(ctx.num_steps > 1, ctx.step / last, 1.0).astype(power.dtype)
    # 0 ** p has a gradient of NaN in p: keep it away from there.
    return jnp.where(u > 0, jnp.where(u > 0, u, 1) ** power, 0)
