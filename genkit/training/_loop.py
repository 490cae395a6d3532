"""The loop over compiled calls: hooks, log, checkpoints and interrupts between them."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import equinox as eqx
import numpy as np
from tqdm import tqdm

from genkit._core._checks import NonFiniteError
from genkit.storage import SaveError
from genkit.training._calls import Calls, Fault
from genkit.training._feed import copy_arrays
from genkit.training._fitted import Fitted, Interrupted
from genkit.training._hooks import Hook, run_hook
from genkit.training._journal import Journal, Reached
from genkit.training._step import TrainState, explain, split


class Session:
    """A training under way.

    Args:
        calls: its compiled calls.
        journal: where its traces go.
        hooks: what runs between the calls.
        reached: how far the training has come already.
    """

    def __init__(self, calls: Calls, journal: Journal, hooks: tuple[Hook, ...], reached: Reached):
        self.calls = calls
        self.journal = journal
        self.hooks = hooks
        self.final = reached.final
        self.pending = reached.pending
        self.stopped = False
        self.first_step = calls.step

    @property
    def is_done(self) -> bool:
        """Return True if no call is left to run."""
        return self.stopped or self.calls.step >= self.calls.total

    def advance(self) -> dict[str, np.ndarray]:
        """Run one compiled call and take note of it; returns its metrics, one entry per step."""
        self.final = None
        metrics, is_finite, failure = self.calls.advance()
        if not is_finite:
            end = self.calls.step
            fault = self.calls.search()
            if fault is not None:
                raise self._fault_error(fault, metrics, end)
        self.pending = any(hook.is_due(self.calls.step) for hook in self.hooks)
        if not self.journal.record(metrics, self.calls.step):
            self.stopped = True
        if failure is not None:
            raise failure
        return metrics

    def run_hooks(self) -> None:
        """Let the hooks that are due change the model, and at the end those that make the final one of it."""
        try:
            if self.pending:
                self.calls.put(self._after([hook for hook in self.hooks if hook.is_due(self.calls.step)]))
                self.pending = False
            last = [hook for hook in self.hooks if hook.cycles is None]
            if last and self.final is None and self.calls.step >= self.calls.total:
                final = self._after(last).model
                # The hook may have returned the arrays of the state, which the caller may hold on to.
                arrays, rest = split(final)
                self.final = eqx.combine(copy_arrays(arrays), rest)
        except NonFiniteError as error:
            error.fitted = self.fitted()
            raise

    def _after(self, hooks: list[Hook]) -> TrainState:
        """The state after some hooks."""
        state = self.calls.state()
        model = state.model
        opt = list(state.opt)
        for hook in hooks:
            new = run_hook(hook, model, self.calls.plan.key, self.calls.step)
            if hook.adapt is not None:
                opt[hook.index] = hook.adapt(opt[hook.index], model, new)
            model = new
        return TrainState(state.step, model, tuple(opt), state.ema)

    def _fault_error(self, fault: Fault, metrics: dict[str, np.ndarray], end: int) -> NonFiniteError:
        """The error for a fault in or before the call of these metrics, which ended after `end` steps."""
        count = len(next(iter(metrics.values())))
        place = fault.step - (end - count)
        history = self.journal.history
        history.add({name: values[: max(0, place)] for name, values in metrics.items()})
        history.cut(fault.step)
        message = f"training stopped: {explain(self.calls.plan, fault.code, fault.step)}"
        if place >= 0:
            message += " (" + ", ".join(f"{name} {values[place]:.6g}" for name, values in metrics.items()) + ")"
        message += ". The state before that step is kept as `.fitted` of this error"
        # A fault in the first step leaves no folder to speak of.
        if self.journal.place is not None and fault.step > 0:
            message += f" and in {self.journal.place}"
        error = NonFiniteError(
            message + ". A lower learning rate, `optax.clip_by_global_norm` or data without NaN may help."
        )
        error.fitted = self.fitted()
        return error

    def save(self) -> None:
        """Write a checkpoint, if there is a folder."""
        if self.journal.folder is not None:
            self.journal.folder.save(self._reached())

    def save_when_due(self) -> None:
        """Write a checkpoint, if there is a folder and its time has come."""
        if self.journal.folder is not None and self.journal.folder.is_due(self.calls.step):
            self.save()

    def rescue(self) -> None:
        """Save what was done; nothing when nothing was, or when a call that was cut off has consumed it."""
        if self.calls.step > self.first_step and self.calls.is_whole():
            self.save()

    def _reached(self) -> Reached:
        return Reached(self.calls.state(), self.journal.history, self.final, self.pending)

    def fitted(self) -> Fitted:
        """The result so far."""
        return Fitted.of(self.calls.state(), self.journal.history, self.final)


def loop(session: Session, name: str | None, progress: bool | None) -> Fitted:
    """Run compiled calls until all steps are done, something is not finite, or the user interrupts.

    Args:
        session: the training.
        name: title of the progress bar.
        progress: show it; default: when standard error is a terminal.

    Returns:
        The result.
    """
    is_quiet = None  # tqdm asks the terminal
    if progress is not None:
        is_quiet = not progress
    calls = session.calls
    bar = tqdm(total=calls.total, initial=calls.step, desc=name, unit="step", disable=is_quiet, leave=False)
    try:
        with bar, _interrupts() as interrupted:
            session.run_hooks()
            while not session.is_done:
                before = calls.step
                metrics = session.advance()
                session.run_hooks()
                bar.set_postfix({key: f"{values[-1]:.4g}" for key, values in metrics.items()}, refresh=False)
                bar.update(calls.step - before)
                if interrupted() and calls.step < calls.total:
                    raise _interruption(session)
                session.save_when_due()
    except SaveError:
        # Nothing can be written: another attempt would only hide the reason.
        raise
    except BaseException:
        session.rescue()
        raise
    session.save()
    return session.fitted()


def _interruption(session: Session) -> Interrupted:
    message = f"interrupted after {session.calls.step} of {session.calls.total} steps"
    if session.journal.place is not None:
        message += f"; resume the run in {session.journal.place}"
    return Interrupted(message, session.fitted())


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, read between compiled calls; the second one is a `KeyboardInterrupt`."""
    flag = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        sys.stderr.write("\nFinishing the current steps, then saving. Press Ctrl-C again to stop immediately.\n")

    # Python hands signals to its main thread alone, and lets no other thread ask for them.
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)
