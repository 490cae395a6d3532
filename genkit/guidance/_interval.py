"""Guidance within an interval of noise levels."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from genkit._core import Context, Guidance, Prediction, Slot
from genkit._core._checks import check, describe, is_concrete
from genkit._core._fields import as_number


class Interval(Guidance):
    """Another guidance, applied within an interval of noise levels; made by `interval`.

    Args:
        guidance: what is applied inside.
        sigma_lo: lower end, excluded.
        sigma_hi: upper end, included.

    Example:
        >>> import genkit as gk
        >>> float(gk.guidance.Interval(gk.guidance.cfg(2.0), 0.3, 5.0).sigma_hi)
        5.0
    """

    guidance: Guidance
    sigma_lo: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_hi: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self) -> None:
        """Refuse foreign guidance and empty intervals."""
        if not isinstance(self.guidance, Guidance):
            raise TypeError(f"`guidance` must be a genkit guidance; got {describe(self.guidance)}.")
        if is_concrete(self.sigma_lo) and is_concrete(self.sigma_hi):
            low, high = float(self.sigma_lo), float(self.sigma_hi)
            check(0 <= low < high, "sigma_lo", "non-negative and below `sigma_hi`", f"{low:g} and {high:g}")

    def slots(self) -> tuple[Slot, ...]:
        """Those of the guidance; second-stage ones are asked for inside only."""
        return tuple(
            dataclasses.replace(s, ask=_Gated(self, s.ask)) if s.ask is not None else s for s in self.guidance.slots()
        )

    def init(self, x: Float[Array, " *shape"]) -> Any:
        """The carry of the guidance."""
        return self.guidance.init(x)

    def inside(self, ctx: Context) -> Bool[Array, ""]:
        """Decided at the start of the step, so that all its evaluations agree."""
        return (self.sigma_lo < ctx.sigma_start) & (ctx.sigma_start <= self.sigma_hi)

    def plan(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """What the guidance needs inside; the plain prediction outside."""
        inside, plain = self.inside(ctx), self.guidance.slots()[0].name
        needs = {name: inside & need for name, need in self.guidance.plan(carry, ctx).items()}
        return needs | {plain: needs.get(plain, False) | ~inside}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """The guided prediction inside; the plain one outside, where the carry is held."""
        inside, plain = self.inside(ctx), preds[self.guidance.slots()[0].name]
        x0, new, aux = self.guidance.combine(self.harmless(preds, ctx), ctx, carry)
        held = jax.tree.map(lambda old, fresh: jnp.where(inside, fresh, old), carry, new)
        return jnp.where(inside, x0, plain.x0), held, aux

    def harmless(self, preds: Mapping[str, Prediction], ctx: Context) -> dict[str, Prediction]:
        """Outside, the plain prediction in every slot, so that nothing the guidance computes there is undefined."""
        inside, plain = self.inside(ctx), preds[self.guidance.slots()[0].name]

        def safe(pred: Prediction) -> Prediction:
            gradient = None if pred.gradient is None else jnp.where(inside, pred.gradient, 0)
            return Prediction(jnp.where(inside, pred.x0, plain.x0), pred.present | ~inside, gradient)

        return {name: safe(pred) for name, pred in preds.items()}


class _Gated(eqx.Module):
    """The question of a second-stage slot, answered with no outside the interval."""

    interval: Interval
    ask: Callable

    def __call__(self, preds: Mapping[str, Prediction], ctx: Context, carry: Any) -> tuple[Any, Any]:
        """Ask inside."""
        need, cond = self.ask(self.interval.harmless(preds, ctx), ctx, carry)
        return self.interval.inside(ctx) & need, cond


def interval(
    guidance: Guidance,
    sigma_lo: Float[ArrayLike, ""] | float,
    sigma_hi: Float[ArrayLike, ""] | float,
) -> Interval:
    """Guide only in steps that start at `sigma_lo < sigma <= sigma_hi`; elsewhere one plain evaluation.

    Guidance at high noise costs diversity and at low noise changes nothing, so that both are better skipped.

    Args:
        guidance: any guidance.
        sigma_lo: lower end, excluded, non-negative.
        sigma_hi: upper end, included, above `sigma_lo`; `inf` for none.

    Returns:
        A guidance; both ends are array leaves, and steps outside truly skip the evaluations.

    Raises:
        ValueError: if the interval is empty.
        TypeError: if `guidance` is none.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.interval(gk.guidance.cfg(3.0), 0.3, 5.0)
        >>> [slot.name for slot in guidance.slots()]
        ['cond', 'uncond']

    Source: Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models", NeurIPS 2024.
    """
    return Interval(guidance, sigma_lo, sigma_hi)
