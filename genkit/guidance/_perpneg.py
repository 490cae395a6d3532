"""Guidance away from what a negative condition adds beside the positive one."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from genkit._core._fields import as_number
from genkit.guidance._linear import as_condition
from genkit.guidance._vectors import inner
from genkit.guidance._weights import AbstractWeight, Scale, as_weight
from genkit.sampling import Context, Guidance, Prediction, Slot


class PerpNeg(Guidance):
    """Three predictions: with the condition, without, and with the one to avoid."""

    scale: AbstractWeight
    cond: Any
    strength: Float[Array, ""] = eqx.field(converter=as_number)

    def slots(self) -> tuple[Slot, ...]:
        """The three predictions."""
        return Slot("cond"), Slot("uncond", cond="null"), Slot("negative", cond=self.cond)

    def init(self, x: Float[Array, " *shape"]) -> None:
        """No carry."""
        return

    def needs(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """Without a scale only the prediction without a condition counts."""
        on = self.scale(ctx) != 0
        return {"cond": on, "uncond": True, "negative": on & (self.strength != 0)}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """Towards the condition, away from the part of the negative that is perpendicular to it."""
        base = preds["uncond"].x0
        towards = jnp.where(preds["cond"].present, preds["cond"].x0 - base, 0)
        away = jnp.where(preds["negative"].present, preds["negative"].x0 - base, 0)
        square = inner(towards, towards)
        along = jnp.where(square > 0, inner(away, towards) / jnp.where(square > 0, square, 1), 0)
        across = away - along.astype(base.dtype) * towards
        scale, strength = self.scale(ctx).astype(base.dtype), self.strength.astype(base.dtype)
        return base + scale * (towards - strength * across), carry, {}


def perpneg(scale: Scale, cond: Any, *, strength: Float[ArrayLike, ""] | float = 1.0) -> PerpNeg:
    r"""Perp-Neg: avoid a condition without losing what it shares with the wanted one.

    With $p = D_{cond} - D_{uncond}$, $q = D_{neg} - D_{uncond}$ and $q_\perp$ the part of $q$ perpendicular to $p$,
    $D = D_{uncond} + w\, (p - \kappa\, q_\perp)$.

    Args:
        scale: guidance scale $w$: 0 ignores all conditions.
        cond: what to avoid: a label or an array, the same for all draws.
        strength: $\kappa$; 0 is `cfg`.

    Returns:
        A guidance with three evaluations per prediction.

    Raises:
        TypeError: if the condition is none.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.perpneg(4.0, 7)

    Source: Armandpour et al., "Re-imagine the Negative Prompt Algorithm", 2023, equation 7, with one negative.
    """
    return PerpNeg(as_weight(scale), as_condition(cond), strength)
