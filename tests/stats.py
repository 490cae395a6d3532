"""Statistical assertions with computed tolerances.

Every assertion compares `k` numbers at once and raises a false alarm with probability at most `error` (default one
in a million) for the whole family, whatever `k` is: tolerances are quantiles at `error / (2 k)`, never numbers by feel.
Tests fix their key, so a passing test keeps passing; the error rate is what protects a *changed* but correct
implementation. `detects=` states the smallest discrepancy that matters: the assertion then also refuses (with a
`ValueError`) to run on fewer samples than are needed to see it with probability `1 - error`.

Samples carry their sample axis first, are independent along it unless `ess` says otherwise, and may be pytrees.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import special, stats


FAMILY_ERROR = 1e-6


def z_score(num_comparisons: int = 1, error: float = FAMILY_ERROR) -> float:
    """The two-sided normal quantile at family error `error` over `num_comparisons` numbers (1: 4.89, 100: 5.73)."""
    return float(stats.norm.isf(error / (2 * num_comparisons)))


def dkw_band(num_samples: int, num_comparisons: int = 1, error: float = FAMILY_ERROR) -> float:
    """Half-width of the Dvoretzky-Kiefer-Wolfowitz-Massart band around an empirical distribution function."""
    return float(np.sqrt(np.log(2 * num_comparisons / error) / (2 * num_samples)))


# Sample sizes: from the smallest error that matters to the number of draws.


def sample_size(delta: float, sd: float, num_comparisons: int = 1, error: float = FAMILY_ERROR) -> int:
    """Draws needed for `assert_mean` to see a mean that is off by `delta`, missing it with probability `error`.

    For one number this is `93 (sd / delta)^2`.
    """
    z = z_score(num_comparisons, error) + stats.norm.isf(error)
    return int(np.ceil((z * sd / delta) ** 2))


def sample_size_variance(
    relative: float, kurtosis: float = 3.0, num_comparisons: int = 1, error: float = FAMILY_ERROR
) -> int:
    """Draws needed for `assert_variance` to see a variance off by the factor `1 + relative`."""
    return sample_size(relative, np.sqrt(kurtosis - 1) * (1 + abs(relative)), num_comparisons, error)


def sample_size_distribution(distance: float, num_comparisons: int = 1, error: float = FAMILY_ERROR) -> int:
    """Draws needed for `assert_distribution` to see a law at Kolmogorov distance `distance`."""
    return int(np.ceil(2 * np.log(2 * num_comparisons / error) / distance**2))


# One sample against a known law.


def assert_mean(
    samples: Any,
    expected: Any,
    *,
    sd: Any = None,
    ess: Any = None,
    detects: float | None = None,
    error: float = FAMILY_ERROR,
) -> None:
    """Assert that the mean of `samples` is `expected`, up to `z sd / sqrt(n)`.

    Args:
        samples: array `(n, ...)` or a pytree of such (gradients, say).
        expected: the exact mean: array that broadcasts to `(...)`, or a pytree of the same structure.
        sd: the exact standard deviation, if known; otherwise it is estimated and Student's quantile is used.
        ess: effective sample size where the draws are dependent (scalar or like the mean).
        detects: the smallest error of the mean that matters.
        error: family error.
    """
    x = _columns(samples)
    n, k = x.shape
    mu = _like_columns(samples, expected)
    spread = x.std(axis=0, ddof=1) if sd is None else _like_columns(samples, sd)
    size = np.broadcast_to(np.asarray(n if ess is None else _like_columns(samples, ess), float), (k,))
    z = stats.t.isf(error / (2 * k), np.maximum(size - 1, 1)) if sd is None else z_score(k, error)
    _require_power(detects, size.min(), sample_size(detects, spread.max(), k, error) if detects else 0)
    _compare("mean", x.mean(axis=0), mu, z * spread / np.sqrt(size) + _rounding(samples, x), n)


def assert_variance(
    samples: Any,
    expected: Any,
    *,
    gaussian: bool = False,
    detects: float | None = None,
    error: float = FAMILY_ERROR,
) -> None:
    """Assert that the variance of `samples`, per entry, is `expected`.

    Args:
        samples: array `(n, ...)` or a pytree of such.
        expected: the exact variances.
        gaussian: the law is normal, so that the chi-square quantiles are exact; otherwise the standard error of the
            sample variance is estimated from the fourth moment (take thousands of draws, more for heavy tails).
        detects: the smallest relative error of the variance that matters.
        error: family error.
    """
    x = _columns(samples)
    n, k = x.shape
    sigma2 = _like_columns(samples, expected)
    squares = (x - x.mean(axis=0)) ** 2 * (n / (n - 1))
    observed = squares.mean(axis=0)
    kurtosis = 3.0 if gaussian else float(np.max(np.mean(squares**2, axis=0) / np.maximum(observed, 1e-300) ** 2))
    _require_power(detects, n, sample_size_variance(detects, kurtosis, k, error) if detects else 0)
    if gaussian:
        upper = sigma2 * (stats.chi2.isf(error / (2 * k), n - 1) / (n - 1) - 1)
        lower = sigma2 * (1 - stats.chi2.ppf(error / (2 * k), n - 1) / (n - 1))
        tolerance = np.where(observed > sigma2, upper, lower)
    else:
        tolerance = stats.t.isf(error / (2 * k), n - 1) * squares.std(axis=0, ddof=1) / np.sqrt(n)
    _compare("variance", observed, sigma2, tolerance + 2 * np.abs(x).max() * _rounding(samples, x), n)


def assert_covariance(samples: Any, expected: Any, *, error: float = FAMILY_ERROR) -> None:
    """Assert that the covariance matrix of `samples` `(n, d)` is `expected` `(d, d)`, entry by entry.

    The standard error of each entry is estimated from the products of deviations.
    """
    x = _columns(samples)
    n, d = x.shape
    centered = x - x.mean(axis=0)
    rows, cols = np.triu_indices(d)
    products = centered[:, rows] * centered[:, cols] * (n / (n - 1))
    tolerance = stats.t.isf(error / (2 * len(rows)), n - 1) * products.std(axis=0, ddof=1) / np.sqrt(n)
    wanted = np.broadcast_to(np.asarray(expected, float), (d, d))[rows, cols]
    slack = 2 * np.abs(x).max() * _rounding(samples, x).max()
    _compare(
        "covariance", products.mean(axis=0), wanted, tolerance + slack, n, labels=list(zip(rows, cols, strict=True))
    )


def assert_distribution(
    samples: Any,
    cdf: Callable[[np.ndarray], Any],
    *,
    cdf_left: Callable[[np.ndarray], Any] | None = None,
    detects: float | None = None,
    error: float = FAMILY_ERROR,
) -> None:
    """Assert that every column of `samples` lies within the DKW band of the law with distribution function `cdf`.

    Args:
        samples: array `(n,)` or `(n, ...)`; each trailing index is one column, all of the same law.
        cdf: the exact distribution function, vectorized.
        cdf_left: its left limit `P(X < x)`, needed where the law has atoms (for integers: `lambda x: cdf(x - 1)`).
        detects: the smallest Kolmogorov distance that matters.
        error: family error.
    """
    x = np.sort(_columns(samples), axis=0)
    n, k = x.shape
    _require_power(detects, n, sample_size_distribution(detects, k, error) if detects else 0)
    left = cdf if cdf_left is None else cdf_left
    observed = np.empty(k)
    for j in range(k):
        values = np.unique(x[:, j])
        below = np.searchsorted(x[:, j], values, side="left") / n
        upto = np.searchsorted(x[:, j], values, side="right") / n
        gaps = np.abs(upto - np.asarray(cdf(values))), np.abs(below - np.asarray(left(values)))
        observed[j] = np.max(gaps) if np.isfinite(values).all() else np.nan
    _compare("Kolmogorov distance", observed, np.zeros(k), np.full(k, dkw_band(n, k, error)), n)


def assert_frequencies(draws: Any, probabilities: Any, *, error: float = FAMILY_ERROR) -> None:
    """Assert that integers `draws` in `0..k-1` come up with `probabilities` `(k,)`: exact binomial tails, any `n`."""
    draws, p = np.asarray(draws).ravel(), np.asarray(probabilities, float)
    n, k = len(draws), len(p)
    assert n > 0 and draws.min() >= 0 and draws.max() < k, f"draws must lie in 0..{k - 1}"
    counts = np.bincount(draws, minlength=k)
    tails = 2 * np.minimum(special.bdtr(counts, n, p), np.where(counts > 0, special.bdtrc(counts - 1, n, p), 1.0))
    worst = int(np.argmin(tails))
    assert tails[worst] >= error / k, (
        f"frequency of {worst}: {counts[worst]} of {n}, expected {n * p[worst]:.6g} "
        f"(tail probability {tails[worst]:.3g}, allowed {error / k:.3g})"
    )


# Two samples of laws that should agree.


def assert_same_mean(a: Any, b: Any, *, detects: float | None = None, error: float = FAMILY_ERROR) -> None:
    """Assert that two independent samples `(n, ...)`, `(m, ...)` (or pytrees of such) have the same mean."""
    x, y = _columns(a), _columns(b)
    (n, k), m = x.shape, y.shape[0]
    variances = x.var(axis=0, ddof=1) / n, y.var(axis=0, ddof=1) / m
    se = np.sqrt(sum(variances))
    _require_power(detects, min(n, m), sample_size(detects, se.max() * np.sqrt(min(n, m)), k, error) if detects else 0)
    z = stats.t.isf(error / (2 * k), min(n, m) - 1)  # fewer degrees of freedom than Welch's: on the safe side
    _compare("difference of means", x.mean(axis=0) - y.mean(axis=0), np.zeros(k), z * se + _rounding(a, x), min(n, m))


def assert_same_variance(a: Any, b: Any, *, error: float = FAMILY_ERROR) -> None:
    """Assert that two independent samples have the same variance, per entry."""
    squares = []
    for x in (_columns(a), _columns(b)):
        n = x.shape[0]
        squares.append((x - x.mean(axis=0)) ** 2 * (n / (n - 1)))
    assert_same_mean(squares[0], squares[1], error=error)


def assert_same_distribution(a: Any, b: Any, *, error: float = FAMILY_ERROR) -> None:
    """Assert that two independent samples, column by column, lie within the sum of their DKW bands."""
    x, y = np.sort(_columns(a), axis=0), np.sort(_columns(b), axis=0)
    (n, k), m = x.shape, y.shape[0]
    observed = np.empty(k)
    for j in range(k):
        values = np.concatenate([x[:, j], y[:, j]])
        ecdfs = [np.searchsorted(s[:, j], values, side="right") / len(s) for s in (x, y)]
        observed[j] = np.abs(ecdfs[0] - ecdfs[1]).max() if np.isfinite(values).all() else np.nan
    band = dkw_band(n, 2 * k, error) + dkw_band(m, 2 * k, error)
    _compare("Kolmogorov distance", observed, np.zeros(k), np.full(k, band), min(n, m))


# Inside.


def _columns(samples: Any) -> np.ndarray:
    """Samples as one float64 matrix `(n, k)`."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(samples)]
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError("samples must be arrays with the sample axis first; got a scalar or nothing.")
    n = leaves[0].shape[0]
    if n < 2 or any(leaf.shape[0] != n for leaf in leaves):
        raise ValueError(f"samples must share a sample axis of at least 2; got shapes {[x.shape for x in leaves]}.")
    return np.concatenate([leaf.reshape(n, -1).astype(np.float64) for leaf in leaves], axis=1)


def _like_columns(samples: Any, value: Any) -> np.ndarray:
    """`value` (a tree like `samples` without its sample axis, or something that broadcasts to each leaf) as `(k,)`."""
    leaves, structure = jax.tree.flatten(samples)
    values = jax.tree.leaves(value)
    if len(values) != len(leaves):
        if len(values) != 1:
            raise ValueError(f"expected a tree like {structure}; got {jax.tree.structure(value)}.")
        values = values * len(leaves)
    pairs = zip(leaves, values, strict=True)
    return np.concatenate([np.broadcast_to(np.asarray(v, np.float64), np.shape(s)[1:]).ravel() for s, v in pairs])


def _rounding(samples: Any, x: np.ndarray) -> np.ndarray:
    """What rounding alone may do to a mean: four units in the last place of the largest sample, per column."""
    parts = []
    for leaf in jax.tree.leaves(samples):
        kind = np.asarray(leaf).dtype
        epsilon = float(jax.numpy.finfo(kind).eps) if jax.numpy.issubdtype(kind, jax.numpy.floating) else 0.0
        parts.append(np.full(int(np.prod(np.shape(leaf)[1:], dtype=int)), epsilon))
    return 4 * np.concatenate(parts) * np.abs(x).max(axis=0)


def _require_power(detects: float | None, size: float, needed: int) -> None:
    if detects is not None and size < needed:
        raise ValueError(f"{int(size)} samples cannot show an error of {detects:g}: take at least {needed}.")


def _compare(
    what: str, observed: np.ndarray, expected: np.ndarray, tolerance: np.ndarray, n: int, labels: list | None = None
) -> None:
    deviation = np.abs(observed - expected)
    wrong = ~(deviation <= tolerance)  # written so that NaN fails
    if wrong.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = int(np.argmax(np.where(wrong, np.nan_to_num(deviation / tolerance, nan=np.inf), 0.0)))
        where = worst if labels is None else labels[worst]
        raise AssertionError(
            f"{what} of entry {where} (of {len(observed)}, {int(wrong.sum())} off): got {observed[worst]:.8g}, "
            f"expected {expected[worst]:.8g} within {tolerance[worst]:.3g} from {n} samples; "
            f"off by {deviation[worst]:.3g}"
        )
