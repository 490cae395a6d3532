"""Whether the noise levels of a sampler are ones that a model was made for."""

from typing import Any

import numpy as np

from ._checks import check, is_concrete


# Ends of a range are compared up to rounding in single precision.
_SLACK = 1e-5


def check_levels(levels: Any, denoiser: Any) -> None:
    """Refuse noise levels outside the range of a denoiser, where both are known.

    Args:
        levels: noise levels, or something that has them in an attribute `levels`; zero, where samplers end and networks
            are not asked, passes. Where they are unknown (`None`) or traced nothing is checked.
        denoiser: a denoiser; its range is its attribute `noise_range`, a pair `(low, high)`, `None` for no limits.

    Raises:
        ValueError: naming the level and the range.
    """
    bounds = getattr(denoiser, "noise_range", None)
    # The second of two questions that cost something is only asked where the first has an answer.
    levels = None if bounds is None else getattr(levels, "levels", levels)
    if bounds is None or levels is None or not is_concrete(levels):
        return
    low, high = bounds
    asked = np.atleast_1d(np.asarray(levels, np.float64))
    outside = asked[(asked > 0) & ((asked < low * (1 - _SLACK)) | (asked > high * (1 + _SLACK)))]
    hint = "Choose the ends of the grid within, for example by `time_uniform(schedule, ...)`."
    expected = f"within the noise levels {low:.4g} to {high:.4g} of the model's schedule"
    check(not outside.size, "sampler", expected, f"level {outside[0]:.4g}" if outside.size else "", hint)
