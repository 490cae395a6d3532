"""`genkit train`: train the recipe of a definition file."""

import sys
import time
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from genkit.cli._signals import Stop
from genkit.cli._zoo import find_definition
from genkit.io import load_definition, plot_log, with_needs
from genkit.storage import is_run, read_meta
from genkit.training import fit


_SECONDS_BETWEEN_LINES = 10.0


def run(args: Namespace, stop: Stop) -> int:
    """Train; several processes share the work and process 0 writes.

    Args:
        args: the parsed command line.
        stop: is told when there is work that a sudden end would lose.

    Returns:
        Exit status 0.
    """
    # Before the first array: JAX cannot join other processes later.
    _join_processes(args)
    try:
        definition = load_definition(find_definition(args.file), ("recipe",))
        recipe = with_needs(definition, _needs(args))
        is_first = jax.process_index() == 0
        total = args.steps or recipe.num_steps
        fitted = fit(
            recipe,
            key=jax.random.key(_seed(args)),
            num_steps=args.steps,
            run=args.out,
            resume=args.resume,
            mesh=_mesh(args),
            on_step=_Progress(stop, total, show=is_first and not sys.stderr.isatty()),
            progress=_bar(is_first),
        )
        if is_first:
            log = {name: values for name, values in fitted.log.items() if len(values)}
            plot_log(Path(args.out) / "log.png", log)
            last = ", ".join(f"{name} {np.mean(values[-100:]):.4g}" for name, values in log.items())
            print(f"{int(fitted.state.step)} steps done, run in {args.out}; means of the last 100 steps: {last}")
    finally:
        if args.coordinator is not None:
            jax.distributed.shutdown()
    return 0


class _Progress:
    """Called after every step: a line now and then where no terminal shows a bar."""

    def __init__(self, stop: Stop, total: int, *, show: bool):
        self.stop = stop
        self.total = total
        self.show = show
        self.start = time.monotonic()
        self.last = self.start

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        # Until now nothing could be lost by ending at once.
        self.stop.has_unsaved_work = True
        now = time.monotonic()
        if self.show and now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            sys.stderr.write(f"step {step + 1} of {self.total}, {now - self.start:.0f} s: {values}\n")
            sys.stderr.flush()


def _bar(is_first: bool) -> bool | None:
    """Value of `progress`: a bar where there is a terminal, and only from one of several processes."""
    return None if is_first else False


def _join_processes(args: Namespace) -> None:
    given = [args.coordinator is not None, args.num_processes is not None, args.process_id is not None]
    if not any(given):
        return
    if not all(given):
        raise ValueError("--coordinator, --num-processes and --process-id go together.")
    if args.process_id >= args.num_processes:
        raise ValueError(f"--process-id must be < --num-processes; got {args.process_id} >= {args.num_processes}.")
    host, _, port = args.coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(f"--coordinator must read HOST:PORT; got {args.coordinator!r}.")
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)


def _needs(args: Namespace) -> dict[str, str]:
    needs = dict(args.needs)
    if len(needs) < len(args.needs):
        raise ValueError("--with names a model twice.")
    return needs


def _seed(args: Namespace) -> int:
    # A resumed run goes on with its own key, which need not be given again.
    if args.seed is not None or not (args.resume and is_run(args.out)):
        return args.seed or 0
    seed = read_meta(args.out)["seed"]
    if seed is None:
        raise ValueError(f"`{args.out}` was not trained from a seed; resume it from Python, with its key.")
    return seed


def _mesh(args: Namespace) -> Mesh | None:
    if args.coordinator is None and args.devices is None:
        return None
    devices = jax.devices()
    number = args.devices or len(devices)
    if number > len(devices):
        raise ValueError(f"--devices must be <= {len(devices)}, as many as there are; got {number}.")
    return jax.make_mesh((number,), ("batch",), devices=devices[:number], axis_types=(AxisType.Auto,))
