"""Options of a light fit, and the recipe they amount to."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Key

from genkit._core._checks import check_choice, check_count, check_finite, check_positive
from genkit.bridge._batches import UnpairedBatches
from genkit.bridge._bridge import Bridge
from genkit.bridge._inputs import Scalar
from genkit.bridge._objectives import LightObjective
from genkit.bridge._optimizers import CosineRate, LightAdam
from genkit.bridge._polish import Polish
from genkit.bridge._potential import MixturePotential
from genkit.bridge._revival import Revival
from genkit.bridge._start import MAX_POINTS, balanced_start, published_start
from genkit.training import AbstractData, Objective, Phase, Recipe


KINDS = ("diag", "full", "lowrank", "iso")
# Nothing is revived after this share of the steps: what is revived must have time to settle.
_LAST_REVIVAL = 0.7
_START_HINT = (
    "The start could not be computed. With scale='full' or 'lowrank' that is the conditioning of the covariances: "
    "divide coordinates by their standard deviations where units differ, use float64, or scale='diag'."
)


class LightFit(eqx.Module):
    """Options of a fit of a light bridge; `fit_light` documents them.

    Args:
        num_components: K.
        scale: covariance family.
        num_steps: optimizer steps.
        init: start.
        optimizer: `adam` or `lbfgs`.
        polish: steps on all samples at the end.
        learning_rate: step of the log-scales, or `None` for the default of the start.
        batch_size: samples per step, or `None` for the default of the start.
        rank: columns of the low-rank family.
        start_scale: initial scale of the published start.
        guard: whether dead components are revived, or `None` for the default of the start.
        noise: standard deviation of noise on the samples, or `None`.
    """

    num_components: int
    scale: str = "diag"
    num_steps: int = 3000
    init: str = "balanced"
    optimizer: str = "adam"
    polish: int = 0
    learning_rate: Scalar | None = None
    batch_size: int | None = None
    rank: int = 8
    start_scale: Scalar = 0.1
    guard: bool | None = None
    noise: Scalar | None = None

    def __check_init__(self):
        check_count("num_components", self.num_components)
        check_choice("scale", self.scale, KINDS)
        check_choice("init", self.init, ("balanced", "published"))
        check_choice("optimizer", self.optimizer, ("adam", "lbfgs"))
        check_count("num_steps", self.num_steps)
        check_count("rank", self.rank)
        check_count("polish", self.polish, minimum=0)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        check_positive("start_scale", self.start_scale)
        for name, value in (("learning_rate", self.learning_rate), ("noise", self.noise)):
            if value is not None:
                check_positive(name, value)

    @property
    def is_published(self) -> bool:
        """True for the recipe of the paper: its start, coordinates and constant rate."""
        return self.init == "published"

    @property
    def is_guarded(self) -> bool:
        """True if dead components are revived."""
        if self.guard is None:
            return not self.is_published
        return self.guard

    @property
    def revival_cycles(self) -> range:
        """The numbers of steps after which components are examined."""
        # Not too often: what was revived needs steps before it can be judged again.
        period = max(25, self.num_steps // 40)
        return range(period, int(_LAST_REVIVAL * self.num_steps) + 1, period)

    def start(
        self, x0: Float[Array, " n d"], x1: Float[Array, " m d"], epsilon: Float[Array, ""], key: Key[Array, ""]
    ) -> MixturePotential:
        """The potential a fit starts from.

        Args:
            x0: some samples of the source.
            x1: some samples of the target.
            epsilon: variance of the reference at t = 1.
            key: typed PRNG key.

        Returns:
            The potential.
        """
        shared = {"num_components": self.num_components, "kind": self.scale, "rank": self.rank, "key": key}
        # The published start looks at the target alone.
        if self.is_published:
            return published_start(x1, epsilon, start_scale=jnp.asarray(self.start_scale, x1.dtype), **shared)
        return balanced_start(x0, x1, epsilon, **shared)


class LightTraining:
    """The recipe of a fit, with the hooks that keep what the report says.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1.
        options: the options of the fit.
        data: batches, by default of unpaired samples.
        objective: what is minimized, by default the likelihood.
    """

    def __init__(
        self,
        x0: Float[Array, " n d"],
        x1: Float[Array, " m d"],
        epsilon: Float[Array, ""],
        options: LightFit,
        *,
        data: Callable[[Key[Array, ""]], tuple[Array, ...]] | AbstractData | None = None,
        objective: Objective | None = None,
    ):
        # Fixed, so that the optimizer sees the points the start was made of.
        key_order0, key_order1 = jr.split(jr.key(0))
        self.few0 = jr.permutation(key_order0, x0)[:MAX_POINTS]
        self.few1 = jr.permutation(key_order1, x1)[:MAX_POINTS]
        self.epsilon = epsilon
        self.options = options
        self.unpaired = _unpaired(x0, x1, options)
        self.data = data or self.unpaired
        self.objective = objective or LightObjective()
        # The hooks outlive the recipe: the report asks them what they did.
        self.revival = Revival(self.few0, self.few1)
        steps = options.polish
        if options.optimizer == "lbfgs":
            steps = options.num_steps
        self.polish = Polish(self.unpaired, self.few0, steps)

    def recipe(self, *, name: str, with_source: bool) -> Recipe:
        """The recipe.

        Args:
            name: what the log calls it.
            with_source: whether the bridge carries samples of its source.

        Returns:
            The recipe.
        """
        options = self.options

        def build(key: Key[Array, ""]) -> Bridge:
            """The bridge before training."""
            start = options.start(self.few0, self.few1, self.epsilon, key)
            check_finite("start", start, _START_HINT)
            source = None
            if with_source:
                source = self.few0
            return Bridge(start, source=source)

        return Recipe(build, self.data, self._phase(), self._num_steps(), name=name)

    def _num_steps(self) -> int:
        if self.options.optimizer == "lbfgs":
            # The descent is what runs at the end; one step that moves nothing comes before.
            return 1
        return self.options.num_steps

    def _phase(self) -> Phase:
        if self.options.optimizer == "lbfgs":
            return Phase(self.objective, optax.set_to_zero(), after=self.polish)
        optimizer = self._adam()
        hooks = []
        cycles = []
        # Short fits have no cycle after which anything is examined.
        if self.options.is_guarded and len(self.options.revival_cycles):
            hooks.append(self.revival)
            cycles.append(self.options.revival_cycles)
        if self.options.polish:
            hooks.append(self.polish)
            cycles.append(None)
        if not hooks:
            return Phase(self.objective, optimizer.transformation())
        return Phase(
            self.objective, optimizer.transformation(), after=hooks, after_every=cycles, adapt=optimizer.forget
        )

    def _adam(self) -> LightAdam:
        dtype = self.few1.dtype
        if self.options.is_published:
            rate = CosineRate(_rate(self.options.learning_rate, 1e-3, dtype), None)
            return LightAdam(rate, None, self.epsilon, jnp.zeros(self.few1.shape[1], dtype))
        num_steps = jnp.asarray(self.options.num_steps, dtype)
        rate = CosineRate(_rate(self.options.learning_rate, 2e-2, dtype), num_steps)
        return LightAdam(rate, self.few0, self.epsilon, self.few1.mean(0))


def _rate(given: Scalar | None, default: float, dtype: jnp.dtype) -> Float[Array, ""]:
    if given is None:
        given = default
    return jnp.asarray(given, dtype)


def _unpaired(x0: Float[Array, " n d"], x1: Float[Array, " m d"], options: LightFit) -> UnpairedBatches:
    batch_size = options.batch_size
    if batch_size is None:
        # Batches of 128 are the published recipe; larger ones make up for the larger rate of the balanced start.
        batch_size = 128 if options.is_published else 1024
    noise = None
    if options.noise is not None:
        noise = jnp.asarray(options.noise, x1.dtype)
    return UnpairedBatches(x0, x1, batch_size, noise)
