"""Classifier-free guidance."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from genkit._core import Context, Guidance, Prediction, Slot
from genkit._core._checks import check, check_finite
from genkit._core._fields import as_number


class CFG(Guidance):
    r"""Classifier-free guidance; made by `cfg`.

    Args:
        scale: guidance scale $w$, a scalar array.

    Example:
        >>> import genkit as gk
        >>> [slot.name for slot in gk.guidance.CFG(2.0).slots()]
        ['cond', 'uncond']
    """

    scale: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self) -> None:
        """Refuse scales that are not one finite number."""
        check(self.scale.ndim == 0, "scale", "a scalar", self.scale)
        check_finite("scale", self.scale)

    def slots(self) -> tuple[Slot, ...]:
        """The predictions with and without the condition."""
        return Slot("cond"), Slot("uncond", cond="null")

    def init(self, x: Float[Array, " *shape"]) -> None:
        """No carry."""
        return

    def plan(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """One evaluation is enough where the other has weight zero."""
        return {"cond": self.scale != 0, "uncond": self.scale != 1}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """Extrapolate from the unconditional prediction through the conditional one."""
        cond, uncond = preds["cond"], preds["uncond"]
        given = jnp.where(cond.present, cond.x0, uncond.x0)
        null = jnp.where(uncond.present, uncond.x0, cond.x0)
        scale = self.scale.astype(given.dtype)
        return given + (scale - 1) * (given - null), carry, {}


def cfg(scale: Float[ArrayLike, ""] | float) -> CFG:
    r"""Classifier-free guidance: exaggerate what the condition changes.

    $$D = D_{uncond} + w\, (D_{cond} - D_{uncond}).$$

    Args:
        scale: guidance scale $w$: 1 is off, 0 ignores the condition, both with one evaluation; above 1 exaggerates. An
            array leaf: sweeping it never recompiles.

    Returns:
        A guidance with two evaluations per prediction.

    Raises:
        NonFiniteError: if the scale is NaN or infinite.

    Example:
        >>> import genkit as gk
        >>> float(gk.guidance.cfg(4.0).scale)
        4.0

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6, whose scale is $w - 1$.
    """
    return CFG(scale)
