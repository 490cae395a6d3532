"""Guidance by gradients: of a classifier that knows the noise level, or of a loss through the denoiser."""

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from genkit._core._checks import check, check_choice, check_count, check_interval, describe, fail
from genkit._core._fields import as_number
from genkit.guidance._types import Combined
from genkit.guidance._weights import AbstractWeight, Scale, as_weight
from genkit.sampling import Context, Guidance, Prediction, Slot, Table


class Classifier(Guidance):
    """Guidance by the gradient of a classifier of noisy examples."""

    log_prob_fn: Callable
    scale: AbstractWeight

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("uncond", cond="null"),)

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        base = preds["uncond"].x0

        def log_prob(x: Float[Array, " *shape"]) -> Float[Array, ""]:
            return _as_scalar("log_prob_fn", self.log_prob_fn(x, ctx.sigma, ctx.cond))

        gradient, failed = _zero_unless_finite(jax.grad(log_prob)(ctx.x))
        # Tweedie: D = x + sigma^2 times the score, and the scores of the factors add up.
        weight = self.scale(ctx).astype(base.dtype) * ctx.sigma**2
        return base + weight * gradient.astype(base.dtype), carry, {"classifier_failed": failed}

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        check(cond is not None, "cond", "given with `classifier`, which guides towards it", cond)


def classifier(log_prob_fn: Callable, scale: Scale) -> Classifier:
    r"""Classifier guidance, $D = D_{uncond} + w\, \sigma^2\, \nabla_x \log p(c \mid x, \sigma)$.

    With the exact classifier this is `cfg` of the same scale.

    Args:
        log_prob_fn: `(x, sigma, cond) -> log p(cond | x, sigma)`, a scalar, of noisy examples. Where its gradient is
            not finite, the draw is not guided, and `info["classifier_failed"]` says so.
        scale: guidance scale $w$: 0 is off, 1 conditional.

    Returns:
        A guidance with one evaluation per prediction, and one gradient of the classifier.

    Raises:
        TypeError: if the classifier cannot be called.
        ValueError: when drawing, without a condition, or for a log-probability that is no scalar.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> guidance = gk.guidance.classifier(lambda x, sigma, cond: jax.nn.log_sigmoid(x[0] / (1 + sigma**2)), 2.0)

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, algorithm 2; the gradient
    is taken at the noisy example and applied to the prediction there.
    """  # noqa: E501
    _check_callable("log_prob_fn", log_prob_fn)
    return Classifier(log_prob_fn, as_weight(scale))


class LossGuidance(Guidance):
    """Guidance down the gradient of a loss of the predicted data."""

    loss: Callable
    scale: AbstractWeight
    spread: Float[Array, ""] = eqx.field(converter=as_number)
    through: str = eqx.field(static=True)
    step: str = eqx.field(static=True)
    num_draws: int = eqx.field(static=True)

    @property
    def needs_grid(self) -> bool:
        """The step of DPS is measured at the next noise level."""
        return self.step == "dps"

    def slots(self) -> tuple[Slot, ...]:
        if self.through == "prediction":
            return (Slot("cond"),)
        return (Slot("cond", loss=_LossNearPrediction(self)),)

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        base = preds["cond"].x0
        value, gradient = jax.value_and_grad(_LossNearPrediction(self))(base, ctx)
        through_denoiser = preds["cond"].gradient
        if through_denoiser is not None:
            gradient = through_denoiser
        gradient, failed = _zero_unless_finite(gradient)
        scale = self.scale(ctx).astype(base.dtype)
        if self.step == "score":
            change = scale * ctx.sigma**2 * gradient
        else:
            # DPS moves the state after the step by zeta times the gradient over the root of the loss; DDIM carries a
            # change of the prediction into the state with the factor 1 - sigma' / sigma.
            root = jnp.sqrt(jnp.where(value > 0, value, 1))
            change = scale * jnp.where(value > 0, gradient / root, 0) / (1 - ctx.sigma_next / ctx.sigma_start)
        return base - change.astype(base.dtype), carry, {"loss": value.astype(base.dtype), "loss_failed": failed}


class _LossNearPrediction(eqx.Module):
    """The loss at the prediction, or its soft minimum over draws around it."""

    guidance: LossGuidance

    def __call__(self, x0: Float[Array, " *shape"], ctx: Context) -> Float[Array, ""]:
        options = self.guidance

        def loss(x0: Float[Array, " *shape"]) -> Float[Array, ""]:
            return _as_scalar("loss", options.loss(x0))

        if options.num_draws == 0:
            return loss(x0)
        # Data of unit variance seen through noise sigma keep the standard deviation sigma / sqrt(1 + sigma^2).
        radius = (options.spread * ctx.sigma / jnp.sqrt(1 + ctx.sigma**2)).astype(x0.dtype)
        # Value and gradient are taken at the same draws: both fold the same number into the key of the evaluation.
        noise = jax.random.normal(jax.random.fold_in(ctx.key, 0), (options.num_draws, *x0.shape), x0.dtype)
        losses = jax.vmap(lambda z: loss(x0 + radius * z))(noise)
        # -log of the mean of exp(-loss)
        return jnp.log(float(options.num_draws)) - jax.nn.logsumexp(-losses)


def loss_guidance(
    loss: Callable,
    scale: Scale = 1.0,
    *,
    through: str = "denoiser",
    step: str = "score",
    num_draws: int = 0,
    spread: Float[ArrayLike, ""] | float = 1.0,
) -> LossGuidance:
    r"""Guidance by a loss of the predicted data, such as the misfit of a measurement.

    $$D = D_{cond} - \zeta\, \sigma^2\, \nabla_x\, \ell(D_{cond}(x, \sigma)) \quad (\text{score}), \qquad
      D = D_{cond} - \frac{\zeta}{1 - \sigma' / \sigma} \frac{\nabla_x\, \ell(D_{cond})}{\sqrt{\ell}} \quad (\text{dps}).$$

    The score step with $\ell$ a negative log-likelihood takes the prediction for the truth (a plug-in likelihood): it
    overstates what a measurement says at high noise. The step of DPS does not aim at a posterior at all.

    Args:
        loss: `x0 -> scalar`, traceable; non-negative with `step="dps"`. Where its gradient is not finite, the draw is
            not guided, and `info["loss_failed"]` says so.
        scale: $\zeta$; 0 is off. A number, one per step, or a weight.
        through: `"denoiser"` takes the gradient with respect to the noisy example, through the denoiser; `"prediction"`
            with respect to the prediction, without differentiating the denoiser.
        step: `"score"` or `"dps"`, above; for DDIM the latter is the published update of the state, exactly.
        num_draws: number of draws around the prediction over which $e^{-\ell}$ is averaged; 0 for the prediction alone.
        spread: standard deviation of these draws in units of $\sigma / \sqrt{1 + \sigma^2}$.

    Returns:
        A guidance with one evaluation per prediction, differentiated once or not. `Draws.info` holds `loss` per row.

    Raises:
        TypeError: if the loss cannot be called.
        ValueError: for unknown options; when drawing, for a loss that is no scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> guidance = gk.guidance.loss_guidance(lambda x0: jnp.sum((x0[:1] - 1.5) ** 2) / (2 * 0.5**2))

    Source: Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", ICLR 2023, algorithm 1 (dps);
    Song et al., "Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation", ICML 2023 (draws); He et al.,
    "Manifold Preserving Guided Diffusion", ICLR 2024 (prediction).
    """  # noqa: E501
    _check_callable("loss", loss)
    check_choice("through", through, ("denoiser", "prediction"))
    check_choice("step", step, ("score", "dps"))
    check_count("num_draws", num_draws, 0)
    check_interval("spread", spread, 0)
    return LossGuidance(loss, as_weight(scale), spread, through, step, num_draws)


def _zero_unless_finite(gradient: Float[Array, " *shape"]) -> tuple[Float[Array, " *shape"], Bool[Array, ""]]:
    """The gradient, zero where any entry is not finite, and whether that was so."""
    # As a whole: a step along the remaining entries would be no direction of the loss.
    failed = ~jnp.all(jnp.isfinite(gradient))
    return jnp.where(failed, 0, gradient), failed


def _as_scalar(name: str, value: Shaped[ArrayLike, "..."]) -> Shaped[Array, ""]:
    value = jnp.asarray(value)
    if value.ndim != 0:
        fail(name, "a function that returns a scalar", f"shape {value.shape}")
    return value


def _check_callable(name: str, fn: Callable) -> None:
    if not callable(fn):
        raise TypeError(f"`{name}` must be callable; got {describe(fn)}.")
