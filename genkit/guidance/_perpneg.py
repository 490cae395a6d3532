"""Perp-Neg: guidance away from the part of a negative condition that is perpendicular to the positive one."""

from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from genkit._core._fields import as_number
from genkit.guidance._linear import as_condition
from genkit.guidance._types import Combined, Needs
from genkit.guidance._vectors import inner, ratio
from genkit.guidance._weights import AbstractWeight, Scale, as_weight
from genkit.sampling import Context, Guidance, Prediction, Slot


class PerpNeg(Guidance):
    """Guidance by three predictions: with the condition, without, and with the one to avoid."""

    scale: AbstractWeight
    cond: ArrayLike
    strength: Float[Array, ""] = eqx.field(converter=as_number)

    def slots(self) -> tuple[Slot, ...]:
        return Slot("cond"), Slot("uncond", cond="null"), Slot("negative", cond=self.cond)

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        on = self.scale(ctx) != 0
        return {"cond": on, "uncond": True, "negative": on & (self.strength != 0)}

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        base = preds["uncond"].x0
        # At scale 0 neither condition is evaluated: both directions are zero, and so are their gradients.
        towards = jnp.where(preds["cond"].present, preds["cond"].x0 - base, 0)
        away = jnp.where(preds["negative"].present, preds["negative"].x0 - base, 0)
        along = ratio(inner(away, towards), inner(towards, towards), 0)
        across = away - along.astype(base.dtype) * towards
        scale = self.scale(ctx).astype(base.dtype)
        strength = self.strength.astype(base.dtype)
        return base + scale * (towards - strength * across), carry, {}


def perpneg(scale: Scale, cond: ArrayLike, *, strength: Float[ArrayLike, ""] | float = 1.0) -> PerpNeg:
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
        TypeError: if `cond` is no label or array.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.perpneg(4.0, 7)

    Source: Armandpour et al., "Re-imagine the Negative Prompt Algorithm", 2023, equation 7, with one negative.
    """
    return PerpNeg(as_weight(scale), as_condition(cond), strength)
