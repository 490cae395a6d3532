"""Adaptive guidance: stop guiding a draw once its two predictions agree."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from genkit._core._checks import check_choice, check_interval, fail
from genkit._core._fields import as_number
from genkit.guidance._switch import check_guidance, combine_where_on, needs_where_on
from genkit.guidance._types import Combined, Needs
from genkit.guidance._vectors import cosine
from genkit.sampling import Context, Guidance, Prediction, Slot


class Adaptive(Guidance):
    """Another guidance until the first two predictions of a draw agree; from the next step on the plain prediction."""

    guidance: Guidance
    threshold: Float[Array, ""] = eqx.field(converter=as_number)
    space: str = eqx.field(static=True)
    hysteresis: bool = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Refuse guidances with nothing to compare, and unknown spaces."""
        check_guidance(self.guidance)
        names = [slot.name for slot in self.guidance.slots()]
        if len(names) < 2:
            fail("guidance", "one that compares two predictions", f"the slots {names}")
        check_choice("space", self.space, ("x0", "eps"))
        check_interval("threshold", self.threshold, -1)

    def slots(self) -> tuple[Slot, ...]:
        return self.guidance.slots()

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        # `armed` once the predictions have disagreed, `latched` once they then agree.
        armed = jnp.asarray(not self.hysteresis)
        return {"inner": self.guidance.init(x), "armed": armed, "latched": jnp.asarray(False)}

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        return needs_where_on(~carry["latched"], self.guidance, carry["inner"], ctx)

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        guided = ~carry["latched"]
        x0, inner, reports = combine_where_on(guided, self.guidance, preds, ctx, carry["inner"])
        first, second = (preds[slot.name] for slot in self.slots()[:2])
        compared = guided & first.present & second.present
        # No gradient: the comparison decides, and does not enter the draw.
        similarity = jax.lax.stop_gradient(self._similarity(first.x0, second.x0, ctx))
        agree = similarity >= self.threshold
        # Predictions agree at high noise too, those of noise always and those of data where a network never learned
        # better: it takes a disagreement first.
        latched = carry["latched"] | (compared & carry["armed"] & agree)
        armed = carry["armed"] | (compared & ~agree)
        reports |= {"similarity": jnp.where(compared, similarity, jnp.nan), "latched": latched}
        return x0, {"inner": inner, "armed": armed, "latched": latched}, reports

    def _similarity(
        self, first: Float[Array, " *shape"], second: Float[Array, " *shape"], ctx: Context
    ) -> Float[Array, ""]:
        """Cosine of the angle between two predictions, of the data or of the noise."""
        # In bfloat16 and less a cosine near 1 has no digits left: `cosine` works in float32 at least.
        if self.space == "x0":
            return cosine(first, second)
        # eps = (x - D) / sigma, and the common factor does not change a cosine.
        return cosine(ctx.x - first, ctx.x - second)


def adaptive(
    guidance: Guidance, threshold: Float[ArrayLike, ""] | float = 0.99, space: str = "x0", *, hysteresis: bool = True
) -> Adaptive:
    r"""Adaptive guidance: stop guiding once the conditional and the other prediction agree, and save the evaluation.

    Every draw has a latch of its own: when the cosine between its first two predictions reaches the threshold, it takes
    plain predictions from the next step on, for good. `skip="compact"` of `genkit.Sampler` evaluates the draws that still
    need both in batches of their own; otherwise the second evaluation stops with the last of the batch.

    Predictions of the data are compared by default. The published rule compares predictions of the noise, which agree
    at high noise as well: both are nearly `x / sigma`. So do those of the data beyond the noise levels that a network
    was trained on. Hence a draw latches only after a disagreement.

    Args:
        guidance: any guidance with at least two slots, of which the first is the plain prediction.
        threshold: cosine from which two predictions agree; above 1 never.
        space: `"x0"` compares predictions of the data, `"eps"` of the noise, as published.
        hysteresis: wait for a disagreement first; without it, and with `"eps"`, the published rule to the letter.

    Returns:
        A guidance. `Draws.info` holds `similarity` (NaN where not compared) and `latched` per row.

    Raises:
        TypeError: if `guidance` is no guidance.
        ValueError: if it has one slot only, the space is unknown or the threshold below -1.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.adaptive(gk.guidance.cfg(7.5), 0.99)

    Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
    section 4; the comparison of data predictions and the wait for a disagreement are ours.
    """  # noqa: E501
    return Adaptive(guidance, threshold, space, hysteresis)
