"""Pictures of stochastic differential equations: bands of paths, posteriors of the Hurst index, covariance error."""

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from genkit._core._checks import check, check_finite
from genkit.io._plots._figure import saved_figure


def plot_paths(
    path: str | os.PathLike[str],
    ts: ArrayLike,
    x: ArrayLike,
    *,
    levels: tuple[float, ...] = (0.5, 0.9),
    observed: tuple[ArrayLike, ArrayLike] | None = None,
    num_paths: int = 5,
    log_weight: ArrayLike | None = None,
) -> None:
    """Save paths with pointwise credible bands as one PNG, a panel per coordinate.

    Args:
        path: the file to write or to replace.
        ts: times, shape (n,).
        x: paths, shape (num, n) or (num, n, d).
        levels: probabilities inside the bands.
        observed: times and values (m,) or (m, d) to mark; rows with NaN are left out.
        num_paths: how many paths to draw as lines.
        log_weight: their log-weights, shape (num,), such as those of a `gk.sde.Forecast`; equal by default.

    Raises:
        ValueError: if the shapes do not fit.
        NonFiniteError: if a path holds NaN or infinity.

    Example:
        >>> import os, tempfile, numpy as np
        >>> from genkit.io import plot_paths
        >>> x = np.random.default_rng(0).normal(size=(9, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_paths(os.path.join(folder, "paths.png"), np.arange(3), x)
    """
    ts = np.asarray(ts, np.float64)
    x = np.asarray(x, np.float64)
    if x.ndim == 2:
        x = x[..., None]
    check(x.ndim == 3 and x.shape[1] == ts.size, "x", f"of shape (num, {ts.size}, d)", f"shape {x.shape}")
    check_finite("x", x)
    if log_weight is not None:
        x = x[_representatives(log_weight, len(x))]
    with saved_figure(path, x.shape[-1]) as panels:
        for i, panel in enumerate(panels):
            # The widest band first, so that the narrower ones lie on it.
            for level in sorted(levels, reverse=True):
                lower, upper = np.quantile(x[..., i], [(1 - level) / 2, (1 + level) / 2], axis=0)
                panel.fill_between(ts, lower, upper, color="tab:blue", alpha=0.18, linewidth=0, label=f"{level:.0%}")
            panel.plot(ts, x[:num_paths, :, i].T, linewidth=0.7, color="tab:blue", alpha=0.7)
            panel.plot(ts, x[..., i].mean(axis=0), color="black", linewidth=1.2)
            if observed is not None:
                times, values = (np.asarray(v, np.float64) for v in observed)
                values = values.reshape(times.size, -1)
                panel.plot(times, values[:, min(i, values.shape[1] - 1)], "o", color="tab:red", markersize=3.5)
        panels[-1].set_xlabel("time")
        panels[0].legend(frameon=False)


def _representatives(log_weight: ArrayLike, num: int) -> np.ndarray:
    """Indices that turn weighted paths into equally weighted ones: systematic resampling, in shuffled order."""
    weights = np.asarray(log_weight, np.float64)
    check(weights.shape == (num,), "log_weight", f"of shape ({num},), one per path", f"shape {weights.shape}")
    # The largest weight becomes one: exponentials of log-weights as they come may overflow.
    mass = np.cumsum(np.exp(weights - weights.max()))
    index = np.searchsorted(mass, (np.arange(num) + 0.5) / num * mass[-1])
    # The first few are drawn as lines; in order of index they would be copies of one path.
    return np.random.default_rng(0).permutation(index)


def plot_hurst(path: str | os.PathLike[str], draws: ArrayLike, *, reference: tuple[float, float] | None = None) -> None:
    """Save the posterior of a Hurst index as one PNG.

    Args:
        path: the file to write or to replace.
        draws: posterior draws, any shape.
        reference: an estimate and its standard error to mark.

    Raises:
        NonFiniteError: if a draw is NaN or infinite.

    Example:
        >>> import os, tempfile, numpy as np
        >>> from genkit.io import plot_hurst
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_hurst(os.path.join(folder, "hurst.png"), np.random.default_rng(0).beta(9, 3, size=400))
    """
    values = np.asarray(draws, np.float64).ravel()
    check(values.size > 1, "draws", "at least two numbers", f"{values.size}")
    check_finite("draws", values)
    with saved_figure(path, height=3.0) as (panel,):
        panel.hist(values, bins="auto", density=True, color="tab:blue", alpha=0.5)
        if reference is not None:
            center, error = reference
            panel.axvline(center, color="black", linewidth=1.2)
            panel.axvspan(center - error, center + error, color="black", alpha=0.12, linewidth=0)
        panel.axvline(0.5, color="tab:red", linewidth=0.8, linestyle="--")
        panel.set(xlabel="Hurst index", ylabel="density", xlim=(0, 1))


def plot_covariance_error(path: str | os.PathLike[str], hursts: ArrayLike, errors: Mapping[str, ArrayLike]) -> None:
    """Save the relative covariance error of lifts over the Hurst index as one PNG.

    Args:
        path: the file to write or to replace.
        hursts: Hurst indices, shape (n,).
        errors: relative errors (n,) by name of the lift.

    Raises:
        ValueError: if there is nothing to plot.

    Example:
        >>> import os, tempfile
        >>> from genkit.io import plot_covariance_error
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_covariance_error(os.path.join(folder, "error.png"), [0.3, 0.7], {"default": [5e-4, 1e-4]})
    """
    check(len(errors) > 0, "errors", "a dict with at least one lift", "none")
    with saved_figure(path, height=3.2) as (panel,):
        for name, values in errors.items():
            panel.semilogy(np.asarray(hursts), np.asarray(values), "o-", markersize=3, label=name)
        panel.axhline(1e-3, color="black", linewidth=0.8, linestyle="--")
        panel.set(xlabel="Hurst index", ylabel="relative error of the covariance")
        panel.legend(frameon=False)
