"""The loop over compiled calls: what happens between them."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from ._checks import NonFiniteError
from ._ema import ema_model
from ._files import SaveError
from ._fit_feed import bring_back, feed, local, replicate, snapshot
from ._fit_step import Leaves, Plan, TrainState, explain, find_fault, run_steps, split
from ._log import History, append_line, summary_line
from ._objective import Recipe
from ._run import LOG, find_state, save_state, start_run, stored_log, stored_state


_SAVE_SECONDS = 20.0
_SNAPSHOT_CALLS = 10


class Fitted(eqx.Module):
    """What a training gave.

    Args:
        model: the model after the last step.
        ema: the model with trained leaves replaced by their moving average; `model` itself where none was kept.
        log: metrics by name, NumPy arrays with one entry per step: `loss`, and every scalar by-product of the
            objective. With several phases each name begins with `phase name/`; over repeats a metric is the mean.
        state: all that training changes, as checkpoints hold it.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
        >>> draw = jax.tree_util.Partial(lambda key: jax.random.normal(key, (8,)))
        >>> recipe = gk.Recipe(lambda key: jnp.ones(()), draw, gk.Phase(loss, optax.adam(1e-2)), num_steps=3, ema=0.9)
        >>> fitted = gk.fit(recipe, key=jax.random.key(0))
        >>> bool(fitted.ema > fitted.model), int(fitted.state.step)
        (True, 3)
    """

    model: PyTree
    ema: PyTree
    log: dict[str, np.ndarray]
    state: TrainState

    @classmethod
    def of(cls, state: TrainState, history: History) -> "Fitted":
        """What a state and a log amount to."""
        return cls(state.model, ema_model(state.ema, state.model), history.arrays(), state)


class Interrupted(KeyboardInterrupt):
    """Training was interrupted between two compiled calls; `fitted` has all work done so far."""

    def __init__(self, message: str, fitted: Fitted):
        super().__init__(message)
        self.fitted = fitted


class Folder:
    """The run folder of a training; created by the first save, so that a recipe that fails leaves nothing behind."""

    def __init__(self, path: Path, facts: dict[str, Any], recipe: Recipe):
        self.path, self.facts, self.recipe = path, facts, recipe
        self.writes, self.started, self.saved = jax.process_index() == 0, False, time.monotonic()
        self.saved_step = 0

    def open(self, state: TrainState, *, resume: bool) -> tuple[TrainState, History]:
        stored = find_state(self.path, self.facts, resume=resume)
        if stored is None:
            return state, History()
        self.saved_step = stored.meta["steps"]
        return stored_state(stored, state), History(stored_log(stored))

    def due(self, step: int) -> bool:
        if self.recipe.save_every is not None:
            return step - self.saved_step >= self.recipe.save_every
        return time.monotonic() - self.saved >= _SAVE_SECONDS

    def line(self, content: dict[str, Any]) -> None:
        if self.writes:
            self._start()
            append_line(self.path / LOG, content)

    def save(self, state: TrainState, history: History) -> None:
        if self.writes:
            self._start()
            save_state(self.path, state, history.arrays(), {"key": self.facts["key"]})
        self.saved, self.saved_step = time.monotonic(), int(state.step)

    def _start(self) -> None:
        if not self.started:
            start_run(self.path, self.facts, self.recipe.source)
            self.started = True


class Session:
    """A training under way: the state that compiled calls pass on, and where its traces go."""

    def __init__(
        self,
        plan: Plan,
        state: TrainState,
        history: History,
        data: Any,
        total: int,
        folder: Folder | None,
        on_step: Callable[[int, dict[str, float]], Any] | None,
    ):
        # NumPy arrays go to the device once, not at every call.
        plan = jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array(x) else x, plan)
        if plan.mesh is not None:
            plan, state = replicate(plan, plan.mesh), replicate(state, plan.mesh)
        self.plan, self.history, self.data, self.total = plan, history, data, total
        self.reads = Leaves.of(plan)
        self.folder, self.on_step = folder, on_step
        self.step = self.first_step = int(state.step)
        self.stopped = False
        self.begun = time.monotonic()
        changing, self.rest = split(state)
        self.arrays, self.form = Leaves.of(changing)
        self.feed = feed(data, plan, self.step, total)
        self.batches = next(self.feed)
        self.calls, self.kept, self.kept_step = 0, self.arrays, self.step

    def advance(self) -> dict[str, np.ndarray]:
        """Run one compiled call and take note of it; returns its metrics, one entry per step."""
        if self.calls % _SNAPSHOT_CALLS == 0:
            self.kept, self.kept_step = snapshot(self.arrays), self.step
        self.calls += 1
        count = min(self.plan.length, self.total - self.step)
        # The call consumes `arrays`: both change in one statement, so that no interrupt falls between them.
        self.arrays, metrics, sound = run_steps(
            self.reads.form, self.form, self.reads.arrays, self.arrays, self.batches, self._rest_of(count)
        )
        failure = self._draw(self.step + count)
        metrics, sound = jax.device_get((metrics, sound))
        metrics = {name: values[:count] for name, values in metrics.items()}
        if not sound:
            self._look_for_fault(metrics, count)
        self.step += count
        self.history.add(metrics)
        self._report(metrics, count)
        if failure is not None:
            raise failure
        return metrics

    def _draw(self, step: int) -> Exception | None:
        """Draw the next call's batches while the device is busy; a failure waits until its work is taken note of."""
        try:
            self.batches = next(self.feed) if step < self.total else None
        except Exception as error:
            return error
        return None

    def _rest_of(self, count: int) -> np.int32 | None:
        # Loops of one pass are inlined by XLA, which might then fuse, and round, otherwise: they count as a rest.
        return None if count == self.plan.length >= 2 else np.int32(count)

    def _look_for_fault(self, metrics: dict[str, np.ndarray], count: int) -> None:
        """Run again from the last snapshot, looking at each step; raise at the first that is not finite."""
        arrays, step, end = bring_back(self.kept, self.arrays), self.kept_step, self.step + count
        batches = feed(self.data, self.plan, step, self.total)
        while step < end:
            number = min(self.plan.length, end - step)
            arrays, reached, fault = find_fault(
                self.reads.form, self.form, self.reads.arrays, arrays, next(batches), np.int32(number)
            )
            if int(fault):
                first, self.step, self.arrays = self.step, int(reached), arrays
                self.history.add({name: values[: max(0, self.step - first)] for name, values in metrics.items()})
                self.history.cut(self.step)
                seen = {name: values[self.step - first] for name, values in metrics.items() if self.step >= first}
                raise self._fault_error(int(fault), seen)
            step += number
        self.arrays = arrays  # a false alarm: only a moment of an optimizer left the finite numbers

    def _fault_error(self, fault: int, metrics: dict[str, Any]) -> NonFiniteError:
        values = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        kept = "" if self.folder is None else f" and in `{self.folder.path}`"
        error = NonFiniteError(
            f"training stopped: {explain(self.plan, fault, self.step)}" + (f" ({values})" if values else "") + ". The "
            f"state before that step is kept as `.fitted` of this error{kept}. A lower learning rate, "
            "`optax.clip_by_global_norm` or data without NaN may help."
        )
        error.fitted = self.fitted()  # pyright: ignore[reportAttributeAccessIssue]
        return error

    def _report(self, metrics: dict[str, np.ndarray], count: int) -> None:
        if self.folder is not None:
            self.folder.line(summary_line(metrics, self.step, time.monotonic() - self.begun))
        if self.on_step is not None:
            try:
                for i in range(count):
                    self.on_step(self.step - count + i, {name: float(values[i]) for name, values in metrics.items()})
            except StopIteration:  # the callback has seen enough
                self.stopped = True

    def save(self, *, when_due: bool = False) -> None:
        """Write a checkpoint, if there is a folder (and its time has come)."""
        if self.folder is not None and (not when_due or self.folder.due(self.step)):
            self.folder.save(self.state(), self.history)

    def rescue(self) -> None:
        """Save what was done; nothing when nothing was, or when a call that was cut off has consumed it."""
        whole = not any(x.is_deleted() for x in self.arrays)
        if self.step > self.first_step and whole and int(self.state().step) == self.step:
            self.save()

    def state(self) -> TrainState:
        """The state so far."""
        arrays = self.arrays if self.plan.mesh is None else local(self.arrays)
        return eqx.combine(self.form.tree(arrays), self.rest)

    def fitted(self) -> Fitted:
        """What there is so far."""
        return Fitted.of(self.state(), self.history)


def loop(session: Session, name: str | None, progress: bool | None) -> Fitted:
    """Compiled calls until all steps are done, something is not finite, or the user interrupts."""
    quiet = None if progress is None else not progress
    bar = tqdm(total=session.total, initial=session.step, desc=name, unit="step", disable=quiet, leave=False)
    try:
        with bar, _interrupts() as interrupted:
            while session.step < session.total and not session.stopped:
                before, metrics = session.step, session.advance()
                bar.set_postfix({key: f"{values[-1]:.4g}" for key, values in metrics.items()}, refresh=False)
                bar.update(session.step - before)
                if interrupted() and session.step < session.total:
                    raise _interruption(session)
                session.save(when_due=True)
    except SaveError:
        raise
    except BaseException:
        session.rescue()
        raise
    session.save()
    return session.fitted()


def _interruption(session: Session) -> Interrupted:
    kept = "" if session.folder is None else f"; resume the run in `{session.folder.path}`"
    return Interrupted(f"interrupted after {session.step} of {session.total} steps{kept}", session.fitted())


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, read between compiled calls; the second one is a `KeyboardInterrupt`."""
    flag = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        sys.stderr.write("\nstopping after this call; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)
