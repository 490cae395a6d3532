"""Gates: another guidance, applied within an interval of noise levels or in some of the steps."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from genkit._core._checks import check, check_choice, check_interval, describe, is_concrete
from genkit._core._fields import as_number
from genkit.guidance._weights import check_steps
from genkit.sampling import AbstractPart, Context, Guidance, Prediction, Slot


class AbstractWhen(AbstractPart):
    """A question that noise level and step answer."""

    @abc.abstractmethod
    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        """Whether the gate is open."""


class Between(AbstractWhen):
    """Steps that start within an interval of noise levels, or evaluations within it."""

    sigma_lo: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_hi: Float[Array, ""] = eqx.field(converter=as_number)
    per: str = eqx.field(static=True)
    needs_grid: bool = eqx.field(default=False, init=False, static=True)

    def __check_init__(self) -> None:
        """Refuse empty intervals and unknown units."""
        check_choice("per", self.per, ("step", "evaluation"))
        if is_concrete(self.sigma_lo) and is_concrete(self.sigma_hi):
            low, high = float(self.sigma_lo), float(self.sigma_hi)
            check(0 <= low < high, "sigma_lo", "non-negative and below `sigma_hi`", f"{low:g} and {high:g}")

    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        """By the start of the step, so that all its evaluations agree, or by each evaluation on its own."""
        level = ctx.sigma_start if self.per == "step" else ctx.sigma
        return (self.sigma_lo < level) & (level <= self.sigma_hi)


class AtSteps(AbstractWhen):
    """Steps marked in a table."""

    active: Bool[Array, " num_steps"] = eqx.field(converter=jnp.asarray)
    needs_grid: bool = eqx.field(default=True, init=False, static=True)

    def __check_init__(self) -> None:
        """Refuse anything but a column of booleans."""
        check(self.active.ndim == 1 and self.active.dtype == bool, "active", "booleans, one per step", self.active)

    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        """The mark of the step."""
        return self.active[ctx.step]

    def check_draw(self, table: Any, model: Any, cond: Any) -> None:
        """Refuse another number of steps."""
        check_steps("active", self.active, table)


class FirstSteps(AbstractWhen):
    """The first few steps."""

    count: Int[Array, ""] = eqx.field(converter=jnp.asarray)
    needs_grid: bool = eqx.field(default=True, init=False, static=True)

    def __check_init__(self) -> None:
        """Refuse negative counts."""
        check_interval("num_steps", self.count, 0)

    def __call__(self, ctx: Context) -> Bool[Array, ""]:
        """Before the count."""
        return ctx.step < self.count


class Gate(Guidance):
    """Another guidance, applied where `when` says so; elsewhere one plain evaluation."""

    guidance: Guidance
    when: AbstractWhen

    def __check_init__(self) -> None:
        """Refuse anything but a guidance."""
        if not isinstance(self.guidance, Guidance):
            raise TypeError(f"`guidance` must be a genkit guidance; got {describe(self.guidance)}.")

    def slots(self) -> tuple[Slot, ...]:
        """Those of the guidance; second-stage ones are asked for inside only."""
        return tuple(
            dataclasses.replace(s, ask=_Gated(self, s.ask)) if s.ask is not None else s for s in self.guidance.slots()
        )

    def init(self, x: Float[Array, " *shape"]) -> Any:
        """The carry of the guidance."""
        return self.guidance.init(x)

    def needs(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """What the guidance needs inside; the plain prediction outside."""
        inside, plain = self.when(ctx), self.guidance.slots()[0].name
        needs = {name: inside & need for name, need in self.guidance.needs(carry, ctx).items()}
        return needs | {plain: needs.get(plain, False) | ~inside}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """The guided prediction inside; the plain one outside, where the carry is held."""
        inside, plain = self.when(ctx), preds[self.guidance.slots()[0].name]
        x0, new, aux = self.guidance.combine(harmless(preds, plain, inside), ctx, carry)
        held = jax.tree.map(lambda old, fresh: jnp.where(inside, fresh, old), carry, new)
        return jnp.where(inside, x0, plain.x0), held, aux


def harmless(preds: Mapping[str, Prediction], plain: Prediction, inside: Bool[Array, ""]) -> dict[str, Prediction]:
    """Outside, the plain prediction in every slot, so that nothing a guidance computes there is undefined."""

    def safe(pred: Prediction) -> Prediction:
        gradient = None if pred.gradient is None else jnp.where(inside, pred.gradient, 0)
        return Prediction(jnp.where(inside, pred.x0, plain.x0), pred.present | ~inside, gradient)

    return {name: safe(pred) for name, pred in preds.items()}


class _Gated(eqx.Module):
    """The question of a second-stage slot, answered with no where the gate is closed."""

    gate: Gate
    ask: Callable

    def __call__(self, preds: Mapping[str, Prediction], ctx: Context, carry: Any) -> tuple[Any, Any]:
        """Ask inside."""
        inside, plain = self.gate.when(ctx), preds[self.gate.guidance.slots()[0].name]
        need, cond = self.ask(harmless(preds, plain, inside), ctx, carry)
        return inside & need, cond


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
        TypeError: if `guidance` is none.

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
        TypeError: if `guidance` is none.

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
        TypeError: if `guidance` is none.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.step_adaptive(gk.guidance.cfg(3.0), 10)

    Source: "Step AG", arXiv 2506.08351, 2025.
    """
    return Gate(guidance, FirstSteps(num_steps))
