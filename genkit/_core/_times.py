"""The one check of a vector of times."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from genkit._core._checks import check, check_interval
from genkit._core._known import on_host


def check_times(name: str, ts: ArrayLike) -> None:
    """Refuse times that are not one-dimensional, strictly increasing and non-negative."""
    check(jnp.ndim(ts) == 1 and jnp.size(ts) >= 1, name, "times of shape (n,)", f"shape {jnp.shape(ts)}")
    check_interval(name, ts, 0)
    times = on_host(ts)
    if times is None or times.size < 2:
        return
    first = int(np.argmin(np.diff(times)))
    if times[first + 1] > times[first]:
        return
    got = f"{name}[{first}] = {times[first]} then {times[first + 1]}"
    check(False, name, "strictly increasing", got, "Sort the times and drop duplicates.")


def rounding_of(ts: ArrayLike) -> float:
    """Relative rounding of the dtype that known times were given in; 0 for integers."""
    dtype = np.asarray(ts).dtype
    if not np.issubdtype(dtype, np.floating):
        return 0.0
    return float(np.finfo(dtype).eps)
