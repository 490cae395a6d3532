"""Guidance within an interval of noise levels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from genkit._core import Context, Guidance, Prediction, Slot
from genkit._core._checks import check, describe, is_concrete
from genkit._core._fields import number_field
from genkit._core._guidance import same_evaluation


_PLAIN = Slot("interval: plain")


class Interval(Guidance):
    """Another guidance, applied within an interval of noise levels; made by `interval`.

    Args:
        guidance: what is applied inside.
        sigma_lo: lower end, excluded.
        sigma_hi: upper end, included.
    """

    guidance: Guidance
    sigma_lo: Float[Array, ""] = number_field()
    sigma_hi: Float[Array, ""] = number_field()

    def __check_init__(self) -> None:
        """Refuse foreign guidance and empty intervals."""
        if not isinstance(self.guidance, Guidance):
            raise TypeError(f"`guidance` must be a genkit guidance; got {describe(self.guidance)}.")
        if is_concrete(self.sigma_lo) and is_concrete(self.sigma_hi):
            low, high = float(self.sigma_lo), float(self.sigma_hi)
            check(0 <= low < high, "sigma_lo", "non-negative and below `sigma_hi`", f"{low:g} and {high:g}")

    @property
    def _base(self) -> str:
        """The slot that holds the plain prediction: one of the guidance's own where it has one."""
        return next((s.name for s in self.guidance.slots() if same_evaluation(s, _PLAIN)), _PLAIN.name)

    def slots(self) -> tuple[Slot, ...]:
        """Those of the guidance, and the plain prediction."""
        own = self.guidance.slots()
        return own if self._base != _PLAIN.name else (*own, _PLAIN)

    def init(self, x: Float[Array, " *shape"]) -> Any:
        """The carry of the guidance."""
        return self.guidance.init(x)

    def _inside(self, ctx: Context) -> Bool[Array, ""]:
        """Decided at the start of the step, so that all its evaluations agree."""
        return (self.sigma_lo < ctx.sigma_start) & (ctx.sigma_start <= self.sigma_hi)

    def plan(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """What the guidance needs inside; the plain prediction outside."""
        inside = self._inside(ctx)
        needs = {name: inside & need for name, need in self.guidance.plan(carry, ctx).items()}
        return needs | {self._base: needs.get(self._base, False) | ~inside}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """The guided prediction inside; the plain one outside, where the carry is held."""
        inside, plain = self._inside(ctx), preds[self._base]

        def harmless(pred: Prediction) -> Prediction:
            # Outside, the guidance sees the plain prediction in every slot, so that nothing it computes is undefined.
            gradient = None if pred.gradient is None else jnp.where(inside, pred.gradient, 0)
            return Prediction(jnp.where(inside, pred.x0, plain.x0), pred.present | ~inside, gradient)

        own = {slot.name: harmless(preds[slot.name]) for slot in self.guidance.slots()}
        x0, new, aux = self.guidance.combine(own, ctx, carry)
        held = jax.tree.map(lambda old, fresh: jnp.where(inside, fresh, old), carry, new)
        return jnp.where(inside, x0, plain.x0), held, aux


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
