"""`genkit infer`: condition a problem on its data."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import jax

from .._core._files import atomic_write
from ..io import DefinitionError, load_definition, save_draws


def run(args: Namespace) -> int:
    """Run a method on a problem; print the summary, and save it with the samples where asked to.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    problem = load_definition(args.file, ("problem",)).value
    method = load_definition(args.sampler, ("sampler",)).value
    if not callable(getattr(method, "run", None)):
        raise DefinitionError(f"{args.sampler} binds a sampler for `genkit sample`, not a method for `genkit infer`.")
    posterior = method.run(problem, key=jax.random.key(args.seed))  # which is what `gk.infer` does
    table = posterior.summary()
    summary = (table.to_string() if hasattr(table, "to_string") else str(table)) + _diagnosis(posterior)
    if args.out is not None:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        save_draws(out / "samples.npz", posterior.samples)
        atomic_write(out / "summary.txt", summary + "\n")
    print(summary)
    return 0


def _diagnosis(posterior: Any) -> str:
    """What draws from a guide say of themselves; nothing for Markov chains."""
    khat, evidence = getattr(posterior, "khat", None), getattr(posterior, "evidence", None)
    text = ""
    if evidence is not None:
        text += f"\nlog evidence between {evidence[0]:.3f} and {evidence[1]:.3f}, as far as these draws can tell"
    if khat is not None:
        verdict = "the draws can be trusted" if khat <= 0.7 else "above 0.7: the guide misses parts of the posterior"
        text += f"\nPareto k-hat {khat:.2f}: {verdict}"
    return "\n" + text if text else ""
