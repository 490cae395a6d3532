"""`genkit sample`: draw from a trained model."""

import hashlib
import inspect
import json
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from genkit._core._checks import check, check_finite
from genkit.cli._output import check_output, write_results
from genkit.cli._zoo import find_definition
from genkit.io import Definition, DefinitionError, load_definition, load_run, plot_draws, save_draws
from genkit.sampling import AbstractSampler, Draws, Sampler, Table, sample
from genkit.storage import atomic_write


def run(args: Namespace) -> int:
    """Draw, and save the draws, their picture and what they came from.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    out = Path(args.run) / "draws"
    if args.out is not None:
        out = Path(args.out)
    definition = load_definition(find_definition(args.sampler), ("sampler",))
    if not isinstance(definition.value, (AbstractSampler, Table)):
        raise DefinitionError(f"{args.sampler} binds a method for `genkit infer`, not a sampler for `genkit sample`.")
    model = load_run(args.run, trust_edited=args.trust_edited).ema
    check_output(out)
    _check_model(definition.value, model, args)
    draws = sample(
        definition.value,
        model,
        args.num_samples,
        key=jax.random.key(args.seed),
        cond=_cond(args, model),
        shape=args.shape,
        batch_size=args.batch_size,
    )
    # Nothing is written for draws that are not finite.
    check_finite("draws", draws.value, "The model or the sampler's grid may be at fault.")

    def write(folder: Path) -> None:
        _write(folder, draws, definition, args)

    out = write_results(out, write)
    shape = tuple(draws.value.shape[1:])
    files = " and ".join(str(path) for path in (out / "draws.npz", out / "draws.png") if path.exists())
    print(f"{args.num_samples} draws of shape {shape}, {np.mean(draws.nfe):.4g} evaluations each: {files}")
    return 0


def _write(folder: Path, draws: Draws, definition: Definition, args: Namespace) -> None:
    """Write the draws, their picture, and the facts about them with the draws' checksum."""
    save_draws(folder / "draws.npz", draws)
    if not plot_draws(folder / "draws.png", draws.value):
        # A picture of earlier draws must not stand beside these.
        (folder / "draws.png").unlink(missing_ok=True)
    facts = {
        "run": str(args.run),
        "sampler": {"path": str(args.sampler), "sha256": hashlib.sha256(definition.text).hexdigest()},
        "num_samples": args.num_samples,
        "cond": args.cond,
        "seed": args.seed,
        "mean_nfe": float(np.mean(draws.nfe)),
        # A kill between the two files leaves facts of other draws: `genkit info` compares.
        "draws": {"sha256": hashlib.sha256((folder / "draws.npz").read_bytes()).hexdigest()},
    }
    atomic_write(folder / "draws.json", json.dumps(facts, indent=2) + "\n")


def _check_model(sampler: AbstractSampler | Table, model: PyTree, args: Namespace) -> None:
    """Refuse a model that cannot be called as the sampler will."""
    check(callable(model), "run", "the run of a denoiser", f"a {type(model).__name__}, which cannot be called")
    # Samplers of their own (paths, bridges, one step) call the model as they please.
    if not isinstance(sampler, (Sampler, Table)):
        return
    try:
        inspect.signature(model).bind(None, None, None)
    except TypeError:
        raise DefinitionError(
            f"{args.sampler} draws from a denoiser, called (x, sigma, cond); {args.run} holds a "
            f"{type(model).__name__}. Take a sampler made for it (`genkit zoo list`)."
        ) from None


def _cond(args: Namespace, model: PyTree) -> int | float | np.ndarray | None:
    if args.cond is None:
        return None
    # The run's model is the user's: any callable may be one, and only some know their labels.
    num_labels = getattr(model, "num_labels", None)
    for label in args.cond:
        if num_labels is not None and not (isinstance(label, int) and -1 <= label < num_labels):
            raise ValueError(
                f"--cond must be labels of {args.run}, integers from 0 to {num_labels - 1} (-1 for none); got {label}."
            )
    if len(args.cond) == 1:
        return args.cond[0]
    if len(args.cond) != args.num_samples:
        raise ValueError(f"--cond must be one number or {args.num_samples}, one per draw; got {len(args.cond)}.")
    if isinstance(args.cond[0], int):
        return np.asarray(args.cond, np.int32)
    return np.asarray(args.cond, np.float32)
