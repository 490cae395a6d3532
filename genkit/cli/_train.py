"""`genkit train`: train the recipe of a definition file."""

from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from .._core import fit
from .._core._run import is_run, read_meta
from ..io import load_definition, plot_log, with_needs


def run(args: Namespace) -> int:
    """Train; several processes share the work and process 0 writes.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    _join_processes(args)
    try:
        definition = load_definition(args.file, ("recipe",))
        recipe = with_needs(definition, _needs(args))
        fitted = fit(
            recipe,
            key=jax.random.key(_seed(args)),
            num_steps=args.steps,
            run=args.out,
            resume=args.resume,
            mesh=_mesh(args),
            progress=None if jax.process_index() == 0 else False,
        )
        if jax.process_index() == 0:
            log = {name: values for name, values in fitted.log.items() if len(values)}
            plot_log(Path(args.out) / "log.png", log)
            last = ", ".join(f"{name} {np.mean(values[-100:]):.4g}" for name, values in log.items())
            print(f"{int(fitted.state.step)} steps done, run in {args.out}; means of the last 100 steps: {last}")
    finally:
        if args.coordinator is not None:
            jax.distributed.shutdown()
    return 0


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
    if args.seed is not None or not (args.resume and is_run(args.out)):
        return args.seed or 0
    seed = read_meta(args.out)["seed"]
    if seed is None:
        raise ValueError(f"`{args.out}` was not trained from a seed; resume it from Python, with its key.")
    return seed


def _mesh(args: Namespace) -> Mesh | None:
    devices = jax.devices()
    if args.coordinator is None and args.devices is None:
        return None
    number = len(devices) if args.devices is None else args.devices
    if number > len(devices):
        raise ValueError(f"--devices must be <= {len(devices)}, as many as there are; got {number}.")
    return jax.make_mesh((number,), ("batch",), devices=devices[:number], axis_types=(AxisType.Auto,))
