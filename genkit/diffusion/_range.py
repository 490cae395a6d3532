"""Whether the noise levels of a sampler are ones that a model was made for."""

from typing import Any

from genkit._core import _levels


def check_levels(sampler: Any, denoiser: Any) -> None:
    """Refuse noise levels that the schedule of a network does not reach, as `genkit.sample` does before it draws.

    A network in the coordinates of a schedule has only seen the levels of its times 0 to 1. A level beyond them asks it
    for a time outside: the answer is an extrapolation that no error would tell. Networks with prediction `"F"` see the
    level itself, and analytic denoisers know every level: they pass. A denoiser of your own says what it knows in an
    attribute `noise_range`, a pair of numbers.

    Args:
        sampler: a table, a sampler, a grid of levels, or a single level.
        denoiser: a denoiser.

    Raises:
        ValueError: naming the level and the range of the schedule.

    Example:
        >>> import genkit as gk
        >>> net = lambda x, t, cond: x
        >>> denoiser = gk.diffusion.Preconditioned(net, "eps", schedule=gk.diffusion.VE(0.01, 50.0))
        >>> gk.diffusion.check_levels(gk.diffusion.ddim(gk.diffusion.karras(10, 0.02, 50.0)), denoiser)
    """
    _levels.check_levels(sampler, denoiser)
