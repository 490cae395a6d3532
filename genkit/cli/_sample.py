"""`genkit sample`: draw from a trained model."""

import hashlib
import inspect
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._core import AbstractSampler, Sampler, Table, sample
from .._core._checks import check, check_finite
from .._core._files import atomic_write
from ..io import DefinitionError, load_definition, load_run, plot_draws, save_draws


def run(args: Namespace) -> int:
    """Draw, and save the draws, their picture and what they came from.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    definition = load_definition(args.sampler, ("sampler",))
    if not isinstance(definition.value, (AbstractSampler, Table)):
        raise DefinitionError(f"{args.sampler} binds a method for `genkit infer`, not a sampler for `genkit sample`.")
    model = load_run(args.run).ema
    _check_fit(definition.value, model, args)
    draws = sample(
        definition.value,
        model,
        args.num_samples,
        key=jax.random.key(args.seed),
        cond=_cond(args),
        shape=args.shape,
        batch_size=args.batch_size,
    )
    check_finite("draws", draws.value, "The model or the sampler's grid may be at fault.")
    out = Path(args.run) / "draws" if args.out is None else Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_draws(out / "draws.npz", draws)
    pictured = plot_draws(out / "draws.png", draws.value)
    facts = {
        "run": str(args.run),
        "sampler": {"path": str(args.sampler), "sha256": hashlib.sha256(definition.text).hexdigest()},
        "num_samples": args.num_samples,
        "cond": args.cond,
        "seed": args.seed,
        "mean_nfe": float(np.mean(draws.nfe)),
    }
    atomic_write(out / "draws.json", json.dumps(facts, indent=2) + "\n")
    picture = f" and {out / 'draws.png'}" if pictured else ""
    shape = tuple(draws.value.shape[1:])
    print(f"{args.num_samples} draws of shape {shape}, {facts['mean_nfe']:.4g} evaluations each: ", end="")
    print(f"{out / 'draws.npz'}{picture}")
    return 0


def _check_fit(sampler: Any, model: Any, args: Namespace) -> None:
    """Refuse a model that cannot be called as the sampler will."""
    check(callable(model), "run", "the run of a denoiser", f"a {type(model).__name__}, which cannot be called")
    if not isinstance(sampler, (Sampler, Table)):
        return
    try:
        inspect.signature(model).bind(None, None, None)
    except TypeError:
        raise DefinitionError(
            f"{args.sampler} draws from a denoiser, called (x, sigma, cond); {args.run} holds a "
            f"{type(model).__name__}. Take a sampler made for it (`genkit zoo list`)."
        ) from None


def _cond(args: Namespace) -> Any:
    if args.cond is None:
        return None
    if len(args.cond) == 1:
        return args.cond[0]
    if len(args.cond) != args.num_samples:
        raise ValueError(f"--cond must be one number or {args.num_samples}, one per draw; got {len(args.cond)}.")
    return np.asarray(args.cond, np.int32 if isinstance(args.cond[0], int) else np.float32)
