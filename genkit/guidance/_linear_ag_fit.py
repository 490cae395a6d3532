"""The fit of LinearAG: ridge regression, step by step, on draws that already use what was fitted."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Int, Key

from genkit._core._checks import check, check_count, check_interval, check_positive, describe
from genkit._core._fields import as_number
from genkit.guidance._linear_ag import LinearAG, LinearFit, digest, linear_ag
from genkit.sampling import AbstractSampler, Draws, Guidance, Sampler, Table, as_sampler, sample


def fit_linear_ag(
    sampler: Any,
    denoiser: Callable,
    guidance: Guidance,
    num_samples: int,
    *,
    true_steps: Sequence[int] | range | Int[ArrayLike, " steps"],
    stop: int,
    cond: Any = None,
    x_init: Any = None,
    shape: tuple[int, ...] | None = None,
    ridge: Float[ArrayLike, ""] | float = 1e-8,
    lags: int | None = None,
    rollout: bool = True,
    batch_size: int | None = None,
    key: Key[Array, ""],
) -> LinearFit:
    r"""Fit the coefficients of `linear_ag` for one table, guidance and model.

    For each predicted step in turn, ridge regression of the second noise prediction on the present conditional one and
    on the past of both, every entry of every draw being one row; columns are scaled to unit norm. Each step is fitted
    on draws that already use the fitted predictions of the earlier steps, as they will: on draws that use the true ones
    the coefficients of nearly collinear columns grow, feed back and diverge.

    Args:
        sampler: a `Table`, or a table-driven `Sampler` without guidance; at most one corrector evaluation per step.
        denoiser: the denoiser.
        guidance: a guidance of two predictions, such as `cfg` or `apg`.
        num_samples: draws to fit on; a few hundred.
        true_steps: steps before `stop` in which both predictions are made; 0 among them.
        stop: step from which on the plain prediction is used, from 1 to the number of steps.
        cond: conditions: a scalar, or one per draw; those of later use should be among them.
        x_init: initial states `(num_samples, *shape)`; drawn if not given.
        shape: shape of one example, where nothing else tells.
        ridge: ridge relative to the squared norm of the columns, positive.
        lags: use only so many past steps of either prediction; `None` for all.
        rollout: fit on draws that use the fitted predictions; `False`, for comparison, on true ones.
        batch_size: draws per batch.
        key: typed PRNG key.

    Returns:
        The coefficients. `.error` holds the relative error of each fit, `.num_evaluations` the evaluations per draw.

    Raises:
        TypeError: if the guidance is none.
        ValueError: for a guidance with another number of slots, steps out of range, or a sampler that does not fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.MixtureDenoiser(
        ...     jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.01), labels=jnp.array([0, 1])
        ... )
        >>> table = gk.diffusion.ddim(gk.diffusion.karras(8, 0.01, 10.0))
        >>> fit = gk.guidance.fit_linear_ag(
        ...     table, law, gk.guidance.cfg(3.0), 16, cond=1, true_steps=range(0, 4, 2), stop=4, key=jax.random.key(0)
        ... )
        >>> fit.num_evaluations
        10

    Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
    section 5; ridge, scaling and roll-outs are ours.
    """
    base, true = _checked(sampler, guidance, true_steps, stop)
    check_count("num_samples", num_samples)
    check_positive("ridge", ridge)
    if lags is not None:
        check_count("lags", lags, 0)
    table, places = base.table, _places(base.table)

    def draw(fitted: np.ndarray, coefficients: np.ndarray) -> dict[str, np.ndarray]:
        recorder = LinearAG(guidance, jnp.asarray(coefficients), jnp.asarray(fitted), jnp.asarray(stop), None, True)
        skip = base.skip if base.skip != "static" else "dynamic"
        run = dataclasses.replace(base, guidance=recorder, skip=skip, patterns=None)
        draws = sample(
            run, denoiser, num_samples, key=key, cond=cond, x_init=x_init, shape=shape, batch_size=batch_size
        )
        names = ("first", "used", "true")
        return {name: np.asarray(draws.info[f"linear_{name}"], np.float64) for name in names}

    coefficients = np.zeros((stop, 2, 2 * stop + 1))
    errors, fitted, seen = np.zeros((stop, 2)), np.ones((stop, 2), bool), None
    for step in map(int, np.flatnonzero(~true)):
        for kind in (0, 1):
            if places[kind][step] < 0:
                continue
            if seen is None or rollout:
                seen = draw(fitted, coefficients)
            coefficients[step, kind], errors[step, kind] = _regress(seen, places, step, kind, stop, ridge, lags)
            fitted[step, kind] = False
    number = jnp.result_type(float)
    return LinearFit(
        guidance,
        jnp.asarray(coefficients, number),
        jnp.asarray(true),
        jnp.asarray(stop),
        jnp.asarray(errors, number),
        table,
        digest(denoiser),
        digest(guidance),
    )


class LinearSampler(AbstractSampler):
    """LinearAG fitted to the model that is sampled, in the call that samples it.

    For definition files, which do not know the model. To draw often, fit once: `linear_ag(fit_linear_ag(...))`.

    Args:
        table: the sampler as data.
        guidance: a guidance of two predictions.
        true_steps: steps before `stop` in which both predictions are made; 0 among them.
        stop: step from which on the plain prediction is used.
        num_samples: draws to fit on; their conditions are those of the draws, in turn.
        ridge: as in `fit_linear_ag`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.MixtureDenoiser(
        ...     jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.01), labels=jnp.array([0, 1])
        ... )
        >>> table = gk.diffusion.ddim(gk.diffusion.karras(8, 0.01, 10.0))
        >>> sampler = gk.guidance.LinearSampler(table, gk.guidance.cfg(3.0), true_steps=(0, 2), stop=4, num_samples=16)
        >>> gk.sample(sampler, law, 4, cond=1, key=jax.random.key(0)).nfe.tolist()
        [10, 10, 10, 10]
    """

    table: Table
    guidance: Guidance
    true_steps: tuple[int, ...] = eqx.field(static=True, kw_only=True)
    stop: int = eqx.field(static=True, kw_only=True)
    num_samples: int = eqx.field(static=True, default=200, kw_only=True)
    ridge: Float[Array, ""] = eqx.field(converter=as_number, default=1e-8, kw_only=True)
    takes_guidance: ClassVar[bool] = True

    def fitted_to(self, denoiser: Callable, *, cond: Any, shape: tuple[int, ...], key: Key[Array, ""]) -> Sampler:
        """The sampler with coefficients fitted to a model.

        Args:
            denoiser: the model.
            cond: conditions of the draws `(n, ...)`, or `None`.
            shape: shape of one example.
            key: typed PRNG key.

        Returns:
            A table-driven sampler.
        """
        turns = None if cond is None else cond[np.arange(self.num_samples) % len(cond)]
        fit = fit_linear_ag(
            self.table,
            denoiser,
            self.guidance,
            self.num_samples,
            true_steps=self.true_steps,
            stop=self.stop,
            cond=turns,
            shape=shape,
            ridge=self.ridge,
            key=key,
        )
        return Sampler(self.table, linear_ag(fit))

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Refused: fitting happens outside compiled functions, in `genkit.sample` or by `fitted_to`."""
        raise ValueError(
            "`sampler` must be fitted before it draws; got a `LinearSampler` as it is. Use `gk.sample`, or "
            "`sampler.fitted_to(model, cond=..., shape=..., key=...)` outside `jit`."
        )


def _checked(sampler: Any, guidance: Any, true_steps: Any, stop: Any) -> tuple[Sampler, np.ndarray]:
    """The sampler, and which steps before `stop` make both predictions."""
    base = as_sampler(sampler)
    plain = isinstance(base, Sampler) and base.guidance is None
    check(plain, "sampler", "a table or a table-driven sampler without guidance", type(base).__name__)
    assert isinstance(base, Sampler), "checked above"
    if not isinstance(guidance, Guidance):
        raise TypeError(f"`guidance` must be a genkit guidance; got {describe(guidance)}.")
    slots = guidance.slots()
    two = len(slots) == 2 and not any(slot.second_stage for slot in slots)
    check(two, "guidance", "one that compares two predictions, such as `cfg`", f"{[s.name for s in slots]}")
    check_count("stop", stop)
    check_interval("stop", stop, 1, base.table.num_steps)
    marks = np.asarray(true_steps, int)
    check(marks.ndim == 1 and 0 in marks, "true_steps", "a list of steps with 0 among them", str(true_steps))
    check_interval("true_steps", marks, 0, stop - 1)
    true = np.zeros(stop, bool)
    true[marks] = True
    return base, true


def _places(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the first evaluation and of the corrector of each step; -1 where there is none."""
    step, corrector, evaluate = (np.asarray(c) for c in (table.step, table.corrector, table.evaluate))
    places = np.full((2, table.num_steps), -1)
    for row in np.flatnonzero(evaluate):
        kind = int(corrector[row])
        what = "a table with at most one corrector evaluation per step"
        check(places[kind, step[row]] < 0, "sampler", what, f"two in step {step[row]}")
        places[kind, step[row]] = row
    check(bool((places[0] >= 0).all()), "sampler", "a table that evaluates in every step", "one that does not")
    return places[0], places[1]


def _regress(
    seen: dict[str, np.ndarray],
    places: tuple[np.ndarray, np.ndarray],
    step: int,
    kind: int,
    stop: int,
    ridge: Any,
    lags: int | None,
) -> tuple[np.ndarray, float]:
    """Coefficients of one prediction, in the order that `LinearAG` uses, and its relative error."""
    row, past = places[kind][step], step + kind
    steps = np.arange(0 if lags is None else max(past - lags, 0), past)
    rows = places[0][steps]
    flat = lambda name, at: seen[name][:, at].reshape(-1)
    columns = [flat("first", r) for r in rows] + [flat("used", r) for r in rows] + [flat("first", row)]
    design, target = np.stack(columns, axis=1), flat("true", row)
    size = np.linalg.norm(design, axis=0)
    size = np.where(size > 0, size, 1.0)
    # Ridge as further rows: normal equations would square the condition number.
    extended = np.concatenate([design / size, np.sqrt(float(np.asarray(ridge))) * np.eye(len(size))])
    solution = np.linalg.lstsq(extended, np.concatenate([target, np.zeros(len(size))]), rcond=None)[0] / size
    weights = np.zeros(2 * stop + 1)
    weights[steps], weights[stop + steps], weights[-1] = *np.split(solution[:-1], 2), solution[-1]
    miss, norm = np.linalg.norm(design @ solution - target), np.linalg.norm(target)
    return weights, float(miss / norm) if norm > 0 else 0.0
