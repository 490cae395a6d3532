"""Score matching without noise, bounds on the likelihood, and weights that are learned."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree

from genkit._core import Denoiser, Objective
from genkit._core._checks import (
    check,
    check_choice,
    check_count,
    check_finite,
    check_interval,
    check_positive,
    is_concrete,
)
from genkit._core._fields import as_number

from ._grids import check_grid
from ._losses import DenoisingScoreMatching, _drop, _regress, _split_batch, draw_evenly


class ImplicitScoreMatching(Objective):
    r"""Implicit score matching: $E[\tfrac12 |s(x)|^2 + \nabla\cdot s(x)]$, without noise and without a density.

    The model is a score `x -> s` of one example; the minimizer over all functions is $\nabla\log p$, where the value is
    $-\tfrac12 E|\nabla\log p|^2$. The divergence is exact, one derivative for each coordinate.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> batch = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> value, _ = gk.diffusion.ImplicitScoreMatching()(jax.tree_util.Partial(lambda x: -x), batch, key=jax.random.key(1))
        >>> round(float(value), 1)
        -0.5

    Source: Hyvarinen, "Estimation of Non-Normalized Statistical Models by Score Matching", JMLR 2005, theorem 1.
    """  # noqa: E501

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: score `x -> s` of one example.
            batch: examples `(b, *shape)`.
            key: typed PRNG key, unused.

        Returns:
            The loss, and `{"divergence": mean divergence}`.
        """
        del key
        x, _ = _split_batch(batch)

        def one(x: Array) -> tuple[Array, Array]:
            score, push = jax.linearize(model, x)
            units = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
            return 0.5 * jnp.sum(score**2), jnp.sum(jax.vmap(push)(units) * units)

        half, divergence = jax.vmap(one)(x)
        return jnp.mean(half + divergence), {"divergence": jnp.mean(divergence)}


class SlicedScoreMatching(Objective):
    r"""Sliced score matching: the divergence of `ImplicitScoreMatching` estimated along random directions.

    $$E_x E_v\left[\tfrac12 |s|^2 + v^\top \nabla s\, v\right] \ \text{(reduced variance)}\quad\text{or}\quad
      E_x E_v\left[\tfrac12 (v^\top s)^2 + v^\top \nabla s\, v\right].$$

    Args:
        num_slices: directions per example.
        reduced: take $|s|^2$ itself instead of its slices: less variance, and any law of directions will do.
        directions: `"rademacher"` or `"gaussian"`.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.SlicedScoreMatching(4).num_slices
        4

    Source: Song et al., "Sliced Score Matching: A Scalable Approach to Density and Score Estimation", UAI 2019,
    equations 7 and 8.
    """

    num_slices: int = eqx.field(static=True, default=1)
    reduced: bool = eqx.field(static=True, default=True)
    directions: str = eqx.field(static=True, default="rademacher")

    def __check_init__(self):
        check_count("num_slices", self.num_slices)
        check_choice("directions", self.directions, ("rademacher", "gaussian"))

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: score `x -> s` of one example.
            batch: examples `(b, *shape)`.
            key: typed PRNG key of the directions.

        Returns:
            The loss, and `{"divergence": mean estimate of the divergence}`.
        """
        x, _ = _split_batch(batch)
        draw = jr.rademacher if self.directions == "rademacher" else jr.normal
        slices = draw(key, (len(x), self.num_slices, *x.shape[1:]), x.dtype)

        def one(x: Array, slices: Array) -> tuple[Array, Array]:
            score, push = jax.linearize(model, x)
            bend = jax.vmap(lambda v: jnp.sum(v * push(v)))(slices)
            along = jax.vmap(lambda v: jnp.sum(v * score) ** 2)(slices)
            return 0.5 * (jnp.sum(score**2) if self.reduced else jnp.mean(along)), jnp.mean(bend)

        half, divergence = jax.vmap(one)(x, slices)
        return jnp.mean(half + divergence), {"divergence": jnp.mean(divergence)}


class LikelihoodBound(Objective):
    r"""Denoising score matching weighted to bound the negative log-likelihood, in nats per example.

    $$-E\log p(x_0) \le \int_{\sigma_{min}}^{\sigma_{max}} \frac{E|D(x_0 + \sigma\varepsilon) - x_0|^2}{\sigma^3}\, d\sigma
      + \frac{E|x_0|^2}{2\sigma_{max}^2} + \frac d2 (1 + \log 2\pi\sigma_{min}^2) .$$

    This is $\tfrac12 \int g^2 E|s - \nabla\log p(x_t \mid x_0)|^2 dt$ for every schedule that runs over these levels. Drawing
    times with density proportional to $g^2/\sigma_t^2$ is, for all of them, drawing $\log\sigma$ uniformly, and leaves
    the weight $1/\sigma^2$: least variance. The last terms do not depend on the model: the prior's share of the bound,
    and the density of $x_0$ given data with the smallest noise, for a decoder $N(x_{\sigma_{min}}, \sigma_{min}^2)$.

    Args:
        sigma_min: smallest noise level, positive.
        sigma_max: largest noise level.
        cond_dropout: probability of replacing the condition of an example by "no condition", in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> batch = jax.random.normal(jax.random.key(0), (64, 2))
        >>> value, aux = gk.diffusion.LikelihoodBound(0.01, 50.0)(law, batch, key=jax.random.key(1))
        >>> sorted(aux)
        ['decoder', 'diffusion', 'mse', 'prior']

    Source: Song et al., "Maximum Likelihood Training of Score-Based Diffusion Models", NeurIPS 2021, theorem 3 and
    section 5; Kingma et al., "Variational Diffusion Models", NeurIPS 2021, equation 15.
    """  # noqa: E501

    sigma_min: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_max: Float[Array, ""] = eqx.field(converter=as_number)
    cond_dropout: Float[Array, ""] = eqx.field(converter=as_number, default=0.0)

    def __check_init__(self):
        check_positive("sigma_min", self.sigma_min)
        check_finite("sigma_max", self.sigma_max)
        _check_order(self.sigma_min, self.sigma_max)
        check_interval("cond_dropout", self.cond_dropout, 0, 1)

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the bound on a batch.

        Args:
            model: denoiser `(x, sigma, cond) -> x0` of one example.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions.
            key: typed PRNG key.

        Returns:
            The bound in nats per example, and its parts: `diffusion` (the part that depends on the model), `prior`,
            `decoder`, and `mse`.
        """
        key_level, key_noise, key_cond = jr.split(key, 3)
        x0, cond = _split_batch(batch)
        low, high = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        sigma = jnp.exp(draw_evenly(dist.Uniform(low, high), x0.shape[0], key=key_level)).astype(x0.dtype)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        cond = _drop(cond, self.cond_dropout, key=key_cond)
        diffusion, aux = _regress(model, x0, noise, sigma, cond, (high - low) / sigma**2)
        prior, decoder = _fixed_terms(x0, self.sigma_min, self.sigma_max)
        return diffusion + prior + decoder, aux | {"diffusion": diffusion, "prior": prior, "decoder": decoder}


class VariationalBound(Objective):
    r"""The variational bound of the ancestral chain on a grid, in nats per example.

    $$-E\log p(x_0) \le \sum_i \tfrac12 (\sigma_{i+1}^{-2} - \sigma_i^{-2})\, E|D(x_i, \sigma_i) - x_0|^2
      + \frac{E|x_0|^2}{2\sigma_0^2} + \frac d2 (1 + \log 2\pi\sigma_n^2) ,$$

    for the descending levels $\sigma_0 > \dots > \sigma_n > 0$ of the grid. One step of the grid is drawn for each
    example. The finer the grid, the tighter: the limit is `LikelihoodBound`.

    Args:
        grid: descending noise levels, the last positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> bound = gk.diffusion.VariationalBound(gk.diffusion.log_uniform(100, 0.01, 50.0, final=None))
        >>> law = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> batch = jax.random.normal(jax.random.key(0), (64, 2))
        >>> bound(law, batch, key=jax.random.key(1))[0].shape
        ()

    Source: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, equations 11 and 13.
    """

    grid: Float[Array, " levels"]

    def __init__(self, grid: Float[ArrayLike, " levels"]):
        levels = check_grid(grid)
        check(levels[-1] > 0, "grid", "a grid that ends above zero", "a last level of 0", "Pass `final=None`.")
        self.grid = jnp.asarray(levels, jnp.result_type(float))

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the bound on a batch.

        Args:
            model: denoiser `(x, sigma, cond) -> x0` of one example.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions.
            key: typed PRNG key.

        Returns:
            The bound in nats per example, and its parts as for `LikelihoodBound`.
        """
        key_step, key_noise = jr.split(key)
        x0, cond = _split_batch(batch)
        steps = len(self.grid) - 1
        place = draw_evenly(dist.Uniform(0.0, 1.0), x0.shape[0], key=key_step)
        i = jnp.clip((place * steps).astype(int), 0, steps - 1)
        s, t = self.grid[i].astype(x0.dtype), self.grid[i + 1].astype(x0.dtype)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        # The difference of the ratios as a product, which does not cancel on fine grids.
        weight = 0.5 * steps * (s - t) * (s + t) / (s * t) ** 2
        diffusion, aux = _regress(model, x0, noise, s, cond, weight)
        prior, decoder = _fixed_terms(x0, self.grid[-1], self.grid[0])
        return diffusion + prior + decoder, aux | {"diffusion": diffusion, "prior": prior, "decoder": decoder}


class WithUncertainty(Denoiser):
    """A denoiser beside a learned function of the noise level, for `LearnedWeighting`; it denoises like the former.

    Args:
        denoiser: the denoiser.
        log_variance: `u(log_sigma / 4) -> number`, the logarithm of the error at a noise level; by default a small
            network on Fourier features is made with `key`.
        key: typed PRNG key, where `log_variance` is not given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> model = gk.diffusion.WithUncertainty(law, key=jax.random.key(0))
        >>> bool((model(jnp.ones(2), jnp.array(1.0)) == law(jnp.ones(2), jnp.array(1.0))).all())
        True

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, appendix B.2.
    """

    denoiser: Callable
    log_variance: Callable

    def __init__(self, denoiser: Callable, log_variance: Callable | None = None, *, key: Key[Array, ""] | None = None):
        check(callable(denoiser), "denoiser", "a callable (x, sigma, cond=None) -> x0", denoiser)
        if log_variance is None:
            check(key is not None, "key", "given where `log_variance` is not", "None")
            assert key is not None, "checked above"
            log_variance = _LevelNet(key=key)
        self.denoiser, self.log_variance = denoiser, log_variance

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the denoiser tells it."""
        return getattr(self.denoiser, "shape", None)

    @property
    def num_labels(self) -> int | None:
        """Number of classes, where the denoiser has them."""
        return getattr(self.denoiser, "num_labels", None)

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """Least and largest noise level that the denoiser knows, where it has limits."""
        return getattr(self.denoiser, "noise_range", None)

    @property
    def sigma_data(self) -> Float[Array, ""] | float:
        """Standard deviation of the data, as the denoiser says."""
        return getattr(self.denoiser, "sigma_data", 1.0)

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
    ) -> Inexact[Array, " *shape"]:
        """Estimate the clean example; see `Denoiser`."""
        return self.denoiser(x, sigma, cond)


class LearnedWeighting(Objective):
    r"""Denoising score matching whose error at each noise level is divided by a learned estimate of itself.

    $$L = E\left[\frac{w(\sigma)\, |D - x_0|^2}{d\; e^{u(\sigma)}} + u(\sigma)\right],$$

    minimized over $u$ by the logarithm of the weighted error per coordinate: every noise level then pulls on the model
    alike. The model is a `WithUncertainty`.

    Args:
        base: the objective whose law of noise levels, weight and dropout of conditions are taken.

    Example:
        >>> import genkit as gk
        >>> objective = gk.diffusion.LearnedWeighting(gk.diffusion.DenoisingScoreMatching(cond_dropout=0.1))
        >>> round(float(objective.base.cond_dropout), 2)
        0.1

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, equation 21.
    """

    base: DenoisingScoreMatching = eqx.field(default_factory=DenoisingScoreMatching)

    def __check_init__(self):
        check(
            isinstance(self.base, DenoisingScoreMatching), "base", "a DenoisingScoreMatching", type(self.base).__name__
        )

    def __call__(
        self, model: WithUncertainty, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: a `WithUncertainty`.
            batch: clean examples `(b, *shape)`, or a pair of them and their conditions.
            key: typed PRNG key.

        Returns:
            The loss, and `{"mse": ...}` as the base reports it.
        """
        check(isinstance(model, WithUncertainty), "model", "a WithUncertainty", type(model).__name__)
        key_level, key_noise, key_cond = jr.split(key, 3)
        x0, cond = _split_batch(batch)
        sigma = draw_evenly(self.base.noise_law, x0.shape[0], key=key_level).astype(x0.dtype)
        weight = self.base.level_weight(model)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        cond = _drop(cond, self.base.cond_dropout, key=key_cond)
        level = jax.vmap(model.log_variance)(jnp.log(sigma) / 4)
        share = jax.vmap(weight)(sigma) * jnp.exp(-level) / x0[0].size
        value, aux = _regress(model, x0, noise, sigma, cond, share)
        return value + jnp.mean(level), aux


class _LevelNet(eqx.Module):
    """A linear read-out of fixed Fourier features of the noise level."""

    frequencies: Float[Array, " k"] = eqx.field(metadata={"genkit_frozen": True})
    phases: Float[Array, " k"] = eqx.field(metadata={"genkit_frozen": True})
    weights: Float[Array, " k"]
    bias: Float[Array, ""]

    def __init__(self, width: int = 64, *, key: Key[Array, ""]):
        key_frequency, key_phase = jr.split(key)
        self.frequencies = 2 * jnp.pi * jr.normal(key_frequency, (width,))
        self.phases = 2 * jnp.pi * jr.uniform(key_phase, (width,))
        self.weights, self.bias = jnp.zeros(width), jnp.zeros(())

    def __call__(self, level: Float[Array, ""]) -> Float[Array, ""]:
        features = jnp.sqrt(2 / len(self.weights)) * jnp.cos(self.frequencies * level + self.phases)
        return jnp.sum(self.weights * features) + self.bias


def _fixed_terms(x0: Array, sigma_min: Any, sigma_max: Any) -> tuple[Array, Array]:
    """The prior's divergence, and minus the mean log-density of the decoder, per example."""
    size = x0[0].size
    prior = 0.5 * jnp.mean(jnp.sum(x0**2, tuple(range(1, x0.ndim)))) / sigma_max**2
    return prior, 0.5 * size * (1 + jnp.log(2 * jnp.pi * jnp.square(sigma_min)))


def _check_order(sigma_min: Any, sigma_max: Any) -> None:
    if is_concrete(sigma_min) and is_concrete(sigma_max):
        low, high = float(sigma_min), float(sigma_max)
        check(low < high, "sigma_min", "smaller than `sigma_max`", f"{low:g} >= {high:g}")
