"""Losses of a student: every f-divergence by one formula, and its relatives."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from genkit._core._checks import check, check_choice, check_count, check_positive, fail, is_concrete
from genkit._core._fields import as_number
from genkit.distill._model import Distillation
from genkit.distill._ratios import AbstractRatio, NoisyBatch, NoRatio, denoised, spread
from genkit.divergence import FDivergence, ReverseKL, diagnose, rank_bins, self_normalize
from genkit.sampling import null_like


def frozen(tree: PyTree) -> PyTree:
    """A tree whose arrays have no gradient."""
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def pushed(direction: Array, x: Array, value: Array) -> Array:
    """A scalar whose value is `value` and whose gradient in `x` is `direction` over the batch size."""
    # The surrogate adds nothing to the value and the direction to the gradient.
    surrogate = jnp.sum(jax.lax.stop_gradient(direction) * x) / x.shape[0]
    return jax.lax.stop_gradient(value) + surrogate - jax.lax.stop_gradient(surrogate)


class AbstractLoss(eqx.Module):
    """A loss of the student on a batch under noise. Losses add up, and take factors: `FDistill(...) + 0.01 * Adversarial()`."""  # noqa: E501

    @property
    def terms(self) -> "tuple[AbstractLoss, ...]":
        """The losses of which this one is the sum: itself, unless it is a combination."""
        return (self,)

    def ratios(self) -> tuple[AbstractRatio, ...]:
        """The log-ratios of teacher and student that the loss uses."""
        return ()

    @abc.abstractmethod
    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        """Evaluate on a batch.

        Args:
            model: all parts of the distillation.
            batch: the batch.
            key: typed PRNG key.

        Returns:
            A scalar whose gradient moves the student, and by-products to be logged.
        """

    @abc.abstractmethod
    def needs(self) -> tuple[bool, bool]:
        """Two flags: the loss needs a denoiser of the student's distribution; it needs a discriminator."""

    def __add__(self, other: "AbstractLoss") -> "AbstractLoss":
        """The sum of two losses."""
        if not isinstance(other, AbstractLoss):
            return NotImplemented
        return SumLoss((self, other), jnp.ones(2))

    def __mul__(self, factor: ArrayLike) -> "AbstractLoss":
        """A multiple."""
        return SumLoss((self,), jnp.asarray(factor, float)[None])

    def __rmul__(self, factor: ArrayLike) -> "AbstractLoss":
        """A multiple."""
        return self * factor


class SumLoss(AbstractLoss):
    """A combination of losses; made by `+` and `*`.

    Args:
        parts: the losses.
        factors: their factors.

    Example:
        >>> import genkit as gk
        >>> len((gk.distill.SDS() + 0.1 * gk.distill.Adversarial()).parts)
        2
    """

    parts: tuple[AbstractLoss, ...]
    factors: Float[Array, " k"]

    @property
    def terms(self) -> tuple[AbstractLoss, ...]:
        """The losses of which this one is the sum, sums taken apart."""
        return tuple(term for part in self.parts for term in part.terms)

    def ratios(self) -> tuple[AbstractRatio, ...]:
        return tuple(ratio for part in self.parts for ratio in part.ratios())

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        total = jnp.zeros((), batch.x.dtype)
        found = {}
        for i, part in enumerate(self.parts):
            value, aux = part(model, batch, key=jax.random.fold_in(key, i))
            total = total + self.factors[i].astype(value.dtype) * value
            # The first part names its by-products; later ones add what is new.
            found = aux | found
        return total, found

    def needs(self) -> tuple[bool, bool]:
        each = [part.needs() for part in self.parts]
        return any(own for own, _ in each), any(critic for _, critic in each)


class FDistill(AbstractLoss):
    r"""f-distill: the pathwise gradient of $E_\sigma[w(\sigma) D_f(p_\sigma \| q_\sigma)]$ for any f.

    $$\nabla_\theta = -E\big[w(\sigma)\, h(u)\, (s_p - s_q)(x_t) \cdot \partial_\theta x\big], \qquad u = \log p_\sigma/q_\sigma,$$

    with ratio, scores and noisy draws held fixed. $h = r^2 f''$ is divided by its value at ratio 1, so that all
    divergences take steps of one size where student and teacher agree. The value of the loss estimates the divergence.

    Args:
        divergence: any f-divergence with pathwise gradients.
        ratio: how the log-ratio is known; `NoRatio()` for the reverse KL.
        max_log_ratio: log-ratios are held within this bound either way; narrow bounds pull every divergence towards
            the reverse KL.
        num_bins: noise levels are parted in so many bins, in each of which the mean ratio is normalized to 1; 0 for
            none; `None` for none where ratios are exact, else 10.
        scaling: `"none"`, or `"dmd"` for the step of DMD, divided by the teacher's mean absolute error at each example
            (no longer the gradient of a divergence; for many dimensions only).

    Raises:
        ValueError: for a divergence without pathwise gradients, or one that needs a ratio where there is none.

    Example:
        >>> import genkit as gk
        >>> loss = gk.distill.FDistill(gk.divergence.JensenShannon(), gk.distill.ExactRatio())
        >>> loss.needs()
        (False, False)

    Source: Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025, theorem 1.
    """  # noqa: E501

    divergence: FDivergence
    ratio: AbstractRatio = eqx.field(default_factory=NoRatio)
    max_log_ratio: Float[Array, ""] = eqx.field(converter=as_number, default=30.0)
    num_bins: int | None = eqx.field(static=True, default=None)
    scaling: str = eqx.field(static=True, default="none")

    def __check_init__(self):
        check_positive("max_log_ratio", self.max_log_ratio)
        check_choice("scaling", self.scaling, ("none", "dmd"))
        if self.num_bins is not None:
            check_count("num_bins", self.num_bins, 0)
        # Raises where f has a kink.
        weights = self.divergence.weight(jnp.array([-1.0, 0.0, 1.0]))
        if not is_concrete(weights):
            return
        weights = np.asarray(weights)
        if not (np.isfinite(weights[1]) and weights[1] > 0):
            hint = "Its gradient vanishes, or is not defined, where student and teacher agree."
            fail("divergence", "of positive weight at ratio 1", f"weight {weights[1]:g}", hint)
        is_constant = bool(np.ptp(weights) < 1e-6 * weights[1])
        # Without a ratio the weight would be that of ratio 1 everywhere: right for constant weights only.
        if isinstance(self.ratio, NoRatio) and not is_constant:
            hint = (
                "The weight depends on the ratio: pass ExactRatio(), EmpiricalRatio(), ScoreRatio(...) or "
                "DiscriminatorRatio(net)."
            )
            fail("ratio", f"given with {type(self.divergence).__name__}", "none", hint)

    def needs(self) -> tuple[bool, bool]:
        return self.ratio.needs_own, self.ratio.needs_discriminator

    def ratios(self) -> tuple[AbstractRatio, ...]:
        return (self.ratio,)

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        """See `AbstractLoss`; by-products are `divergence`, `ess`, `clipped`, `mean_ratio`, `gap`, and where known
        `de_bruijn` (the divergence from scores alone) and `lag` (the fake denoiser's own share of the gap).
        """
        known = frozen(model)
        # The pathwise gradient holds ratio, scores and draws fixed; only `pushed` sees the student.
        seen = batch._replace(x_t=jax.lax.stop_gradient(batch.x_t), x=jax.lax.stop_gradient(batch.x))
        found = self.ratio(known, seen, key=key)
        has_ratio = not isinstance(self.ratio, NoRatio)
        num_bins = self._bins(model, found.u.shape[0])
        # A normalizer that depends on the noise level alone is taken out bin by bin of the level.
        u = found.u
        if num_bins > 0 and has_ratio:
            u = self_normalize(u, rank_bins(batch.sigma, num_bins), num_bins)
        limit = self.max_log_ratio.astype(u.dtype)
        clipped = jnp.clip(u, -limit, limit)
        # Divided by the weight at ratio 1, all divergences take steps of one size where student and teacher agree.
        scale = 1 / self.divergence.weight(jnp.zeros((), u.dtype))
        h = scale * self.divergence.weight(clipped)
        direction = -spread(batch.weight * h, batch.x) * found.gap
        if self.scaling == "dmd":
            direction = direction * self._dmd_scale(known, seen)
        squares = jnp.sum(found.gap.reshape(found.gap.shape[0], -1) ** 2, axis=1)
        aux = diagnose(u, h, limit)
        # Before normalization: its distance from 1 is the error of the ratio.
        aux["mean_ratio"] = jnp.mean(jnp.exp(jnp.clip(found.u, -limit, limit)))
        aux["gap"] = jnp.mean(batch.sigma**2 * squares)
        if batch.density is not None:
            aux["de_bruijn"] = jnp.mean(batch.sigma * h * squares / batch.density)
        if found.own is not None:
            aux["lag"] = _lag(found.own, found.gap, seen)
        # Scores alone tell the divergence by de Bruijn's identity, where the density of the levels is known.
        if has_ratio:
            value = jnp.mean(batch.weight * scale * self.divergence.phi(clipped))
        else:
            value = aux.get("de_bruijn", aux["gap"])
        aux["divergence"] = jax.lax.stop_gradient(value)
        return pushed(direction, batch.x, value), aux

    def _bins(self, model: Distillation, batch_size: int) -> int:
        """The number of bins of noise levels in which ratios are normalized; 0 for none."""
        if self.num_bins is not None:
            return self.num_bins
        if self.ratio.exact and model.guidance is None:
            return 0
        # At least eight draws to a bin, or the mean ratio of a bin would be noise.
        return min(10, batch_size // 8)

    def _dmd_scale(self, known: Distillation, seen: NoisyBatch) -> Array:
        error = jnp.abs(seen.x - denoised(known.target, seen))
        size = jnp.mean(error.reshape(error.shape[0], -1), axis=1)
        # Where the teacher errs by nothing the step would be unbounded.
        return spread(seen.sigma**2 / jnp.maximum(size, 1e-6), seen.x)


def _lag(own: Array, gap: Array, batch: NoisyBatch) -> Array:
    """The share of the score gap that is the error of the student's denoiser: 0 for the true one.

    For the posterior mean D of x, E[(D - x) . g(x_t)] = 0 for every g; here g is the gap itself.
    """
    away = -gap * spread(batch.sigma, gap) ** 2
    # Where the gap vanishes there is nothing to share.
    return jnp.sum((own - batch.x) * away) / jnp.maximum(jnp.sum(away**2), jnp.finfo(own.dtype).tiny)


def vsd() -> FDistill:
    """Variational score distillation, DMD's gradient and Diff-Instruct: the reverse KL, from the two scores.

    Returns:
        `FDistill(ReverseKL())`; the noise distribution and the weight make it the integral KL of Diff-Instruct.

    Example:
        >>> import genkit as gk
        >>> gk.distill.vsd().needs()
        (True, False)

    Source: Wang et al., "ProlificDreamer", NeurIPS 2023; Luo et al., "Diff-Instruct", NeurIPS 2023.
    """
    return FDistill(ReverseKL())


def dmd() -> FDistill:
    """Distribution matching distillation: `vsd` with DMD's scale of the step at each example.

    Returns:
        `FDistill(ReverseKL(), scaling="dmd")`.

    Example:
        >>> import genkit as gk
        >>> gk.distill.dmd().scaling
        'dmd'

    Source: Yin et al., "One-step Diffusion with Distribution Matching Distillation", CVPR 2024, equations 7 and 8.
    """
    return FDistill(ReverseKL(), scaling="dmd")


class SDS(AbstractLoss):
    r"""Score distillation sampling: the reverse KL of one point to the teacher, $-w (s_p - s_\delta)$; it seeks modes.

    Example:
        >>> import genkit as gk
        >>> gk.distill.SDS().needs()
        (False, False)

    Source: Poole et al., "DreamFusion", ICLR 2023, equation 3.
    """

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        seen = batch._replace(x_t=jax.lax.stop_gradient(batch.x_t))
        # A point mass at the clean draw stands for the student: its denoised example is the draw itself.
        away = denoised(frozen(model).target, seen) - jax.lax.stop_gradient(batch.x)
        # The score of a point mass is (draw - x_t) / sigma^2, and x_t drops out of the difference.
        gap = away / spread(batch.sigma, batch.x) ** 2
        value = jnp.mean(spread(batch.sigma, gap) ** 2 * gap**2)
        return pushed(-spread(batch.weight, gap) * gap, batch.x, value), {"gap": value}

    def needs(self) -> tuple[bool, bool]:
        return False, False


class DSD(AbstractLoss):
    r"""A classifier and a variational direction with weights of their own:
    $a(\varepsilon_c - \varepsilon_\varnothing) + b(\varepsilon_p - \varepsilon_\phi)$, times $w/\sigma$.

    Args:
        classifier: a, weight of the difference the condition makes.
        variational: b, weight of the difference of teacher and student.

    Example:
        >>> import genkit as gk
        >>> gk.distill.DSD(7.5, 1.0).needs()
        (True, False)

    Source: the form of domain score distillation in Cheng et al., "DreamPolish", 2024; the paper's own scaling of the two
    directions was not checked.
    """  # noqa: E501

    classifier: Float[Array, ""] = eqx.field(converter=as_number, default=1.0)
    variational: Float[Array, ""] = eqx.field(converter=as_number, default=1.0)

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        check(batch.cond is not None, "cond", "given with DSD, which weighs what the condition changes", "None")
        known = frozen(model)
        seen = batch._replace(x_t=jax.lax.stop_gradient(batch.x_t))
        given = denoised(known.teacher, seen)
        null = denoised(known.teacher, seen._replace(cond=null_like(batch.cond)))
        gap = self.classifier * (given - null) + self.variational * (
            denoised(known.target, seen) - denoised(known.own, seen)
        )
        gap = gap / spread(batch.sigma, gap) ** 2
        value = jnp.mean(spread(batch.sigma, gap) ** 2 * gap**2)
        return pushed(-spread(batch.weight, gap) * gap, batch.x, value), {"gap": value}

    def needs(self) -> tuple[bool, bool]:
        return True, False


class SiD(AbstractLoss):
    r"""Score identity distillation, $w(\sigma)\,(D_p - D_q) \cdot [(D_p - x) - \alpha (D_p - D_q)]$.

    Gradients flow through $x_t$ and both denoisers. With the true $D_q$: at $\alpha = 1/2$ the gradient is half that of
    $E_q|D_p - D_q|^2$; at $\alpha = 1$ it is half
    that with the distribution of $x_t$ held fixed; other values extrapolate (the paper uses 1.2).

    Args:
        alpha: the extrapolation.

    Example:
        >>> import genkit as gk
        >>> float(gk.distill.SiD(1.2).alpha)
        1.2000000476837158

    Source: Zhou et al., "Score identity Distillation", ICML 2024, equation 23.
    """

    alpha: Float[Array, ""] = eqx.field(converter=as_number, default=1.0)

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        known = frozen(model)
        p = denoised(known.target, batch)
        q = denoised(known.own, batch)
        # Nothing is stopped here: the identity needs the gradients through both denoisers.
        product = (p - q) * ((p - batch.x) - self.alpha * (p - q))
        value = jnp.mean(batch.weight * jnp.sum(product.reshape(product.shape[0], -1), axis=1))
        return value, {"gap": jnp.mean(jnp.sum(((p - q) / spread(batch.sigma, p)) ** 2)) / p.shape[0]}

    def needs(self) -> tuple[bool, bool]:
        return True, False


class Adversarial(AbstractLoss):
    r"""The generator's side of an adversarial game under noise, $E \operatorname{softplus}(-u(x_t))$ with u the logit.

    Example:
        >>> import genkit as gk
        >>> gk.distill.Adversarial().needs()
        (False, True)

    Source: Sauer et al., "Adversarial Diffusion Distillation", ECCV 2024; Yin et al., NeurIPS 2024, section 4.3.
    """

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        # The critic has its own phase; here it only judges.
        net = frozen(model.discriminator)
        u = jax.vmap(lambda x, s, c: net(x, s, c))(batch.x_t, batch.sigma, batch.cond)
        value = jnp.mean(jax.nn.softplus(-u))
        return value, {"adversarial": value}

    def needs(self) -> tuple[bool, bool]:
        return False, True


class PairRegression(AbstractLoss):
    r"""Each latent to the teacher's own draw from it, $E\|G(z, c) - x(z, c)\|^2$ over a pool of pairs.

    It keeps what the teacher covers, and blurs where the teacher's map is steep: a start for the other losses, or a
    term beside them. The pool is the model's `positives`, made by `teacher_pool`.

    Example:
        >>> import genkit as gk
        >>> gk.distill.PairRegression().needs()
        (False, False)

    Source: Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", 2021,
    equation 6; Yin et al., "One-step Diffusion with Distribution Matching Distillation", CVPR 2024, equation 9 (as a term).
    """  # noqa: E501

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> tuple[Array, dict[str, Any]]:
        z, x, cond = frozen(model.positives).rows(key, batch.x.shape[0])
        drawn = jax.vmap(lambda one, c: model.student(one, c))(z, cond)
        value = jnp.mean(jnp.sum((drawn - x).reshape(x.shape[0], -1) ** 2, axis=1))
        return value, {"regression": value}

    def needs(self) -> tuple[bool, bool]:
        return False, False


def density_of(distribution: dist.Distribution, sigma: Array) -> Array | None:
    """The density of noise levels under their distribution, where it has one."""
    if isinstance(distribution, dist.Delta):
        return None
    try:
        return jnp.exp(distribution.log_prob(sigma))
    except NotImplementedError:  # numpyro distributions that can only be drawn from
        return None
