"""Guidance that is a weighted sum of predictions: classifier-free, negative, autoguidance, composition, CFG++."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int, PyTree

from genkit._core._checks import check, describe, fail
from genkit.guidance._types import Combined, Needs
from genkit.guidance._weights import AbstractWeight, CFGPlusPlus, Complement, Negated, Scale, as_weight
from genkit.sampling import Context, Guidance, Prediction, Slot


def _as_weights(scales: Sequence[Scale]) -> tuple[AbstractWeight, ...]:
    return tuple(as_weight(scale) for scale in scales)


class Linear(Guidance):
    r"""A weighted sum of predictions whose weights sum to one, $D = D_0 + \sum_{i > 0} w_i (D_i - D_0)$.

    Such sums are the same in every parameterization (data, noise, velocity, score). A prediction of weight zero is not
    made.

    Args:
        predictions: the evaluations; the first is the plain prediction, which takes the rest of the weight.
        weights: one weight for each of the others.

    Raises:
        ValueError: if their numbers do not fit.

    Example:
        >>> import genkit as gk
        >>> slot = gk.guidance.Slot
        >>> two_negatives = gk.guidance.Linear((slot("cond"), slot("a", cond=1), slot("b", cond=2)), (-1.0, -1.0))
    """

    predictions: tuple[Slot, ...]
    weights: tuple[AbstractWeight, ...] = eqx.field(converter=_as_weights)

    def __check_init__(self) -> None:
        """Refuse a number of weights that does not fit."""
        wanted = len(self.predictions) - 1
        if len(self.weights) != wanted:
            fail("weights", f"{wanted} weights, one per further slot", str(len(self.weights)))

    def slots(self) -> tuple[Slot, ...]:
        return self.predictions

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        weights = [weight(ctx) for weight in self.weights]
        # The first prediction has weight 1 minus the sum of the others. Users write scales of 0 and 1 exactly, so that
        # comparing for equality is safe.
        needed = [sum(weights, jnp.zeros(())) != 1, *(weight != 0 for weight in weights)]
        return {slot.name: need for slot, need in zip(self.predictions, needed, strict=True)}

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        base = preds[self.predictions[0].name].x0
        total = base
        # Of a slot that was not evaluated the prediction is zero; its weight is zero too, and where the first slot was
        # not evaluated, `base` cancels because the weights sum to one.
        for slot, weight in zip(self.predictions[1:], self.weights, strict=True):
            total = total + weight(ctx).astype(base.dtype) * (preds[slot.name].x0 - base)
        return total, carry, {}


def cfg(scale: Scale) -> Linear:
    r"""Classifier-free guidance: exaggerate what the condition changes.

    $$D = D_{uncond} + w\, (D_{cond} - D_{uncond}).$$

    Args:
        scale: guidance scale $w$: 1 is off, 0 ignores the condition, both with one evaluation; above 1 exaggerates. A
            number, an array with one number per step (a policy), or a weight such as `Ramp`; array leaves, so that
            sweeping them never recompiles.

    Returns:
        A guidance with two evaluations per prediction.

    Raises:
        ValueError: if the scale is an array of the wrong shape.
        NonFiniteError: if the scale is NaN or infinite.

    Example:
        >>> import genkit as gk
        >>> [slot.name for slot in gk.guidance.cfg(4.0).slots()]
        ['cond', 'uncond']

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6, whose scale is $w - 1$.
    """
    return Linear((Slot("cond"), Slot("uncond", cond="null")), (Complement(as_weight(scale)),))


def cfgpp(strength: Float[ArrayLike, ""] | float) -> Linear:
    r"""CFG++: guide towards the condition, renoise with the unconditional noise.

    One step of CFG++ is $x' = D + \sigma' \varepsilon_{uncond}$ with $D = D_{uncond} + \lambda (D_{cond} -
    D_{uncond})$. For DDIM that is classifier-free guidance of scale $\lambda / (1 - \sigma' / \sigma)$, exactly; in
    this form it works with every sampler on a grid.

    Args:
        strength: $\lambda$ from 0 to 1; 0.6 is about a scale of 7.5 in 50 steps.

    Returns:
        A guidance with two evaluations per prediction.

    Raises:
        ValueError: if the strength is no scalar.
        NonFiniteError: if it is NaN or infinite.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.cfgpp(0.6)

    Source: Chung et al., "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models", ICLR 2025.
    """
    return cfg(CFGPlusPlus(strength))


def negative(scale: Scale, cond: ArrayLike) -> Linear:
    r"""Guidance away from another condition, $D = D_{neg} + w\, (D_{cond} - D_{neg})$.

    Args:
        scale: guidance scale $w$, as in `cfg`.
        cond: what to avoid: a label or an array, the same for all draws.

    Returns:
        A guidance with two evaluations per prediction.

    Raises:
        TypeError: if `cond` is no label or array.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.negative(3.0, 7)

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6, with a condition in place of none.
    """
    return Linear((Slot("cond"), Slot("negative", cond=as_condition(cond))), (Complement(as_weight(scale)),))


def autoguide(weak: Callable, scale: Scale) -> Linear:
    r"""Autoguidance: exaggerate what a model does better than a weaker version of itself.

    $$D = D_{weak} + w\, (D - D_{weak}).$$

    Args:
        weak: a smaller or less trained denoiser of the same data and conditions.
        scale: guidance scale $w$: 1 is off.

    Returns:
        A guidance with one evaluation of either denoiser per prediction.

    Raises:
        TypeError: if `weak` cannot be called.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> weak = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.array(4.0))
        >>> guidance = gk.guidance.autoguide(weak, 2.0)

    Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024, equation 4.
    """
    # The plain prediction comes first: it takes the weight w, the other one 1 - w.
    return Linear((Slot("cond"), Slot("weak", net=_checked_denoiser("weak", weak))), (Complement(as_weight(scale)),))


def perturbed(net: Callable, scale: Scale) -> Linear:
    r"""Guidance away from a perturbed version of the model, $D = D_{cond} + s\, (D_{cond} - D_{perturbed})$.

    The perturbed model is any callable: attention maps replaced by the identity, blurred queries, skipped blocks; for
    Equinox models `eqx.tree_at` builds it.

    Args:
        net: the perturbed denoiser.
        scale: strength $s$; 0 is off. Add it to `cfg` for the usual combination.

    Returns:
        A guidance with one evaluation of either denoiser per prediction.

    Raises:
        TypeError: if `net` cannot be called.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> blurred = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.array(4.0))
        >>> guidance = gk.guidance.cfg(3.0) + gk.guidance.perturbed(blurred, 1.5)

    Source: Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", ECCV 2024, equation 15.
    """
    # D_cond + s (D_cond - D_perturbed): the perturbed prediction has weight -s, and s = 0 leaves it out.
    return Linear((Slot("cond"), Slot("perturbed", net=_checked_denoiser("net", net))), (Negated(as_weight(scale)),))


def compose(weights: Mapping[Hashable, Scale]) -> Linear:
    r"""Composition of conditions, $D = D_{uncond} + \sum_i w_i (D_i - D_{uncond})$: and, or with $w_i < 0$ not.

    It is not the product of the conditional distributions; see `fkc` for that. The condition of the draw plays no part.

    Args:
        weights: condition to weight.

    Returns:
        A guidance with one evaluation per condition and one without.

    Raises:
        ValueError: if there is no condition.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.compose({3: 2.0, 8: -0.5})

    Source: Liu et al., "Compositional Visual Generation with Composable Diffusion Models", ECCV 2022, equations 11, 13.
    """
    check(len(weights) > 0, "weights", "a dict of at least one condition", "an empty one")
    slots = tuple(Slot(f"cond_{cond}", cond=as_condition(cond)) for cond in weights)
    return Linear((Slot("uncond", cond="null"), *slots), tuple(as_weight(w) for w in weights.values()))


@functools.lru_cache(maxsize=4096)
def _label(value: int) -> Int[np.ndarray, ""]:
    # One array per label: slots are merged by the identity of their arrays, also inside `jit`, and two guidances away
    # from one label are to evaluate it once.
    label = np.array(value, np.int32)
    label.setflags(write=False)
    return label


def as_condition(cond: PyTree) -> ArrayLike:
    """A condition of a guidance as an array."""
    # True and False are integers to Python; words stand for conditions that are no labels.
    if isinstance(cond, (bool, str)) or cond is None or callable(cond):
        raise TypeError(f"`cond` must be a label or an array; got {describe(cond)}.")
    if isinstance(cond, (int, np.integer)):
        return _label(int(cond))
    return jnp.asarray(cond)


def _checked_denoiser(name: str, net: Callable) -> Callable:
    if not callable(net):
        raise TypeError(f"`{name}` must be a denoiser, a callable (x, sigma, cond=None) -> x0; got {describe(net)}.")
    return net
