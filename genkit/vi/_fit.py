"""Variational inference as a method for `gk.infer`."""

import functools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import numpyro
import optax
from jaxtyping import Array, Float, Key, PyTree
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform

from genkit._core._checks import NonFiniteError, check, check_choice, check_count, check_interval
from genkit.inference import (
    ConstantProblem,
    Measure,
    Posterior,
    Problem,
    TracedProblem,
    as_compiled_argument,
    discrete_sites,
    improper_start,
)
from genkit.training import Objective, Phase, Recipe, fit
from genkit.vi._discrete._marginalize import marginalize
from genkit.vi._guides._automatic import flow_guide, full_rank, low_rank, mean_field
from genkit.vi._objectives._bounds import elbo
from genkit.vi._objectives._maximize import average
from genkit.vi._programs._expectation import expectation
from genkit.vi._programs._program import Program, evaluate, program


_GUIDES = {"mean_field": mean_field, "full_rank": full_rank, "low_rank": low_rank}


class Plateau(eqx.Module):
    r"""A stopping rule for noisy objectives.

    The last `2 * window` values are split in two halves; the rule holds when the second half's mean exceeds the first's
    by less than `z` standard errors of the difference, `patience` times in a row.

    Args:
        window: steps per half.
        z: standard errors an improvement must exceed to count.
        patience: how often in a row.

    Example:
        >>> import numpy as np
        >>> from genkit import vi
        >>> vi.Plateau(window=2).flat(np.array([0.0, 1.0, 0.0, 1.0]))
        True
    """

    window: int = eqx.field(static=True, default=500)
    z: float = eqx.field(static=True, default=1.0)
    patience: int = eqx.field(static=True, default=2)

    def __check_init__(self) -> None:
        check_count("window", self.window, 2)
        check_count("patience", self.patience)
        check_interval("z", self.z, 0)

    def flat(self, values: np.ndarray) -> bool:
        """Whether the last two windows show no improvement.

        Args:
            values: objective values so far, to be maximized.

        Returns:
            True when the improvement is within the noise.
        """
        if len(values) < 2 * self.window:
            return False
        first = values[-2 * self.window : -self.window]
        second = values[-self.window :]
        error = math.sqrt((first.var() + second.var()) / self.window)
        return bool(second.mean() - first.mean() < self.z * error)


class Fit(eqx.Module):
    """Variational inference: fit a guide, then draw from it.

    `numpyro.param` sites of the model are trained with the guide and returned in `Posterior.params`. The evidence
    bracket of the result holds for the region the guide covers: a mode that the guide misses is in neither bound.

    Args:
        guide: "mean_field", "full_rank", "low_rank" or "flow"; or a `Measure`, or an `eqx.Module` that is a numpyro
            guide with its parameters as leaves (called with the problem's arguments).
        objective: a function `(p, q) -> scalar` to maximize, such as `elbo` or a partial `iwelbo`.
        optimizer: an optax optimizer; default Adam at 0.05 (0.005 for the flow), decaying to a hundredth along a
            cosine, gradients clipped at norm 10.
        num_steps: optimization steps.
        num_samples: draws of the fitted guide.
        num_particles: independent estimates averaged per step.
        stop: a `Plateau` rule, or None to run all steps.
        marginalize: with a named guide, sum discrete latent sites out (`gk.vi.marginalize`); False refuses them.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> method = gk.vi.Fit("full_rank", num_steps=100, num_samples=50)
        >>> gk.infer(gk.Problem(model, (1.0,)), method, key=jax.random.key(0)).samples["x"].shape
        (50,)
    """

    guide: str | Measure | Callable = "mean_field"
    objective: Callable = eqx.field(static=True, default=elbo)
    optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)
    num_steps: int = eqx.field(static=True, default=2000)
    num_samples: int = eqx.field(static=True, default=1000)
    num_particles: int = eqx.field(static=True, default=1, kw_only=True)
    stop: Plateau | None = eqx.field(default=None, kw_only=True)
    marginalize: bool = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self) -> None:
        if isinstance(self.guide, str):
            check_choice("guide", self.guide, (*_GUIDES, "flow"))
        else:
            check(
                callable(self.guide) or isinstance(self.guide, Measure),
                "guide",
                "a name, Measure or module",
                self.guide,
            )
        check_count("num_steps", self.num_steps)
        check_count("num_samples", self.num_samples)
        check_count("num_particles", self.num_particles)

    def prepare(self, problem: Problem) -> Problem:
        """Sum out the discrete latent sites where the guide is a named one, which has none.

        Args:
            problem: model and data.

        Returns:
            The problem without them, or the same problem if there are none.
        """
        if not self.marginalize or not isinstance(self.guide, str) or not discrete_sites(problem):
            return problem
        return Problem(marginalize(problem.model), problem.args, problem.kwargs, name=problem.name)

    def run(self, problem: Problem, *, key: Key[Array, ""]) -> Posterior:
        """Fit the guide to the posterior and draw from it.

        Args:
            problem: model and data.
            key: typed PRNG key.

        Returns:
            The posterior, with `log_q`, the course of the objective, the fitted guide and parameters.

        Raises:
            NonFiniteError: if the optimization leaves the finite numbers, naming the site where it can.
        """
        problem = self.prepare(problem)
        key_build, key_train, key_draw = jr.split(key, 3)
        params, transforms = _model_params(problem)
        start = Trained(self._build(problem, key_build), params)
        if not any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(start)):
            check(
                False,
                "guide",
                "a module or measure with at least one floating array to train",
                self.guide,
                "Make it an `eqx.Module`, or take a guide with `numpyro.param` sites over with `gk.vi.from_numpyro`.",
            )
        data = as_compiled_argument(problem)
        loss = GuideObjective(data, transforms, self.objective, self.num_particles)
        trained, history = self._train(loss, start, key_train)
        keys = jr.split(key_draw, self.num_samples)
        values, log_q = jax.device_get(_draw(data, trained.guide, keys))
        name = getattr(self.objective, "__name__", type(self.objective).__name__)  # functions have names, partials not
        return Posterior(
            values,
            None,
            ("draw",),
            log_q=log_q,
            optimization={"objective": history},
            guide=trained.guide,
            params=jax.device_get(_constrained(trained.params, transforms)),
            attrs={"method": "variational inference", "objective": name, "steps": len(history)},
        )

    def _build(self, problem: Problem, key: Key[Array, ""]) -> Measure | Callable:
        """The guide to start from."""
        if not isinstance(self.guide, str):
            return self.guide
        if self.guide == "flow":
            return flow_guide(problem.model, *problem.args, key=key, **problem.kwargs)
        return _GUIDES[self.guide](problem.model, *problem.args, **problem.kwargs)

    def _train(
        self, loss: "GuideObjective", start: "Trained", key: Key[Array, ""]
    ) -> tuple["Trained", Float[np.ndarray, " step"]]:
        """Maximize the objective with the library's one training loop."""
        optimizer = self.optimizer
        if optimizer is None:
            # Networks need smaller steps than locations and scales.
            rate = 0.005 if self.guide == "flow" else 0.05
            optimizer = _default_optimizer(rate, self.num_steps)
        watch = None
        log_every = 200
        if self.stop is not None:
            watch = _Watch(self.stop)
            log_every = watch.every
        recipe = Recipe(
            lambda key: start,
            jax.tree_util.Partial(_no_batch),
            Phase(loss, optimizer),
            self.num_steps,
            log_every=min(self.num_steps, log_every),
        )
        try:
            fitted = fit(recipe, key=key, on_step=watch)
        except NonFiniteError as error:
            seen = getattr(error, "fitted", None)  # set by `fit`, which raises this error for other reasons too
            if seen is not None:
                _name_the_culprit(loss, seen.model, key, error)
            raise
        return fitted.model, -np.asarray(fitted.log["loss"], np.float64)


class Trained(eqx.Module):
    """Everything a fit trains.

    Args:
        guide: the guide.
        params: the model's `numpyro.param` sites, unconstrained.
    """

    guide: Measure | Callable
    params: dict[str, PyTree]


class GuideObjective(Objective):
    """The negative of an objective `(p, q) -> scalar` for one model and its data.

    The data are leaves, so that fits to other data of equal shape share one compiled program.

    Args:
        data: model and data.
        transforms: maps from the reals to the constraints of the model's parameters.
        objective: the function, run under `E`.
        num_particles: independent estimates averaged.
    """

    data: TracedProblem | ConstantProblem
    transforms: dict[str, Transform]
    objective: Callable = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)

    def measures(self, trained: Trained) -> tuple[Program, Measure]:
        """Model and guide.

        Args:
            trained: guide and parameters.

        Returns:
            The two measures.
        """
        problem = self.data.problem
        params = _constrained(trained.params, jax.lax.stop_gradient(self.transforms))
        model = program(problem.model, params)(*problem.args, **problem.kwargs)
        return model, as_guide(trained.guide, problem)

    def __call__(self, model: PyTree, batch: PyTree, *, key: Key[Array, ""]) -> tuple[Array, dict[str, PyTree]]:
        p, q = self.measures(model)

        def estimate(key: Key[Array, ""]) -> Float[Array, ""]:
            return expectation(lambda: self.objective(p, q), key)[0]

        return -average(estimate, key, self.num_particles), {}


@functools.lru_cache(maxsize=32)
def _default_optimizer(rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam along a cosine; cached, because two optimizers are equal only if they are one object."""
    schedule = optax.cosine_decay_schedule(rate, num_steps, 0.01)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


def _model_params(problem: Problem) -> tuple[dict[str, PyTree], dict[str, Transform]]:
    """The `numpyro.param` sites of a model in unconstrained coordinates, and the maps to their constraints."""
    model = numpyro.handlers.substitute(problem.model, substitute_fn=improper_start)
    with numpyro.handlers.block(), jax.debug_key_reuse(False):  # numpyro's handlers split one key several times
        seeded = numpyro.handlers.seed(model, jr.key(0))
        trace = numpyro.handlers.trace(seeded).get_trace(*problem.args, **problem.kwargs)
    params = {}
    transforms = {}
    for name, site in trace.items():
        if site["type"] == "param":
            transforms[name] = biject_to(site["kwargs"].get("constraint", constraints.real))
            params[name] = jax.tree.map(transforms[name]._inverse, jax.tree.map(jax.numpy.asarray, site["value"]))
    return params, transforms


def _constrained(params: dict[str, PyTree], transforms: dict[str, Transform]) -> dict[str, PyTree]:
    return {name: jax.tree.map(transforms[name], value) for name, value in params.items()}


class _Watch:
    """The stopping rule, asked twice per window while training goes on."""

    def __init__(self, rule: Plateau):
        self.rule = rule
        self.every = max(2, rule.window // 2)
        self.values: list[float] = []
        self.times_flat = 0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.values.append(-metrics["loss"])
        if (step + 1) % self.every:
            return
        if self.rule.flat(np.array(self.values)):
            self.times_flat += 1
        else:
            self.times_flat = 0
        if self.times_flat >= self.rule.patience:
            raise StopIteration


def _no_batch(key: Key[Array, ""]) -> tuple[()]:
    """Inference sees all its data at every step."""
    del key
    return ()


def as_guide(guide: Measure | Callable, problem: Problem) -> Measure:
    """A guide as a measure.

    Args:
        guide: a measure, or a module that is a numpyro guide.
        problem: the arguments a module is called with.

    Returns:
        The measure itself; of a module, its program of the problem's arguments.
    """
    if isinstance(guide, Measure):
        return guide
    return program(guide)(*problem.args, **problem.kwargs)


@eqx.filter_jit
def _draw(
    data: TracedProblem | ConstantProblem, guide: Measure | Callable, keys: Key[Array, " n"]
) -> tuple[dict[str, PyTree], Float[Array, " n"]]:
    """Draws of a guide and their log-densities."""
    q = as_guide(guide, data.problem)

    def one(key: Key[Array, ""]) -> tuple[dict[str, PyTree], Float[Array, ""]]:
        key_value, _ = jr.split(key)
        return q.sample(key=key_value)

    return jax.vmap(one)(keys)


def _name_the_culprit(loss: GuideObjective, trained: Trained, key: Key[Array, ""], error: Exception) -> None:
    """After a training went non-finite: look for the site whose log-density is NaN, and say so."""
    model, guide = loss.measures(trained)
    for index in range(16):
        value, _ = guide.sample(key=jr.fold_in(key, index))
        try:
            evaluate(model, value)
        except NonFiniteError as found:
            raise NonFiniteError(f"{found} (after: {error})") from error
