"""Gradient-free classifier guidance: a classifier names the class to be guided away from, and how much."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from genkit._core._checks import (
    check,
    check_choice,
    check_finite,
    check_interval,
    check_positive,
    describe,
    is_concrete,
)
from genkit._core._fields import as_number
from genkit.sampling import Context, Guidance, Prediction, Slot


CONFUSIONS = ("1-p", "ratio", "rival", "odds")
REFERENCES = ("rival", "top")


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
        for name, net in (("classifier", self.classifier), ("weak", self.weak or self.classifier)):
            if not callable(net):
                raise TypeError(f"`{name}` must be callable; got {describe(net)}.")
        check_choice("confusion", self.confusion, CONFUSIONS)
        check_choice("reference", self.reference, REFERENCES)
        check_interval("skip_below", self.skip_below, 0, 1)
        check_positive("temperature", self.temperature)
        for name in ("scale_max", "base_scale"):
            check(getattr(self, name).ndim == 0, name, "a scalar", getattr(self, name))
            check_finite(name, getattr(self, name))

    def slots(self) -> tuple[Slot, ...]:
        """The plain prediction, and one whose condition the classifier chooses."""
        return Slot("cond"), Slot(self._other, cond="asked", net=self.weak, ask=_Ask(self))

    @property
    def _other(self) -> str:
        """Name of the second slot: that of the argument that brought its network, where one did."""
        return "reference" if self.weak is None else "weak"

    def init(self, x: Float[Array, " *shape"]) -> None:
        """No carry."""
        return

    def needs(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """The plain prediction; the rest follows from it."""
        return {"cond": True}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """Away from the reference, where there is one."""
        base, other = preds["cond"].x0, preds[self._other]
        scale, _, confusion, failed = self.judge(base, ctx)
        step = (scale - 1).astype(base.dtype) * (base - jnp.where(other.present, other.x0, base))
        report = {"scale": scale.astype(base.dtype), "confusion": confusion.astype(base.dtype)}
        return base + jnp.where(other.present, step, 0), carry, report | {"classifier_failed": failed}

    def judge(self, x0: Array, ctx: Context) -> tuple[Array, Array, Array, Array]:
        """Scale, label of the reference, confusion, and whether the classifier failed."""
        logits = jnp.asarray(self.classifier(x0))
        check(logits.ndim == 1, "classifier", "a function x0 -> logits of shape (classes,)", f"shape {logits.shape}")
        failed = ~jnp.all(jnp.isfinite(logits)) | (ctx.cond >= len(logits))
        logits = jax.nn.log_softmax(jnp.where(failed, 0, logits) / self.temperature)
        probs = jnp.exp(logits)
        label = jnp.clip(ctx.cond, 0, len(probs) - 1)
        own = jnp.arange(len(probs)) == label
        rival = jnp.argmax(jnp.where(own, -jnp.inf, probs)).astype(ctx.cond.dtype)
        p, r = probs[label], probs[rival]
        odds = jnp.exp(jnp.minimum(logits[rival] - logits[label], 60.0))  # finite, whatever underflows
        confusion = {"1-p": 1 - p, "ratio": r / (p + r), "rival": r, "odds": odds}[self.confusion]
        idle = failed | (ctx.cond < 0)
        confusion = jnp.where(idle, 0, confusion)
        # "Skip below" includes zero: what is not confused at all is not guided.
        confused = (confusion > self.skip_below) & ~idle
        if self.confusion == "odds":
            scale = jnp.minimum(self.base_scale + confusion, self.scale_max)
        else:
            scale = self.base_scale + (self.scale_max - self.base_scale) * confusion
        scale = jnp.where(idle, 1, jnp.where(confused, scale, self.base_scale))
        # What the model itself takes for the reference where nothing is confused: for a weak model the class, for the
        # model itself no condition.
        fallback = ctx.cond if self.weak is not None else jnp.full_like(ctx.cond, -1)
        top = jnp.argmax(probs).astype(ctx.cond.dtype)
        chosen = rival if self.reference == "rival" else jnp.where(top == label, fallback, top)
        return scale, jnp.where(confused, chosen, fallback), confusion, failed

    def check_draw(self, table: Any, model: Any, cond: Any) -> None:
        """Refuse draws without labels."""
        labels = cond is not None and jnp.issubdtype(cond.dtype, jnp.integer) and cond.ndim == 1
        check(labels, "cond", "integer labels with `gfcg`, whose classifier compares them", cond)
        shape = getattr(model, "shape", None)
        if shape is not None and is_concrete(cond):
            example = jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(float))
            logits = jax.eval_shape(lambda x0: jnp.asarray(self.classifier(x0)), example)
            known, most = logits.shape[0] if len(logits.shape) == 1 else np.inf, int(np.max(np.asarray(cond)))
            check(most < known, "cond", f"labels that the classifier of `gfcg` knows, 0 to {known - 1}", most)


class _Ask(eqx.Module):
    """Whether the reference is evaluated, and under which label."""

    guidance: GFCG

    def __call__(self, preds: Mapping[str, Prediction], ctx: Context, carry: Any) -> tuple[Any, Any]:
        """Ask the classifier."""
        scale, label, _, _ = self.guidance.judge(preds["cond"].x0, ctx)
        return scale != 1, label


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
