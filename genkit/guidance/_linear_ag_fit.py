"""The fit of LinearAG: ridge regression, step by step, on draws that already use what was fitted."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, Key, PyTree

from genkit._core._checks import check, check_count, check_interval, check_positive, fail
from genkit._core._fields import as_number
from genkit.guidance._linear_ag import LinearAG, LinearFit, digest, linear_ag
from genkit.guidance._switch import check_guidance
from genkit.guidance._unguided import conditions_in_turn, guided_by, unguided_sampler
from genkit.sampling import AbstractSampler, Draws, Guidance, Sampler, Table, sample


# The two evaluations that a step may make, as `LinearAG` numbers them.
_FIRST = 0
_CORRECTOR = 1


def fit_linear_ag(
    sampler: Table | AbstractSampler,
    denoiser: Callable,
    guidance: Guidance,
    num_samples: int,
    *,
    true_steps: Sequence[int] | range | Int[ArrayLike, " steps"],
    stop: int,
    cond: PyTree = None,
    x_init: PyTree = None,
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
        TypeError: if `guidance` is no guidance, or `sampler` no sampler.
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
    base = unguided_sampler(sampler)
    _check_two_predictions(guidance)
    true = _marks(true_steps, stop, base.table.num_steps)
    check_count("num_samples", num_samples)
    check_positive("ridge", ridge)
    if lags is not None:
        check_count("lags", lags, 0)
    regression = _Regression(_rows(base.table), stop, float(np.asarray(ridge)), lags)

    def record(evaluated: Bool[np.ndarray, " stop 2"], coefficients: Float[np.ndarray, " stop 2 terms"]) -> _Recorded:
        """Draw with true predictions where marked, fitted ones elsewhere; both predictions are made throughout."""
        recorder = LinearAG(guidance, jnp.asarray(coefficients), jnp.asarray(evaluated), jnp.asarray(stop), None, True)
        draws = sample(
            guided_by(base, recorder),
            denoiser,
            num_samples,
            key=key,
            cond=cond,
            x_init=x_init,
            shape=shape,
            batch_size=batch_size,
        )
        # Regression is done in float64, whatever the draws were made in.
        columns = (draws.info[f"linear_{name}"] for name in _Recorded._fields)
        return _Recorded(*(np.asarray(column, np.float64) for column in columns))

    coefficients = np.zeros((stop, 2, 2 * stop + 1))
    errors = np.zeros((stop, 2))
    evaluated = np.ones((stop, 2), bool)
    recorded = None
    for step in np.flatnonzero(~true).tolist():
        for kind in (_FIRST, _CORRECTOR):
            if regression.rows[kind][step] < 0:
                continue
            # Each step is fitted on draws that use the earlier fits. On the draws of the truth the coefficients of
            # nearly collinear columns grow, feed back and diverge.
            if recorded is None or rollout:
                recorded = record(evaluated, coefficients)
            coefficients[step, kind], errors[step, kind] = regression(recorded, step, kind)
            evaluated[step, kind] = False
    number = jnp.result_type(float)
    return LinearFit(
        guidance,
        jnp.asarray(coefficients, number),
        jnp.asarray(true),
        jnp.asarray(stop),
        jnp.asarray(errors, number),
        base.table,
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

    def fitted_to(self, denoiser: Callable, *, cond: PyTree, shape: tuple[int, ...], key: Key[Array, ""]) -> Sampler:
        """The sampler with coefficients fitted to a model.

        Args:
            denoiser: the model.
            cond: conditions of the draws `(n, ...)`, or `None`.
            shape: shape of one example.
            key: typed PRNG key.

        Returns:
            A table-driven sampler.
        """
        conditions = None
        if cond is not None:
            conditions = conditions_in_turn(cond, self.num_samples)
        fit = fit_linear_ag(
            self.table,
            denoiser,
            self.guidance,
            self.num_samples,
            true_steps=self.true_steps,
            stop=self.stop,
            cond=conditions,
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
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Refused: fitting happens outside compiled functions, in `genkit.sample` or by `fitted_to`."""
        raise ValueError(
            "`sampler` must be fitted before it draws; got a `LinearSampler` as it is. Use `gk.sample`, or "
            "`sampler.fitted_to(model, cond=..., shape=..., key=...)` outside `jit`."
        )


def _check_two_predictions(guidance: Guidance) -> None:
    check_guidance(guidance)
    slots = guidance.slots()
    # A second-stage slot follows from the first prediction of its own step: there is nothing to predict from past ones.
    if len(slots) != 2 or any(slot.second_stage for slot in slots):
        fail("guidance", "one that compares two predictions, such as `cfg`", f"{[slot.name for slot in slots]}")


def _marks(
    true_steps: Sequence[int] | range | Int[ArrayLike, " steps"], stop: int, num_steps: int
) -> Bool[np.ndarray, " stop"]:
    """True for the steps before `stop` in which both predictions are made."""
    check_count("stop", stop)
    check_interval("stop", stop, 1, num_steps)
    steps = np.asarray(true_steps, int)
    # In step 0 there is no past.
    check(steps.ndim == 1 and 0 in steps, "true_steps", "a list of steps with 0 among them", str(true_steps))
    check_interval("true_steps", steps, 0, stop - 1)
    true = np.zeros(stop, bool)
    true[steps] = True
    return true


def _rows(table: Table) -> Int[np.ndarray, " 2 num_steps"]:
    """Rows of the first evaluation and of the corrector of each step; -1 where there is none."""
    step = np.asarray(table.step)
    corrector = np.asarray(table.corrector)
    rows = np.full((2, table.num_steps), -1)
    for row in np.flatnonzero(np.asarray(table.evaluate)):
        kind = int(corrector[row])
        if rows[kind, step[row]] >= 0:
            fail("sampler", "a table with at most one corrector evaluation per step", f"two in step {step[row]}")
        rows[kind, step[row]] = row
    is_whole = bool((rows[_FIRST] >= 0).all())
    check(is_whole, "sampler", "a table that evaluates in every step", "one that does not")
    return rows


class _Recorded(NamedTuple):
    """Noise predictions of draws `(n, rows, *shape)`: the first ones, the second ones in use, the true second ones."""

    first: Float[np.ndarray, " n rows *shape"]
    used: Float[np.ndarray, " n rows *shape"]
    true: Float[np.ndarray, " n rows *shape"]


@dataclasses.dataclass(frozen=True)
class _Regression:
    """Ridge regression of one second noise prediction on present and past ones.

    Args:
        rows: rows of the table that evaluate, by kind and step.
        stop: number of guided steps.
        ridge: ridge relative to the squared norm of the columns.
        lags: number of past steps to use; `None` for all.
    """

    rows: Int[np.ndarray, " 2 num_steps"]
    stop: int
    ridge: float
    lags: int | None

    def __call__(self, recorded: _Recorded, step: int, kind: int) -> tuple[Float[np.ndarray, " terms"], float]:
        """Coefficients of one prediction, in the order that `LinearAG` uses, and its relative error."""
        row = self.rows[kind][step]
        steps = self._past(step, kind)
        rows = self.rows[_FIRST][steps]
        # Every entry of every draw is one row of the regression.
        columns = [recorded.first[:, past].reshape(-1) for past in rows]
        columns += [recorded.used[:, past].reshape(-1) for past in rows]
        columns.append(recorded.first[:, row].reshape(-1))
        design = np.stack(columns, axis=1)
        target = recorded.true[:, row].reshape(-1)
        solution = _solve_ridge(design, target, self.ridge)
        weights = np.zeros(2 * self.stop + 1)
        weights[steps] = solution[: len(steps)]
        weights[self.stop + steps] = solution[len(steps) : -1]
        weights[-1] = solution[-1]
        return weights, _relative_error(design @ solution, target)

    def _past(self, step: int, kind: int) -> Int[np.ndarray, " past"]:
        """Steps whose predictions are known; to a corrector that of its own step is."""
        end = step + kind
        start = 0
        if self.lags is not None:
            start = max(end - self.lags, 0)
        return np.arange(start, end)


def _solve_ridge(
    design: Float[np.ndarray, " n terms"], target: Float[np.ndarray, " n"], ridge: float
) -> Float[np.ndarray, " terms"]:
    """Least squares with a penalty on the coefficients of the columns of unit norm."""
    size = np.linalg.norm(design, axis=0)
    size = np.where(size > 0, size, 1.0)
    # Ridge as further rows: normal equations would square the condition number.
    extended = np.concatenate([design / size, np.sqrt(ridge) * np.eye(len(size))])
    wanted = np.concatenate([target, np.zeros(len(size))])
    return np.linalg.lstsq(extended, wanted, rcond=None)[0] / size


def _relative_error(fitted: Float[np.ndarray, " n"], target: Float[np.ndarray, " n"]) -> float:
    size = np.linalg.norm(target)
    if size == 0:
        return 0.0
    return float(np.linalg.norm(fitted - target) / size)
