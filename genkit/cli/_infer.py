"""`genkit infer`: condition a problem on its data."""

from argparse import Namespace
from pathlib import Path

import jax

from genkit.cli._output import check_output, write_results
from genkit.cli._zoo import find_definition
from genkit.inference import Posterior, infer
from genkit.io import DefinitionError, Method, load_definition, save_draws
from genkit.storage import atomic_write


def run(args: Namespace) -> int:
    """Run a method on a problem; print the summary, and save it with the samples where asked to.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    # Before anything else: an hour of inference must not end at a folder that cannot be written.
    if args.out is not None:
        check_output(Path(args.out))
    problem = load_definition(find_definition(args.file), ("problem",)).value
    method = load_definition(find_definition(args.sampler), ("sampler",)).value
    if not isinstance(method, Method):
        raise DefinitionError(f"{args.sampler} binds a sampler for `genkit sample`, not a method for `genkit infer`.")
    posterior = infer(problem, method, key=jax.random.key(args.seed))
    summary = str(posterior.summary().to_string()) + _diagnosis(posterior)
    # Printed first: whatever happens to the files, the numbers have been seen.
    print(summary, flush=True)
    if args.out is not None:

        def write(folder: Path) -> None:
            save_draws(folder / "samples.npz", posterior.samples)
            atomic_write(folder / "summary.txt", summary + "\n")

        write_results(Path(args.out), write)
    return 0


def _diagnosis(posterior: Posterior) -> str:
    """Lines on how far draws from a guide can be believed; none for Markov chains."""
    lines = []
    if posterior.evidence is not None:
        lower, upper = posterior.evidence
        lines.append(f"log evidence between {lower:.3f} and {upper:.3f}, as far as these draws can tell")
    khat = posterior.khat
    if khat is not None:
        # Above 0.7 the variance of the weights does not settle with more draws.
        verdict = "the draws can be trusted"
        if khat > 0.7:
            verdict = "above 0.7: the guide misses parts of the posterior"
        lines.append(f"Pareto k-hat {khat:.2f}: {verdict}")
    if not lines:
        return ""
    return "\n\n" + "\n".join(lines)
