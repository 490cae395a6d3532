"""A sampler of one's own: the midpoint method, two evaluations a step, as rows of a table."""

import itertools

import numpy as np

import genkit as gk


def midpoint(grid):
    """Go half a step with the first prediction; go the whole step from its start with the second."""
    rows = []
    for step, (start, end) in enumerate(itertools.pairwise(grid)):
        middle = np.sqrt(start * end) if end > 0 else start / 2
        half = middle / start
        whole = end / start
        first = len(rows)
        # y becomes the state at the middle; base stays at the start of the step.
        rows.append(
            gk.sampling.Row(sigma=start, sigma_start=start, sigma_next=end, step=step, d=half, e={first: 1 - half})
        )
        rows.append(
            gk.sampling.Row(
                sigma=middle, sigma_start=start, sigma_next=end, step=step, corrector=True,
                a=whole, b={first + 1: 1 - whole},
            )
        )  # fmt: skip
    return gk.Table.from_rows(rows, order=2)


sampler = gk.Sampler(midpoint(gk.diffusion.karras(16, 0.02, 20.0)))
