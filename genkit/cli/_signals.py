"""Ctrl-C and SIGTERM: one line, at once where nothing can be lost, after saving where something can."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


# A compiled call and XLA's compiler do not look at signals. Python code that does has this long to react.
_GRACE_SECONDS = 0.5


class Stop:
    """Requests to stop that the process received.

    Args:
        command: name of the command, for the line that is printed.
    """

    def __init__(self, command: str):
        self.command = command
        self.requests = 0
        self.is_termination = False
        self.has_unsaved_work = False

    @property
    def status(self) -> int:
        """Exit status, by the convention of shells: 128 and the number of the signal."""
        if self.is_termination:
            return 128 + signal.SIGTERM
        return 128 + signal.SIGINT


@contextlib.contextmanager
def listen(command: str) -> Iterator[Stop]:
    """Handle both signals alike while the block runs; does nothing outside the main thread.

    A thread watches the signals beside Python's own handlers. Where no finished work is in memory it ends the process
    if Python does not react in time, because XLA compiles for seconds without looking up. A second request always ends
    the process.
    """
    stop = Stop(command)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    finished = threading.Event()
    # Python's C-level handler writes the signal's number here at once, whatever the main thread does.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def terminate(number: int, frame: object) -> None:
        """Handle SIGTERM as a Ctrl-C, so that a training saves before it ends."""
        # Set here as well as by the watcher, which may not have run yet when the training is over.
        stop.is_termination = True
        signal.raise_signal(signal.SIGINT)

    old_terminate = signal.signal(signal.SIGTERM, terminate)
    watcher = threading.Thread(target=_watch, args=(stop, reader, finished), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        finished.set()
        signal.signal(signal.SIGTERM, old_terminate)
        signal.set_wakeup_fd(old_wakeup)
        # The end of the pipe ends the watcher, which closes the other side.
        os.close(writer)
        watcher.join()


def _watch(stop: Stop, reader: int, finished: threading.Event) -> None:
    try:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGTERM:
                # It comes back as an interrupt, which is counted.
                stop.is_termination = True
                continue
            if received[0] != signal.SIGINT:
                continue
            stop.requests += 1
            # The training loop saves at the end of the compiled call and ends by itself.
            if stop.has_unsaved_work and stop.requests == 1:
                continue
            if not finished.wait(_GRACE_SECONDS):
                sys.stderr.write(f"\ngenkit {stop.command}: {_reason(stop)}\n")
                sys.stderr.flush()
                # The main thread may be deep in compiled code: nothing less ends it.
                os._exit(stop.status)
    finally:
        os.close(reader)


def _reason(stop: Stop) -> str:
    if stop.has_unsaved_work:
        return "stopped; the last checkpoint stands"
    return "interrupted"
