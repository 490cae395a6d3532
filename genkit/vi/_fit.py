"""Variational inference as a method for `gk.infer`."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Key

from .._core._checks import NonFiniteError, check, check_choice, check_count, check_interval
from .._core._fit import fit
from .._core._infer import Posterior
from .._core._measure import Measure
from .._core._objective import Phase, Problem, Recipe
from ._expectation import expectation
from ._guides import flow_guide, full_rank, low_rank, mean_field
from ._maximize import average
from ._objectives import elbo
from ._posterior import describe_draw, name_the_culprit, observed_values
from ._program import Program, program


_GUIDES = {"meanfield": mean_field, "fullrank": full_rank, "lowrank": low_rank}


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
        """Validate."""
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
        first, second = values[-2 * self.window : -self.window], values[-self.window :]
        error = math.sqrt((first.var() + second.var()) / self.window)
        return bool(second.mean() - first.mean() < self.z * error)


class Fit(eqx.Module):
    """Variational inference: fit a guide, then draw from it.

    Args:
        guide: "meanfield", "fullrank", "lowrank" or "flow"; or a `Measure`, or an `eqx.Module` that is a numpyro guide
            with its parameters as leaves (called with the problem's arguments).
        objective: a function `(p, q) -> scalar` to maximize, such as `elbo` or a partial `iwelbo`.
        optimizer: an optax optimizer; default Adam at 0.05 (0.005 for the flow), decaying to a hundredth along a
            cosine, gradients clipped at norm 10.
        num_steps: optimization steps.
        num_samples: draws of the fitted guide.
        num_particles: independent estimates averaged per step.
        stop: a `Plateau` rule, or None to run all steps.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> method = gk.vi.Fit("fullrank", num_steps=100, num_samples=50)
        >>> gk.infer(gk.Problem(model, (1.0,)), method, key=jax.random.key(0)).samples["x"].shape
        (50,)
    """

    guide: Any = "meanfield"
    objective: Callable = eqx.field(static=True, default=elbo)
    optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)
    num_steps: int = eqx.field(static=True, default=2000)
    num_samples: int = eqx.field(static=True, default=1000)
    num_particles: int = eqx.field(static=True, default=1, kw_only=True)
    stop: Plateau | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self) -> None:
        """Validate."""
        if isinstance(self.guide, str):
            check_choice("guide", self.guide, (*_GUIDES, "flow"))
        else:
            check(
                callable(self.guide) or isinstance(self.guide, Measure),
                "guide",
                "a name, Measure or module",
                self.guide,
            )
        for name in ("num_steps", "num_samples", "num_particles"):
            check_count(name, getattr(self, name))

    def run(self, problem: Problem, *, key: Key[Array, ""]) -> Posterior:
        """Fit the guide to the posterior and draw from it.

        Args:
            problem: model and data.
            key: typed PRNG key.

        Returns:
            The posterior, with `log_q`, the course of the objective, evidence bracket and the fitted guide.

        Raises:
            NonFiniteError: if the optimization leaves the finite numbers, naming the site where it can.
        """
        key_build, key_train, key_draw = jax.random.split(key, 3)
        model = program(problem.model)(*problem.args, **problem.kwargs)
        start = self._build(problem, key_build)
        check(
            any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(start)),
            "guide",
            "a module or measure with at least one floating array to train",
            self.guide,
            "Make it an `eqx.Module`, or take a guide with `numpyro.param` sites over with `gk.vi.from_numpyro`.",
        )
        guide, history = self._train(model, problem, start, key_train)
        return _posterior(model, problem, self, (guide, history), key_draw)

    def _build(self, problem: Problem, key: Any) -> Any:
        """The guide to start from."""
        if not isinstance(self.guide, str):
            return self.guide
        if self.guide == "flow":
            return flow_guide(problem.model, *problem.args, key=key, **problem.kwargs)
        return _GUIDES[self.guide](problem.model, *problem.args, **problem.kwargs)

    def _train(self, model: Program, problem: Problem, start: Any, key: Any) -> tuple[Any, np.ndarray]:
        """Maximize the objective with the library's one training loop."""

        def loss(guide: Any, batch: Any, *, key: Any) -> tuple[Any, dict]:
            del batch
            q = as_guide(guide, problem)
            estimate = lambda k: expectation(lambda: self.objective(model, q), k, 4096)[0]
            return -average(estimate, key, self.num_particles), {}

        optimizer = self.optimizer
        if optimizer is None:
            rate = 0.005 if self.guide == "flow" else 0.05  # networks need smaller steps than locations and scales
            schedule = optax.cosine_decay_schedule(rate, self.num_steps, 0.01)
            optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))
        watch = None if self.stop is None else _Watch(self.stop)
        recipe = Recipe(
            lambda key: start,
            jax.tree_util.Partial(_no_batch),
            Phase(loss, optimizer),
            self.num_steps,
            log_every=min(self.num_steps, 200 if watch is None else watch.every),
        )
        try:
            fitted = fit(recipe, key=key, on_step=watch)
        except NonFiniteError as error:
            seen = getattr(error, "fitted", None)
            if seen is not None:
                name_the_culprit(model, as_guide(seen.model, problem), key, error)
            raise
        return fitted.model, -np.asarray(fitted.log["loss"], np.float64)


class _Watch:
    """The stopping rule, asked twice per window while training goes on."""

    def __init__(self, rule: Plateau):
        self.rule, self.every = rule, max(2, rule.window // 2)
        self.values: list[float] = []
        self.calm = 0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.values.append(-metrics["loss"])
        if (step + 1) % self.every:
            return
        self.calm = self.calm + 1 if self.rule.flat(np.array(self.values)) else 0
        if self.calm >= self.rule.patience:
            raise StopIteration


def _no_batch(key: Any) -> Any:
    """Inference sees all its data at every step."""
    del key
    return ()


def as_guide(guide: Any, problem: Problem) -> Measure:
    """A measure as it is; a module as a program of the problem's arguments."""
    if isinstance(guide, Measure):
        return guide
    return program(guide)(*problem.args, **problem.kwargs)


def _posterior(model: Program, problem: Problem, method: Fit, fitted: tuple, key: Any) -> Posterior:
    guide, history = fitted
    q = as_guide(guide, problem)

    @jax.jit
    def draw(keys: Any) -> Any:
        def one(key: Any) -> Any:
            key_value, key_predict = jax.random.split(key)
            value, log_q = q.sample(key=key_value)
            return value, log_q, describe_draw(model, value, key_predict)

        return jax.vmap(one)(keys)

    values, log_q, facts = jax.device_get(draw(jax.random.split(key, method.num_samples)))
    log_w = np.asarray(facts["log_density"], np.float64) - np.asarray(log_q, np.float64)
    name = getattr(method.objective, "__name__", type(method.objective).__name__)
    return Posterior(
        {**values, **facts["deterministic"]},
        facts["log_density"],
        ("draw",),
        log_q=log_q,
        log_likelihood=facts["log_likelihood"],
        predictive=facts["predictive"],
        observed=observed_values(problem, jax.tree.map(lambda x: x[0], values)),
        optimization={"objective": history},
        guide=guide,
        evidence=bracket(log_w),
        attrs={"method": "variational inference", "objective": name, "steps": len(history)},
    )


def bracket(log_w: np.ndarray) -> tuple[float, float]:
    """Estimates below and above the log evidence: log mean w, and the chi bound (1/2) log mean w^2."""
    log_w = np.where(np.isnan(log_w), -np.inf, log_w)
    top = np.max(log_w)
    if not np.isfinite(top):
        return float(top), float(top)
    w = np.exp(log_w - top)
    return float(np.log(w.mean()) + top), float(0.5 * np.log((w**2).mean()) + top)
