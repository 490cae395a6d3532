"""Populations: Feynman-Kac steering by a reward, and exact products of conditional distributions by weights."""

from collections.abc import Callable, Hashable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from genkit._core._checks import check, check_count, check_interval, describe, fail
from genkit._core._fields import as_number
from genkit._core._known import is_known
from genkit._core._resampling import effective_sample_size, systematic_resample
from genkit.guidance._linear import as_condition
from genkit.guidance._types import Combined, Needs
from genkit.guidance._vectors import inner
from genkit.guidance._weights import AbstractWeight, Scale, as_weight
from genkit.sampling import Context, Guidance, Hooks, Population, Prediction, Slot, StepEvent, Table


_REPORTED = ("log_evidence", "log_weights", "ess")


class Particles(eqx.Module):
    """Resampling of the particles of one population, and the weights and evidence that they carry."""

    ess: Float[Array, ""] = eqx.field(converter=as_number)
    every: Int[Array, ""] = eqx.field(converter=jnp.asarray)
    num_particles: int = eqx.field(static=True)
    resample_last: bool = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Refuse numbers out of range."""
        check_count("num_particles", self.num_particles, 2)
        check_interval("ess", self.ess, 0, 1)
        check_interval("every", self.every, 1)

    def init(self, x: Float[Array, " k *shape"]) -> dict[str, Array]:
        """Equal weights before the first step."""
        zero = jnp.zeros((), x.dtype)
        return {"log_weights": jnp.zeros(self.num_particles, x.dtype), "log_evidence": zero, "ess": zero}

    def update(
        self, increments: Float[Array, " k"], carry: dict[str, Array], ctx: Context
    ) -> tuple[Int[Array, " k"], dict[str, Array]]:
        """Weigh the particles, and resample where their effective number is low or the draw ends."""
        log_weights = carry["log_weights"] + increments.astype(carry["log_weights"].dtype)
        size = effective_sample_size(log_weights)
        is_last = ctx.step == ctx.num_steps - 1
        is_due = ((ctx.step + 1) % self.every == 0) & (size < self.ess * self.num_particles)
        # A population whose weights have all died stays as it is; its evidence says so.
        is_alive = jnp.isfinite(jnp.max(log_weights))
        is_due = jnp.where(is_last, self.resample_last, is_due) & is_alive
        safe = jnp.where(is_alive, log_weights, 0)
        ancestors = jnp.where(is_due, systematic_resample(safe, key=ctx.key), jnp.arange(self.num_particles))
        # The evidence is the product of the mean weights between resamplings, each taken once: when the weights are
        # reset, and at the end.
        log_mean = jax.nn.logsumexp(log_weights) - np.log(self.num_particles)
        return ancestors, {
            "log_weights": jnp.where(is_due, 0, log_weights),
            "log_evidence": carry["log_evidence"] + jnp.where(is_due | is_last, log_mean, 0),
            "ess": jnp.where(is_last, size, carry["ess"]),
        }


class Steer(Population):
    """Particles weighed by the gain of a reward of the prediction from step to step."""

    reward: Callable
    particles: Particles

    def __init__(self, reward: Callable, particles: Particles):
        self.reward = reward
        self.particles = particles

    @property
    def num_particles(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Particles per population."""
        return self.particles.num_particles

    def init(self, x: Float[Array, " k *shape"]) -> PyTree[Array]:
        return self.particles.init(x) | {"reward": jnp.zeros(len(x), x.dtype), "failed": jnp.zeros((), jnp.int32)}

    def update(self, event: StepEvent, carry: PyTree, ctx: Context) -> tuple[Int[Array, " k"], PyTree]:
        # After a last step to zero noise the draw itself is known, and no prediction of it is needed.
        is_last = ctx.step == ctx.num_steps - 1
        reward = jax.vmap(self.reward)(jnp.where(is_last & (ctx.sigma == 0), event.x, event.x0))
        if reward.shape != (len(event.x),):
            fail("reward", "a function that returns a scalar", f"shape {reward.shape[1:]}")
        is_nan = jnp.isnan(reward)
        reward = jnp.where(is_nan, -jnp.inf, reward).astype(carry["reward"].dtype)
        # A particle that was lost stays lost until it is resampled: -inf minus -inf is no gain.
        gain = jnp.where(jnp.isneginf(reward), -jnp.inf, reward - carry["reward"])
        ancestors, new = self.particles.update(gain, carry, ctx)
        kept = jnp.where(jnp.isneginf(reward), 0, reward)[ancestors]
        return ancestors, new | {"reward": kept, "failed": carry["failed"] + jnp.sum(is_nan, dtype=jnp.int32)}

    def report(self, carry: PyTree) -> dict[str, Array]:
        return {name: carry[name] for name in _REPORTED} | {"reward_failed": carry["failed"]}

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        check_reverse_diffusion("steer", table)


def steer(
    reward: Callable,
    num_particles: int,
    ess: Float[ArrayLike, ""] | float = 0.5,
    every: int = 1,
    *,
    resample_last: bool = True,
) -> Steer:
    r"""Feynman-Kac steering: particles weighed by a reward of the predicted data, and resampled; no gradients.

    Blocks of `num_particles` consecutive draws are one population. After step $t$ its particles are weighed by
    $e^{r(D_t) - r(D_{t-1})}$, so that the weights of a path multiply to $e^{r(x)}$ of the draw $x$: with many particles the
    draws follow $p(x)\, e^{r(x)}$. With few they do not quite: the bias of the order of one over their number is real.

    Args:
        reward: `x0 -> scalar`, its weight included; NaN removes the particle.
        num_particles: particles per population, at least 2; the number of draws is a multiple of it.
        ess: resample when the effective number of particles falls below this fraction, from 0 (never) to 1.
        every: steps between two looks at it.
        resample_last: resample after the last step, so that the draws count equally; otherwise weigh them by
            `info["log_weights"]`.

    Returns:
        A population; pass it as `guidance`, alone or in a tuple, with a sampler that adds noise. `Draws.info` holds, per
        population, `log_evidence` (an estimate of $\log E[e^{r}]$, unbiased before the logarithm), `log_weights`, `ess`
        of the last step, and `reward_failed`, the number of rewards that were NaN.

    Raises:
        TypeError: if the reward cannot be called.
        ValueError: for numbers out of range; when drawing, with a deterministic sampler or a reward that is no scalar.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.GaussianDenoiser(jnp.zeros(1), jnp.array(1.0))
        >>> table = gk.diffusion.ancestral(gk.diffusion.karras(50, 0.01, 10.0))
        >>> steering = gk.guidance.steer(lambda x0: 2.0 * x0[0], num_particles=64)
        >>> draws = gk.sample(table, law, 128, guidance=steering, key=jax.random.key(0))
        >>> draws.info["log_evidence"].shape
        (2,)

    Source: Singhal et al., "A General Framework for Inference-time Scaling and Steering of Diffusion Models", ICML 2025,
    the potential called "difference".
    """  # noqa: E501
    if not callable(reward):
        raise TypeError(f"`reward` must be a callable x0 -> scalar; got {describe(reward)}.")
    return Steer(reward, Particles(ess, every, num_particles, resample_last))


class Product(Guidance):
    """Drift of a product of conditional distributions, and rate of its weights."""

    predictions: tuple[Slot, ...]
    weights: tuple[AbstractWeight, ...]

    def slots(self) -> tuple[Slot, ...]:
        return self.predictions

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        return {slot.name: w(ctx) != 0 for slot, w in zip(self.predictions, self.weights, strict=True)}

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        dtype = ctx.x.dtype
        weights = [weight(ctx) for weight in self.weights]
        total = jnp.zeros_like(ctx.x)
        squares = jnp.zeros((), dtype)
        for slot, weight in zip(self.predictions, weights, strict=True):
            pred = preds[slot.name]
            # sigma^2 times the score, by Tweedie; of a factor that was not evaluated the weight is zero.
            shift = jnp.where(pred.present, pred.x0 - ctx.x, 0)
            total = total + weight.astype(dtype) * shift
            squares = squares + weight.astype(dtype) * inner(shift, shift).astype(dtype)
        # || sum_i w_i s_i ||^2 - sum_i w_i || s_i ||^2
        rate = (inner(total, total).astype(dtype) - squares) / ctx.sigma**4
        excess = sum(weights, jnp.zeros(())) - 1
        return ctx.x + total, carry, {"fkc_rate": rate, "fkc_excess": excess.astype(dtype)}


class ProductWeights(Population):
    """Feynman-Kac weights that make the draws of a `Product` exact."""

    particles: Particles

    def __init__(self, particles: Particles):
        self.particles = particles

    @property
    def num_particles(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Particles per population."""
        return self.particles.num_particles

    def init(self, x: Float[Array, " k *shape"]) -> PyTree[Array]:
        return self.particles.init(x)

    def update(self, event: StepEvent, carry: PyTree, ctx: Context) -> tuple[Int[Array, " k"], PyTree]:
        # d log W = rate / 2 * d sigma^2, by Euler over the step as the states are.
        gain = event.aux["fkc_rate"] * (ctx.sigma_start**2 - ctx.sigma**2) / 2
        # States start from N(0, sigma^2 I), while the product of the noised factors is that density to the power of the
        # sum of the weights: its excess over 1 is a weight of the start, counted in the first step.
        level = ctx.sigma_start
        square = jax.vmap(inner)(event.x_prev, event.x_prev) / level**2
        log_density = -(square + event.x_prev[0].size * jnp.log(2 * jnp.pi * level**2)) / 2
        start = event.aux["fkc_excess"] * log_density
        return self.particles.update(gain + jnp.where(ctx.step == 0, start, 0), carry, ctx)

    def report(self, carry: PyTree) -> dict[str, Array]:
        return {name: carry[name] for name in _REPORTED}

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        check_reverse_diffusion("fkc", table)


def fkc(
    weights: Mapping[Hashable, Scale],
    num_particles: int,
    *,
    ess: Float[ArrayLike, ""] | float = 0.5,
    every: int = 1,
    resample_last: bool = True,
) -> Hooks:
    r"""Exact draws from a product of conditional distributions, $\prod_i p_i(x)^{w_i}$, by Feynman-Kac weights.

    Linear guidance with these weights does not draw from the product, because noising does not commute with
    multiplication. Here particles follow the reverse diffusion with the score $\sum_i w_i s_i$ and are weighed by

    $$d \log W = \tfrac12 \Big( \big\| \textstyle\sum_i w_i s_i \big\|^2 - \sum_i w_i \|s_i\|^2 \Big)\, d\sigma^2,$$

    which makes them exact in the limit of many particles and small steps. The weights need not sum to one: `{3: 2.0}` is
    the square of a density, `{3: 1.0, 5: 1.0, None: -1.0}` a product of experts over a prior.

    Args:
        weights: condition to weight $w_i$; the key `None` stands for no condition, `"given"` for that of the draw.
            `{"given": w, None: 1 - w}` is what `cfg(w)` is often said to draw from.
        num_particles: particles per population, at least 2; the number of draws is a multiple of it.
        ess: resample when the effective number of particles falls below this fraction, from 0 (never) to 1.
        every: steps between two looks at it.
        resample_last: resample after the last step; otherwise weigh the draws by `info["log_weights"]`.

    Returns:
        Hooks to pass as `guidance`, with `ancestral(grid)` or `euler_maruyama(grid)`. `Draws.info` holds, per population,
        `log_evidence` (an estimate of $\log \int \prod_i p_i^{w_i}$), `log_weights` and `ess` of the last step.

    Raises:
        ValueError: for no weights or numbers out of range; when drawing, with a sampler of another kind.

    Example:
        >>> import genkit as gk
        >>> hooks = gk.guidance.fkc({"given": 2.0, None: -1.0}, num_particles=256)

    Source: Skreta et al., "Feynman-Kac Correctors in Diffusion", ICML 2025; the rule for any weights is derived here.
    """  # noqa: E501
    check(len(weights) > 0, "weights", "a dict of at least one condition", "an empty one")
    slots = tuple(_factor(cond) for cond in weights)
    product = Product(slots, tuple(as_weight(w) for w in weights.values()))
    return Hooks(product, (), ProductWeights(Particles(ess, every, num_particles, resample_last)))


def _factor(cond: Hashable) -> Slot:
    """The evaluation of a factor of the product."""
    if cond is None:
        return Slot("uncond", cond="null")
    if isinstance(cond, str):
        if cond != "given":
            fail("weights", "a dict over conditions, None and 'given'", repr(cond))
        return Slot("cond")
    return Slot(f"cond_{cond}", cond=as_condition(cond))


def check_reverse_diffusion(name: str, table: Table) -> None:
    """Refuse tables whose steps are not first-order steps of the reverse diffusion.

    A step from level s to level t is x' = k x + (1 - k) D + f z. With the coefficients of the exact kernel
    k = (t / s)^2, with frozen ones (Euler-Maruyama) k = 2 t / s - 1 and f^2 = 2 s (s - t).
    """
    if not is_known(table):
        return
    rows = np.asarray(table.evaluate)
    s = np.asarray(table.sigma_start, np.float64)[rows]
    t = np.asarray(table.sigma_next, np.float64)[rows]
    kept = np.asarray(table.a, np.float64)[rows]
    variance = np.asarray(table.c, np.float64)[rows] ** 2
    # The variance of the exact kernel depends on the data: it lies between the posterior variance of data that are one
    # point (ancestral) and the variance of the reverse diffusion.
    least = t**2 * (1 - (t / s) ** 2)
    most = s**2 - t**2
    # Tables are built in float64, yet may have passed through float32: hence the slack.
    is_noisy = (variance >= least * (1 - 1e-4)) & (variance <= most * (1 + 1e-4))
    is_exact = is_noisy & np.isclose(kept, (t / s) ** 2, rtol=1e-4, atol=1e-6)
    is_frozen = np.isclose(variance, 2 * s * (s - t), rtol=1e-4) & np.isclose(kept, 2 * t / s - 1, rtol=1e-4, atol=1e-6)
    # One evaluation in each step: correctors and multistep rows are of another kind.
    if len(s) == table.num_steps and np.all(is_exact | is_frozen):
        return
    fail(
        "sampler",
        f"first-order steps of the reverse diffusion with `{name}`, whose particles part through its noise",
        "a table of another kind",
        "Use `gk.diffusion.ancestral(grid)` or `gk.diffusion.euler_maruyama(grid)`.",
    )
