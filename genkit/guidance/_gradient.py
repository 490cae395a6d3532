"""Guidance by gradients: of a classifier that knows the noise level, or of a loss through the denoiser."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from genkit._core._checks import check, check_choice, check_count, check_interval, describe
from genkit._core._fields import as_number
from genkit.guidance._weights import AbstractWeight, Scale, as_weight
from genkit.sampling import Context, Guidance, Prediction, Slot


class Classifier(Guidance):
    """Guidance by the gradient of a classifier of noisy examples."""

    log_prob_fn: Callable
    scale: AbstractWeight

    def slots(self) -> tuple[Slot, ...]:
        """The prediction without a condition."""
        return (Slot("uncond", cond="null"),)

    def init(self, x: Float[Array, " *shape"]) -> None:
        """No carry."""
        return

    def needs(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """Always needed."""
        return {"uncond": True}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """Up the gradient."""
        base = preds["uncond"].x0
        gradient = jax.grad(lambda x: _scalar("log_prob_fn", self.log_prob_fn(x, ctx.sigma, ctx.cond)))(ctx.x)
        gradient, failed = _sound(gradient)
        weight = self.scale(ctx).astype(base.dtype) * ctx.sigma**2
        return base + weight * gradient.astype(base.dtype), carry, {"classifier_failed": failed}

    def check_draw(self, table: Any, model: Any, cond: Any) -> None:
        """Refuse draws without a condition."""
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
    _callable("log_prob_fn", log_prob_fn)
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
        """The plain prediction, with the gradient through it where that is asked for."""
        return (Slot("cond", loss=_Averaged(self) if self.through == "denoiser" else None),)

    def init(self, x: Float[Array, " *shape"]) -> None:
        """No carry."""
        return

    def needs(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """Always needed."""
        return {"cond": True}

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """Down the gradient."""
        base, gradient = preds["cond"].x0, preds["cond"].gradient
        value, own = jax.value_and_grad(_Averaged(self))(base, ctx)
        gradient, failed = _sound(own if gradient is None else gradient)
        scale = self.scale(ctx).astype(base.dtype)
        if self.step == "score":
            change = scale * ctx.sigma**2 * gradient
        else:
            # DPS moves the state after the step by zeta times the gradient over the root of the loss; DDIM carries a
            # change of the prediction into the state with the factor 1 - sigma' / sigma.
            root = jnp.sqrt(jnp.where(value > 0, value, 1))
            change = scale * jnp.where(value > 0, gradient / root, 0) / (1 - ctx.sigma_next / ctx.sigma_start)
        return base - change.astype(base.dtype), carry, {"loss": value.astype(base.dtype), "loss_failed": failed}


class _Averaged(eqx.Module):
    """The loss at the prediction, or its soft minimum over draws around it."""

    guidance: LossGuidance

    def __call__(self, x0: Array, ctx: Context) -> Array:
        """Evaluate."""
        this = self.guidance
        if this.num_draws == 0:
            return _scalar("loss", this.loss(x0))
        radius = (this.spread * ctx.sigma / jnp.sqrt(1 + ctx.sigma**2)).astype(x0.dtype)
        # Value and gradient are taken at the same draws, each from a key of its own making.
        noise = jax.random.normal(jax.random.fold_in(ctx.key, 0), (this.num_draws, *x0.shape), x0.dtype)
        losses = jax.vmap(lambda z: _scalar("loss", this.loss(x0 + radius * z)))(noise)
        return jnp.log(float(this.num_draws)) - jax.nn.logsumexp(-losses)


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
    _callable("loss", loss)
    check_choice("through", through, ("denoiser", "prediction"))
    check_choice("step", step, ("score", "dps"))
    check_count("num_draws", num_draws, 0)
    check_interval("spread", spread, 0)
    return LossGuidance(loss, as_weight(scale), spread, through, step, num_draws)


def _sound(gradient: Array) -> tuple[Array, Array]:
    """The gradient, zero where it is not finite, and whether it was not."""
    failed = ~jnp.all(jnp.isfinite(gradient))
    return jnp.where(failed, 0, gradient), failed


def _scalar(name: str, value: Any) -> Array:
    """A scalar."""
    value = jnp.asarray(value)
    check(value.ndim == 0, name, "a function that returns a scalar", f"shape {value.shape}")
    return value


def _callable(name: str, fn: Any) -> None:
    """Refuse what cannot be called."""
    if not callable(fn):
        raise TypeError(f"`{name}` must be callable; got {describe(fn)}.")
