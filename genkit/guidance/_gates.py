"""Gates: another guidance, applied within an interval of noise levels or in some of the steps."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from genkit._core._checks import check, check_choice, check_interval
from genkit._core._fields import as_number
from genkit.guidance._switch import check_guidance, combine_where_on, needs_where_on, plain_where_off
from genkit.guidance._types import Combined, Needs
from genkit.guidance._weights import check_steps
from genkit.guidance._window import check_window, in_window
from genkit.sampling import AbstractPart, Context, Guidance, Prediction, Slot, Table


class AbstractCondition(AbstractPart):
    """A condition on noise level and step under which a guidance is applied."""

    @abc.abstractmethod
    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        """True where the guidance is applied."""


class Between(AbstractCondition):
    """Steps that start within an interval of noise levels, or evaluations within it."""

    sigma_lo: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_hi: Float[Array, ""] = eqx.field(converter=as_number)
    per: str = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Refuse empty intervals and unknown units."""
        check_choice("per", self.per, ("step", "evaluation"))
        check_window(self.sigma_lo, self.sigma_hi)

    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        if self.per == "evaluation":
            return in_window(self.sigma_lo, self.sigma_hi, ctx.sigma)
        # By the start of the step, so that a corrector is guided where its predictor was.
        return in_window(self.sigma_lo, self.sigma_hi, ctx.sigma_start)


class AtSteps(AbstractCondition):
    """Steps marked in a table."""

    active: Bool[Array, " num_steps"] = eqx.field(converter=jnp.asarray)
    needs_grid: ClassVar[bool] = True

    def __check_init__(self) -> None:
        """Refuse anything but a column of booleans."""
        check(self.active.ndim == 1 and self.active.dtype == bool, "active", "booleans, one per step", self.active)

    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        return self.active[ctx.step]

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        check_steps("active", self.active, table)


class FirstSteps(AbstractCondition):
    """The first few steps."""

    count: Int[Array, ""] = eqx.field(converter=jnp.asarray)
    needs_grid: ClassVar[bool] = True

    def __check_init__(self) -> None:
        """Refuse negative counts."""
        check_interval("num_steps", self.count, 0)

    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        return ctx.step < self.count


class Gate(Guidance):
    """Another guidance, applied where a condition holds; elsewhere one plain evaluation."""

    guidance: Guidance
    when: AbstractCondition

    def __check_init__(self) -> None:
        """Refuse anything but a guidance."""
        check_guidance(self.guidance)

    def slots(self) -> tuple[Slot, ...]:
        slots = []
        for slot in self.guidance.slots():
            ask = slot.ask
            # Second-stage slots are no part of `needs`: their question has to be gated by itself.
            if ask is not None:
                ask = _GatedQuestion(self, ask)
            slots.append(dataclasses.replace(slot, ask=ask))
        return tuple(slots)

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        return self.guidance.init(x)

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        return needs_where_on(self.when(ctx), self.guidance, carry, ctx)

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        return combine_where_on(self.when(ctx), self.guidance, preds, ctx, carry)


class _GatedQuestion(eqx.Module):
    """The question of a second-stage slot, answered with no where the gate is closed."""

    gate: Gate
    ask: Callable

    def __call__(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> tuple[Bool[Array, ""], PyTree]:
        is_open = self.gate.when(ctx)
        plain = preds[self.gate.guidance.slots()[0].name]
        need, cond = self.ask(plain_where_off(is_open, preds, plain), ctx, carry)
        return is_open & need, cond


def interval(
    guidance: Guidance,
    sigma_lo: Float[ArrayLike, ""] | float,
    sigma_hi: Float[ArrayLike, ""] | float,
    *,
    per: str = "step",
) -> Gate:
    """Guide only in steps that start at `sigma_lo < sigma <= sigma_hi`; elsewhere one plain evaluation.

    Guidance at high noise costs diversity and at low noise changes nothing, so that both are better skipped.

    Args:
        guidance: any guidance.
        sigma_lo: lower end, excluded, non-negative.
        sigma_hi: upper end, included, above `sigma_lo`; `inf` for none.
        per: `"step"` decides for all evaluations of a step by its start, as in the code of the authors; `"evaluation"`
            for each by its own noise level. They differ for samplers with correctors, such as `heun`, alone.

    Returns:
        A guidance; both ends are array leaves, and steps outside truly skip the evaluations.

    Raises:
        ValueError: if the interval is empty or `per` is unknown.
        TypeError: if `guidance` is no guidance.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.interval(gk.guidance.cfg(3.0), 0.3, 5.0)
        >>> [slot.name for slot in guidance.slots()]
        ['cond', 'uncond']

    Source: Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models", NeurIPS 2024.
    """
    return Gate(guidance, Between(sigma_lo, sigma_hi, per))


def policy(guidance: Guidance, active: Bool[ArrayLike, " num_steps"] | list) -> Gate:
    """Guide only in the steps that a table marks; elsewhere one plain evaluation.

    A table of scales instead of marks is `cfg(scales)`.

    Args:
        guidance: any guidance.
        active: booleans `(num_steps,)`.

    Returns:
        A guidance; the table is an array leaf.

    Raises:
        ValueError: if the table is no column of booleans; when drawing, if it has not one entry per step.
        TypeError: if `guidance` is no guidance.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.policy(gk.guidance.cfg(3.0), [True] * 4 + [False] * 4)
    """
    return Gate(guidance, AtSteps(active))


def step_adaptive(guidance: Guidance, num_steps: int | Int[ArrayLike, ""]) -> Gate:
    """Guide in the first steps only, as "Step AG" does; then one plain evaluation per prediction.

    Args:
        guidance: any guidance.
        num_steps: number of guided steps; an array leaf.

    Returns:
        A guidance.

    Raises:
        ValueError: if the number is negative.
        TypeError: if `guidance` is no guidance.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.step_adaptive(gk.guidance.cfg(3.0), 10)

    Source: "Step AG", arXiv 2506.08351, 2025.
    """
    return Gate(guidance, FirstSteps(num_steps))
