"""Whether the noise levels of a sampler are ones that a model was made for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genkit._core._checks import check, is_concrete
from genkit._core._sampler import Sampler
from genkit._core._table import Table

from ._preconditioned import Preconditioned


# Ends of a schedule are compared up to rounding in single precision.
_SLACK = 1e-5


def check_levels(sampler: Any, denoiser: Any) -> None:
    """Refuse noise levels that the schedule of a network does not reach.

    A network in the coordinates of a schedule has only seen the levels of its times 0 to 1. A level beyond them asks it
    for a time outside: the answer is an extrapolation that no error would tell. Networks with prediction `"F"` see the
    level itself, and analytic denoisers know every level: they pass.

    Args:
        sampler: a table, a table-driven sampler, a grid of levels, or a single level.
        denoiser: a denoiser.

    Raises:
        ValueError: naming the level and the range of the schedule.

    Example:
        >>> import genkit as gk
        >>> net = lambda x, t, cond: x
        >>> denoiser = gk.diffusion.Preconditioned(net, "eps", schedule=gk.diffusion.VE(0.01, 50.0))
        >>> gk.diffusion.check_levels(gk.diffusion.ddim(gk.diffusion.karras(10, 0.02, 50.0)), denoiser)
    """
    if isinstance(sampler, Sampler):
        sampler = sampler.table
    levels = np.asarray(sampler.sigma)[np.asarray(sampler.evaluate)] if isinstance(sampler, Table) else sampler
    leaves = jax.tree.leaves((levels, denoiser))
    traced = not all(is_concrete(leaf) for leaf in leaves)
    if traced or not isinstance(denoiser, Preconditioned) or denoiser.prediction == "F":
        return
    schedule = denoiser.schedule
    low, high = (float(schedule.noise_level(jnp.asarray(t))) for t in (0.0, 1.0))
    levels = np.atleast_1d(np.asarray(levels, np.float64))
    # Zero is where samplers end, not where networks are asked.
    asked = levels[levels > 0]
    outside = asked[(asked < low * (1 - _SLACK)) | (asked > high * (1 + _SLACK))]
    hint = "Choose the ends of the grid within, for example by `time_uniform(schedule, ...)`."
    range_ = f"within the noise levels {low:.4g} to {high:.4g} of the model's schedule"
    check(not outside.size, "sampler", range_, f"level {outside[0]:.4g}" if outside.size else "", hint)
