"""Log-ratios of teacher and student, each with the difference of scores that belongs to it."""

import abc
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree, Shaped

from genkit._core._checks import check, check_count, check_interval, check_positive, fail
from genkit._core._fields import as_number, maybe_number
from genkit.distill._model import Distillation, log_density
from genkit.distill._students import KnowsItself, own_denoiser
from genkit.distill._teachers import Analytic


class NoisyBatch(NamedTuple):
    """A batch of the student under noise, as losses see it.

    `x` clean and `x_t = x + sigma * noise` noisy, both functions of the student; `sigma` and `weight` `(b,)`; `cond`
    the conditions or `None`; `density` of the noise levels under their distribution, or `None`.
    """

    x: Array
    x_t: Array
    sigma: Array
    noise: Array
    cond: PyTree
    weight: Array
    density: Array | None = None


class ScoreDifference(NamedTuple):
    """Result of a ratio: `u = log p/q` `(b,)`, `gap`, the score of p minus that of q, and `own`, D_q of the batch."""

    u: Array
    gap: Array
    own: Array | None = None


def spread(values: Array, like: Array) -> Array:
    """Values `(b,)` with trailing axes to multiply an array `(b, ...)`."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def denoised(denoiser: Callable[..., Array], batch: NoisyBatch) -> Array:
    """A denoiser on a batch."""
    return jax.vmap(lambda x, s, c: denoiser(x, s, c))(batch.x_t, batch.sigma, batch.cond)


def score_gap(target: Callable[..., Array], own: Array, batch: NoisyBatch) -> Array:
    """The score of p minus that of q, from the target and from the student's denoised batch."""
    return (denoised(target, batch) - own) / spread(batch.sigma, own) ** 2


class AbstractRatio(eqx.Module):
    """The log-ratio of (guided) teacher and student at noisy draws of the student.

    Args:
        exact: whether the ratio needs no normalization.
        needs_own: whether a denoiser of the student's distribution is needed.
        needs_discriminator: whether a discriminator is needed.
    """

    exact: eqx.AbstractClassVar[bool]
    needs_own: eqx.AbstractClassVar[bool]
    needs_discriminator: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> ScoreDifference:
        """Evaluate on a batch.

        Args:
            model: all parts of the distillation.
            batch: the batch; only `x_t`, `sigma` and `cond` count.
            key: typed PRNG key.

        Returns:
            Log-ratios, score differences, and the student's denoised batch where it was needed.
        """


class ExactRatio(AbstractRatio):
    """The ratio of two analytic distributions: the teacher has `log_density`, the student a `denoiser()` that has.

    Both are asked under the condition of each example. Under classifier-free guidance the ratio is that of the guided
    distribution, known up to a constant of the noise level.

    Example:
        >>> import genkit as gk
        >>> gk.distill.ExactRatio().exact
        True
    """

    exact: ClassVar[bool] = True
    # Densities are enough.
    needs_own: ClassVar[bool] = False

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> ScoreDifference:
        """See `AbstractRatio`; the score difference is the gradient of the ratio."""
        target = model.target
        own = own_denoiser(cast("KnowsItself", model.student))

        def log_ratio(x: Array, sigma: Array, cond: PyTree) -> Array:
            return log_density(target, x, sigma, cond) - cast("Analytic", own).log_density(x, sigma, cond)

        return ScoreDifference(*jax.vmap(jax.value_and_grad(log_ratio))(batch.x_t, batch.sigma, batch.cond))


class EmpiricalRatio(AbstractRatio):
    """The ratio of an analytic teacher to the smoothed empirical distribution of fresh draws: no critic at all.

    Its noise grows where the noise level is small against the spacing of the draws. Each example is compared with draws
    under its own condition.

    Args:
        num_samples: fresh draws of the student per update, for each condition.
        conditions: the conditions there are, leaves with leading axis `(m, ...)`: one set of draws for each. `None`
            draws anew for each example, which is dearer; `distill` fills in those of an array `cond` of at most 64
            different entries.

    Example:
        >>> import genkit as gk
        >>> gk.distill.EmpiricalRatio(256).num_samples
        256
    """

    num_samples: int = eqx.field(static=True, default=1024)
    conditions: PyTree = None

    def __check_init__(self):
        check_count("num_samples", self.num_samples, 2)

    # Only sampling noise remains.
    exact: ClassVar[bool] = True
    # Draws are enough.
    needs_own: ClassVar[bool] = False

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> ScoreDifference:
        """See `AbstractRatio`."""
        x = batch.x_t.reshape(batch.x_t.shape[0], -1)
        draws = self._draws(model, batch, key)
        per_example = jax.vmap(_smoothed, in_axes=(0, 0, None if batch.cond is None else 0))
        log_q, own = per_example(x, batch.sigma, draws)
        own = own.reshape(batch.x_t.shape)
        target = model.target
        log_p = jax.vmap(lambda x, s, c: log_density(target, x, s, c))(batch.x_t, batch.sigma, batch.cond)
        return ScoreDifference(log_p - log_q, score_gap(target, own, batch))

    def _draws(self, model: Distillation, batch: NoisyBatch, key: Key[Array, ""]) -> Array:
        """Draws of the student, flat: `(num_samples, d)`, or `(b, num_samples, d)` under the examples' conditions."""
        shape = model.latent_shape or batch.x.shape[1:]
        z = jr.normal(key, (self.num_samples, *shape), batch.x.dtype)

        # All conditions share their latents: one draw of the normals is as good, and cheaper, than one for each.
        def under(cond: PyTree) -> Array:
            return jax.vmap(lambda one: model.student(one, cond))(z).reshape(self.num_samples, -1)

        if batch.cond is None:
            return under(None)
        if self.conditions is None:
            return jax.vmap(under)(batch.cond)
        return jax.vmap(under)(self.conditions)[_positions(batch.cond, self.conditions)]


def _smoothed(x: Array, sigma: Array, draws: Array) -> tuple[Array, Array]:
    """Log-density and posterior mean of draws `(n, d)` under noise, at a point `(d,)`."""
    # The log-density through logarithms: far draws underflow together, and logsumexp keeps the nearest.
    squares = jnp.sum((x - draws) ** 2, -1) / sigma**2
    log_kernel = -0.5 * squares - x.shape[0] * (jnp.log(sigma) + 0.5 * np.log(2 * np.pi))
    return jax.nn.logsumexp(log_kernel) - np.log(draws.shape[0]), jax.nn.softmax(log_kernel) @ draws


def _positions(cond: PyTree, conditions: PyTree) -> Array:
    """For each condition of a batch, its place among the conditions there are."""
    matches = []
    for mine, every in zip(jax.tree.leaves(cond), jax.tree.leaves(conditions), strict=True):
        equal = mine[:, None] == every[None]
        matches.append(jnp.all(equal.reshape(*equal.shape[:2], -1), axis=-1))
    # The conditions there are were taken from the same array, so that one of them always matches.
    return jnp.argmax(functools.reduce(jnp.logical_and, matches), axis=1)


class DiscriminatorRatio(AbstractRatio):
    r"""The ratio learned by a discriminator, whose logit is $\log p/q$, beside a denoiser of the student.

    Trained by $E_p \operatorname{softplus}(-u) + E_q \operatorname{softplus}(u)$ at every noise level, with positives
    of the same, guided, teacher as the scores.

    Args:
        net: network `(x, sigma, cond) -> scalar`, such as `Discriminator`.
        smoothness: weight of the squared change of the logit under a small perturbation (approximate R1), not
            negative; `None` for none, which saves an evaluation of the network.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.distill.DiscriminatorRatio(gk.distill.Discriminator((2,), key=jax.random.key(0))).exact
        False

    Source: Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", NeurIPS 2024, section
    4.3; Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025, section 4.
    """

    net: Callable[..., Array] | None
    smoothness: Float[Array, ""] | None = eqx.field(converter=maybe_number, default=None)

    def __check_init__(self):
        if self.smoothness is not None:
            check_interval("smoothness", self.smoothness, 0)
        check(self.net is None or callable(self.net), "net", "a network (x, sigma, cond) -> log p/q", self.net)

    # Ratios are normalized.
    exact: ClassVar[bool] = False
    needs_own: ClassVar[bool] = True
    needs_discriminator: ClassVar[bool] = True

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> ScoreDifference:
        """See `AbstractRatio`."""
        logit = cast("Callable[..., Array]", model.discriminator)
        u = jax.vmap(lambda x, s, c: logit(x, s, c))(batch.x_t, batch.sigma, batch.cond)
        own = denoised(model.own, batch)
        gap = score_gap(model.target, own, batch)
        return ScoreDifference(u, gap, own)


class ScoreRatio(AbstractRatio):
    r"""The ratio from the two denoisers alone, by the heat equation: no discriminator, no density.

    At a fixed point $\partial_{\sigma^2} \log p_\sigma = \frac12(\nabla\cdot s + |s|^2)$, and the ratio tends to 1 as
    noise grows, so that
    $u(x, \sigma) = -\int_\sigma^{\infty} [\operatorname{tr}(J_p - J_q) + (D_p - D_q)\cdot(D_p + D_q - 2x)/\sigma'^2]
    \, d\log\sigma'$, with $J$ the Jacobian of a denoiser; beyond `sigma_max` the integrand falls as
    $1/\sigma'^2$ and is integrated exactly.

    Args:
        sigma_max: where the tail begins, several times the spread of the data.
        num_nodes: Gauss-Legendre nodes between the noise level and `sigma_max`.
        num_probes: random vectors for the trace; `None` for the exact trace, at one pass per coordinate.

    Example:
        >>> import genkit as gk
        >>> gk.distill.ScoreRatio(20.0).num_nodes
        12
    """

    sigma_max: Float[Array, ""] = eqx.field(converter=as_number)
    num_nodes: int = eqx.field(static=True, default=12)
    num_probes: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_positive("sigma_max", self.sigma_max)
        check_count("num_nodes", self.num_nodes, 2)

    # Ratios are normalized.
    exact: ClassVar[bool] = False
    needs_own: ClassVar[bool] = True

    def log_ratio(
        self,
        p: Callable[..., Array],
        q: Callable[..., Array],
        x: Shaped[ArrayLike, " *shape"],
        sigma: Float[ArrayLike, ""],
        cond: PyTree = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Array:
        """The log-ratio of two denoisers at one point.

        Args:
            p: denoiser of the teacher.
            q: denoiser of the student.
            x: noisy example.
            sigma: noise level, positive.
            cond: condition.
            key: typed PRNG key, for random probes.

        Returns:
            The log-ratio, a scalar.
        """
        x = as_number(x)
        sigma = jnp.asarray(sigma, x.dtype)
        nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
        # Beyond `sigma_max` the tail alone is left.
        span = jnp.maximum(jnp.log(self.sigma_max.astype(x.dtype) / sigma), 0)
        # Where the level is beyond `sigma_max` already, the span is zero and the tail begins at the level.
        top = sigma * jnp.exp(span)
        levels = sigma * jnp.exp(span * jnp.asarray((nodes + 1) / 2, x.dtype))
        if self.num_probes is None:
            probes = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
        else:
            if key is None:
                fail("key", "given, for random probes", "None")
            # Signs have the least variance of all probes of unit covariance.
            probes = jr.rademacher(key, (self.num_probes, *x.shape), x.dtype)
            probes = probes / np.sqrt(self.num_probes)

        def integrand(level: Array) -> Array:
            def both(y: Array) -> Array:
                return jnp.stack([p(y, level, cond), q(y, level, cond)])

            value = both(x)
            pushed = jax.vmap(lambda v: jax.jvp(both, (x,), (v,))[1])(probes)
            trace = jnp.sum((pushed[:, 0] - pushed[:, 1]) * probes)
            return trace + jnp.sum((value[0] - value[1]) * (value[0] + value[1] - 2 * x)) / level**2

        inner = jnp.sum(jnp.asarray(weights, x.dtype) * jax.vmap(integrand)(levels)) * span / 2
        return -(inner + integrand(top) / 2)

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> ScoreDifference:
        """See `AbstractRatio`."""
        p = model.target
        q = model.own
        keys = jr.split(key, batch.x_t.shape[0])
        u = jax.vmap(lambda x, s, c, k: self.log_ratio(p, q, x, s, c, key=k))(batch.x_t, batch.sigma, batch.cond, keys)
        own = denoised(q, batch)
        return ScoreDifference(u, score_gap(p, own, batch), own)


class NoRatio(AbstractRatio):
    """Scores without a ratio: enough for the reverse KL, whose weight is constant (DMD, VSD, Diff-Instruct).

    Example:
        >>> import genkit as gk
        >>> gk.distill.NoRatio().needs_own
        True
    """

    # There is nothing to normalize.
    exact: ClassVar[bool] = True
    needs_own: ClassVar[bool] = True

    def __call__(self, model: Distillation, batch: NoisyBatch, *, key: Key[Array, ""]) -> ScoreDifference:
        """See `AbstractRatio`; the log-ratios are zeros."""
        own = denoised(model.own, batch)
        gap = score_gap(model.target, own, batch)
        return ScoreDifference(jnp.zeros_like(batch.sigma), gap, own)
