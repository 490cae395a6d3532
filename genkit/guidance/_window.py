"""Intervals of noise levels."""

from jaxtyping import Array, Bool, Float

from genkit._core._checks import fail
from genkit._core._known import is_known


def check_window(sigma_lo: Float[Array, ""], sigma_hi: Float[Array, ""]) -> None:
    """Refuse intervals that are empty or begin below zero."""
    if not is_known(sigma_lo, sigma_hi):
        return
    low = float(sigma_lo)
    high = float(sigma_hi)
    # Written so that NaN is refused as well.
    if not 0 <= low < high:
        fail("sigma_lo", "non-negative and below `sigma_hi`", f"{low:g} and {high:g}")


def in_window(sigma_lo: Float[Array, ""], sigma_hi: Float[Array, ""], sigma: Float[Array, ""]) -> Bool[Array, ""]:
    """True if the noise level lies in the interval, whose lower end is excluded."""
    return (sigma_lo < sigma) & (sigma <= sigma_hi)
