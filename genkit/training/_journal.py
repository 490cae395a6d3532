"""The traces of a training: its log in memory, the callback of the caller, and the run folder."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from genkit.storage import Json, check_writable, fingerprint, lock_folder
from genkit.training._log import History, append_line, summary_line
from genkit.training._recipe import Recipe
from genkit.training._run_folder import (
    LOG,
    find_state,
    save_state,
    start_run,
    stored_final,
    stored_log,
    stored_state,
)
from genkit.training._step import TrainState


_SAVE_SECONDS = 20.0


class Reached(NamedTuple):
    """How far a training has come, as checkpoints hold it.

    Args:
        state: everything that training changes.
        history: the log of every step.
        final: the model as the hooks at the end left it; `None` before they ran.
        pending: hooks are yet to change the state.
    """

    state: TrainState
    history: History
    final: PyTree | None = None
    pending: bool = False


class Folder:
    """The run folder of a training; created by the first save, so that a recipe that fails leaves nothing behind."""

    def __init__(self, path: Path, facts: Json, recipe: Recipe):
        self.path = path
        self.facts = facts
        self.recipe = recipe
        # With several processes one of them writes.
        self.is_writer = jax.process_index() == 0
        self.started = False
        self.last_save = time.monotonic()
        self.saved_step = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other trainings; leaves nothing where nothing was written."""
        # What is no folder is refused by `open`, with a message of its own.
        if not self.is_writer or (self.path.exists() and not self.path.is_dir()):
            yield
            return
        check_writable(self.path, "run")
        with lock_folder(self.path):
            yield

    def open(self, state: TrainState, *, resume: bool) -> Reached:
        """Read the checkpoint there is, or begin with `state`."""
        stored = find_state(self.path, self.facts, self.recipe.source, resume=resume)
        if stored is None:
            return Reached(state, History())
        self.saved_step = stored.meta["steps"]
        history = History(stored_log(stored))
        pending = stored.meta.get("pending_hooks", False)
        return Reached(stored_state(stored, state), history, stored_final(stored, state), pending)

    def is_due(self, step: int) -> bool:
        """Return True if it is time for a checkpoint."""
        if self.recipe.save_every is not None:
            return step - self.saved_step >= self.recipe.save_every
        return time.monotonic() - self.last_save >= _SAVE_SECONDS

    def write_line(self, content: Json) -> None:
        """Add a line to the log."""
        if self.is_writer:
            self._start()
            append_line(self.path / LOG, content)

    def save(self, reached: Reached) -> None:
        """Write a checkpoint."""
        if self.is_writer:
            self._start()
            facts = {
                "key": self.facts["key"],
                "run": fingerprint(self.facts),
                "pending_hooks": reached.pending,
            }
            save_state(self.path, reached.state, reached.final, reached.history.arrays(), facts)
        self.last_save = time.monotonic()
        self.saved_step = int(reached.state.step)

    def _start(self) -> None:
        # Somebody may have deleted the folder meanwhile: that must not cost the training.
        if not self.started or not self.path.is_dir():
            start_run(self.path, self.facts, self.recipe.source)
            self.started = True


class Journal:
    """Where the metrics of a training go."""

    def __init__(
        self, history: History, folder: Folder | None, on_step: Callable[[int, dict[str, float]], object] | None
    ):
        self.history = history
        self.folder = folder
        self.on_step = on_step
        self.warned = set()
        self.begun = time.monotonic()

    @property
    def place(self) -> str | None:
        """The run folder, where there is one, for messages."""
        if self.folder is None:
            return None
        return f"`{self.folder.path}`"

    def record(self, metrics: dict[str, np.ndarray], step: int) -> bool:
        """Take note of the steps of one compiled call.

        Args:
            metrics: the metrics of those steps, arrays of equal length.
            step: steps done.

        Returns:
            False if the caller's callback has seen enough.
        """
        self.history.add(metrics)
        self._warn_of_nan(metrics, step)
        if self.folder is not None:
            self.folder.write_line(summary_line(metrics, step, time.monotonic() - self.begun))
        if self.on_step is None:
            return True
        count = len(next(iter(metrics.values())))
        try:
            for i in range(count):
                self.on_step(step - count + i, {name: float(values[i]) for name, values in metrics.items()})
        except StopIteration:
            return False
        return True

    def _warn_of_nan(self, metrics: dict[str, np.ndarray], step: int) -> None:
        """Say once of each metric that it is no number: training stops for its loss alone, which the call looks at."""
        for name, values in metrics.items():
            if name in self.warned or not np.isnan(values).any():
                continue
            self.warned.add(name)
            first = step - len(values) + int(np.flatnonzero(np.isnan(values))[0])
            warnings.warn(
                f"`{name}` is NaN at step {first}, while the loss and the model are finite: look at what the objective "
                "returns beside the loss. Training goes on.",
                stacklevel=4,
            )
