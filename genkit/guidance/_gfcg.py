"""Gradient-free classifier guidance: a classifier names the class to be guided away from, and how much."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from genkit._core._checks import check, check_choice, check_finite, check_interval, check_positive, describe, fail
from genkit._core._fields import as_number
from genkit._core._known import is_known
from genkit.guidance._types import Combined
from genkit.sampling import Context, Guidance, Prediction, Slot, Table, as_denoiser


CONFUSIONS = ("1-p", "ratio", "rival", "odds")
REFERENCES = ("rival", "top")
# Largest logarithm of odds: exp(60) is finite in every dtype with the exponents of float32.
_LARGEST_LOG_ODDS = 60.0


class Verdict(NamedTuple):
    """Consequences of the classification of a prediction: how far to guide it, and away from which label."""

    scale: Float[Array, ""]
    reference: Int[Array, ""]  # label to be guided away from, -1 for none
    confusion: Float[Array, ""]
    failed: Bool[Array, ""]


class GFCG(Guidance):
    """Two-stage guidance: the classifier sees the first prediction, and decides on the second."""

    classifier: Callable
    scale_max: Float[Array, ""] = eqx.field(converter=as_number)
    skip_below: Float[Array, ""] = eqx.field(converter=as_number)
    base_scale: Float[Array, ""] = eqx.field(converter=as_number)
    temperature: Float[Array, ""] = eqx.field(converter=as_number)
    weak: Callable | None
    confusion: str = eqx.field(static=True)
    reference: str = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Refuse unknown options and numbers out of range."""
        if not callable(self.classifier):
            raise TypeError(f"`classifier` must be callable; got {describe(self.classifier)}.")
        if self.weak is not None and not callable(self.weak):
            raise TypeError(f"`weak` must be callable; got {describe(self.weak)}.")
        check_choice("confusion", self.confusion, CONFUSIONS)
        check_choice("reference", self.reference, REFERENCES)
        check_interval("skip_below", self.skip_below, 0, 1)
        check_positive("temperature", self.temperature)
        for name, scale in (("scale_max", self.scale_max), ("base_scale", self.base_scale)):
            check(scale.ndim == 0, name, "a scalar", scale)
            check_finite(name, scale)

    def slots(self) -> tuple[Slot, ...]:
        return Slot("cond"), Slot(self._second, cond="asked", net=self.weak, ask=_AskClassifier(self))

    @property
    def _second(self) -> str:
        """Name of the second slot: that of the argument that brought its network, where one did."""
        # Errors about the slot name it, and are to name the argument.
        if self.weak is None:
            return "reference"
        return "weak"

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        base = preds["cond"].x0
        reference = preds[self._second]
        verdict = self.classify(base, ctx)
        # A reference that was not evaluated is replaced by the base: a step of zero with a finite gradient.
        away = base - jnp.where(reference.present, reference.x0, base)
        step = (verdict.scale - 1).astype(base.dtype) * away
        reports = {
            "scale": verdict.scale.astype(base.dtype),
            "confusion": verdict.confusion.astype(base.dtype),
            "classifier_failed": verdict.failed,
        }
        return base + jnp.where(reference.present, step, 0), carry, reports

    def classify(self, x0: Float[Array, " *shape"], ctx: Context) -> Verdict:
        """Scale and reference for a prediction, from the probabilities of its classes."""
        logits = jnp.asarray(self.classifier(x0))
        if logits.ndim != 1:
            fail("classifier", "a function x0 -> logits of shape (classes,)", f"shape {logits.shape}")
        failed = ~jnp.all(jnp.isfinite(logits)) | (ctx.cond >= len(logits))
        # Where it failed all classes are alike, so that nothing below is NaN; the result is replaced at the end.
        logits = jax.nn.log_softmax(jnp.where(failed, 0, logits) / self.temperature)
        label = jnp.clip(ctx.cond, 0, len(logits) - 1)
        is_own = jnp.arange(len(logits)) == label
        rival = jnp.argmax(jnp.where(is_own, -jnp.inf, jnp.exp(logits))).astype(ctx.cond.dtype)
        unguided = failed | (ctx.cond < 0)
        confusion = jnp.where(unguided, 0, self._confusion(logits[label], logits[rival]))
        # "Skip below" includes zero: what is not confused at all is not guided.
        confused = (confusion > self.skip_below) & ~unguided
        scale = jnp.where(confused, self._scale(confusion), self.base_scale)
        # Where nothing is confused the reference is that of the ordinary guidance of the same networks: with a weak
        # model the same class (autoguidance), else no condition (classifier-free).
        fallback = jnp.full_like(ctx.cond, -1)
        if self.weak is not None:
            fallback = ctx.cond
        reference = rival
        if self.reference == "top":
            top = jnp.argmax(jnp.exp(logits)).astype(ctx.cond.dtype)
            reference = jnp.where(top == label, fallback, top)
        return Verdict(jnp.where(unguided, 1, scale), jnp.where(confused, reference, fallback), confusion, failed)

    def _confusion(self, log_own: Float[Array, ""], log_rival: Float[Array, ""]) -> Float[Array, ""]:
        """How far the class is confused with its rival, from the logarithms of their probabilities."""
        own = jnp.exp(log_own)
        rival = jnp.exp(log_rival)
        if self.confusion == "1-p":
            return 1 - own
        if self.confusion == "ratio":
            return rival / (own + rival)
        if self.confusion == "rival":
            return rival
        # Odds from logarithms: the probability of the class may underflow.
        return jnp.exp(jnp.minimum(log_rival - log_own, _LARGEST_LOG_ODDS))

    def _scale(self, confusion: Float[Array, ""]) -> Float[Array, ""]:
        """The scale of a confused prediction."""
        if self.confusion == "odds":
            return jnp.minimum(self.base_scale + confusion, self.scale_max)
        return self.base_scale + (self.scale_max - self.base_scale) * confusion

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        is_labels = cond is not None and jnp.issubdtype(cond.dtype, jnp.integer) and cond.ndim == 1
        check(is_labels, "cond", "integer labels with `gfcg`, whose classifier compares them", cond)
        shape = as_denoiser(model).shape
        if shape is None or not is_known(cond):
            return
        example = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
        logits = jax.eval_shape(lambda x0: jnp.asarray(self.classifier(x0)), example)
        # Logits of another rank are refused in the draw, by `classify`.
        largest = int(np.max(np.asarray(cond)))
        if logits.ndim == 1 and largest >= logits.shape[0]:
            fail("cond", f"labels that the classifier of `gfcg` knows, 0 to {logits.shape[0] - 1}", largest)


class _AskClassifier(eqx.Module):
    """The question of the second slot: whether the reference is evaluated, and under which label."""

    guidance: GFCG

    def __call__(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree
    ) -> tuple[Bool[Array, ""], Int[Array, ""]]:
        verdict = self.guidance.classify(preds["cond"].x0, ctx)
        return verdict.scale != 1, verdict.reference


def gfcg(
    classifier: Callable,
    scale_max: Float[ArrayLike, ""] | float,
    confusion: str = "1-p",
    skip_below: Float[ArrayLike, ""] | float = 0.0,
    *,
    reference: str = "rival",
    base_scale: Float[ArrayLike, ""] | float = 1.0,
    temperature: Float[ArrayLike, ""] | float = 1.0,
    weak: Callable | None = None,
) -> GFCG:
    r"""Gradient-free classifier guidance: away from the class that the prediction is confused with, as far as it is.

    A classifier looks at the prediction $D_c$ of the data; with $p$ its probabilities and $r$ the likeliest other class,

    $$D = D_c + (w - 1)(D_c - D_r), \qquad w = w_0 + (w_{max} - w_0)\, q, \qquad q = 1 - p_c.$$

    Where the confusion $q$ is at most `skip_below`, the scale is $w_0$; at $w_0 = 1$ the second evaluation is skipped,
    draw by draw. Steps 2 and 3 of the published method could not be read: this is a reconstruction, and what is
    undecided is an option.

    Args:
        classifier: `x0 -> logits` of shape `(classes,)`. Where a logit is NaN or infinite, or the label of the draw has
            none, the draw is not guided, and `info["classifier_failed"]` says so.
        scale_max: scale $w_{max}$ at complete confusion.
        confusion: `"1-p"` is $1 - p_c$; `"ratio"` is $p_r / (p_r + p_c)$; `"rival"` is $p_r$. With `"odds"` the scale is
            $w = \min(w_0 + p_r / p_c, w_{max})$: where the prediction is a mixture, a share $p_c$ of the class and a share
            $p_r$ of the rival, that takes the share of the rival out, no more and no less.
        skip_below: confusion up to which nothing is confused, from 0 to 1.
        reference: `"rival"` is the likeliest class other than $c$; `"top"` the likeliest of all, and no condition (of a
            weak model: $c$) where that is $c$.
        base_scale: scale $w_0$ where nothing is confused; above 1 it is classifier-free guidance there (with a weak
            model autoguidance), at no further evaluation.
        temperature: of the probabilities, positive.
        weak: evaluate the reference with this denoiser instead of the sampled one: joins `autoguide`.

    Returns:
        A guidance with one or two evaluations per prediction. `Draws.info` holds `scale`, `confusion` and
        `classifier_failed` per row.

    Raises:
        TypeError: if the classifier or `weak` cannot be called.
        ValueError: for unknown options or numbers out of range; when drawing, without integer labels.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> guidance = gk.guidance.gfcg(lambda x0: -jnp.array([x0[0], 1 - x0[0]]) ** 2, 5.0, skip_below=0.05)

    Source: "Gradient-Free Classifier Guidance for Diffusion Model Sampling", WACV 2026; reconstructed from its abstract.
    """  # noqa: E501
    return GFCG(classifier, scale_max, skip_below, base_scale, temperature, weak, confusion, reference)
