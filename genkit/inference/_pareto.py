"""Pareto-smoothed importance sampling: how well draws from one distribution stand for another."""

import numpy as np
from jaxtyping import ArrayLike, Float


def pareto_smooth(log_weights: Float[ArrayLike, " n"]) -> tuple[Float[np.ndarray, " n"], float]:
    r"""Smooth the largest importance weights and estimate the shape of their tail.

    A generalized Pareto distribution is fitted to the $M = \min(n/5, 3\sqrt n)$ largest weights; they are replaced by
    its expected order statistics. The shape $\hat k$ tells whether the draws can be trusted: below 0.5 well, up to 0.7
    with care, above it not.

    Args:
        log_weights: log p - log q at draws of q; -inf is allowed.

    Returns:
        Smoothed log-weights with mean weight 1, and k-hat (infinity with fewer than 5 tail draws or weights all alike
        -inf; -infinity where the tail is flat).

    Source: Vehtari, Simpson, Gelman, Yao & Gabry, "Pareto Smoothed Importance Sampling", JMLR 25 (2024), algorithm 1;
    Zhang & Stephens, Technometrics 51 (2009).
    """
    lw = np.array(log_weights, dtype=np.float64).ravel()
    n = lw.size
    finite_max = np.max(lw, initial=-np.inf)
    if not np.isfinite(finite_max):
        return lw, float("inf")
    lw = lw - finite_max
    khat = float("inf")
    tail = int(np.ceil(min(0.2 * n, 3 * np.sqrt(n))))
    if tail >= 5 and n > tail:
        order = np.argsort(lw)
        top = order[-tail:]
        cutoff = max(lw[order[-tail - 1]], np.log(np.finfo(float).tiny))
        excess = np.exp(lw[top]) - np.exp(cutoff)
        if excess[-1] - excess[0] <= np.finfo(float).eps * 10 or np.all(excess <= 0):
            khat = float("-inf")
        else:
            khat, scale = fit_generalized_pareto(excess[excess > 0])
            if np.isfinite(khat):
                probs = (np.arange(tail) + 0.5) / tail
                lw[top] = np.log(np.exp(cutoff) + generalized_pareto_quantile(probs, khat, scale))
                lw = np.minimum(lw, 0.0)
    return lw - np.log(np.mean(np.exp(lw))), khat


def fit_generalized_pareto(x: Float[np.ndarray, " m"]) -> tuple[float, float]:
    """Fit a generalized Pareto distribution to sorted positive excesses, with a weak prior on the shape.

    Args:
        x: excesses in increasing order.

    Returns:
        Shape and scale.
    """
    n = x.size
    if n < 5:
        return float("inf"), float("nan")
    count = 30 + int(np.sqrt(n))
    grid = 1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))
    grid = grid / (3 * x[int(n / 4 + 0.5) - 1]) + 1 / x[-1]
    shapes = np.mean(np.log1p(-grid[:, None] * x), axis=1)
    profile = n * (np.log(-grid / shapes) - shapes - 1)
    weights = 1 / np.sum(np.exp(profile - profile[:, None]), axis=1)
    keep = weights >= 10 * np.finfo(float).eps
    weights = weights[keep] / np.sum(weights[keep])
    b = np.sum(grid[keep] * weights)
    shape = np.mean(np.log1p(-b * x))
    scale = -shape / b
    shape = (n * shape + 10 * 0.5) / (n + 10)  # prior of ten observations at 0.5
    return float(shape), float(scale)


def generalized_pareto_quantile(probs: Float[np.ndarray, " m"], shape: float, scale: float) -> Float[np.ndarray, " m"]:
    """Quantiles of the generalized Pareto distribution.

    Args:
        probs: probabilities in (0, 1).
        shape: k.
        scale: sigma.

    Returns:
        The quantiles.
    """
    if abs(shape) < 1e-12:
        return -scale * np.log1p(-probs)
    return scale * np.expm1(-shape * np.log1p(-probs)) / shape


def evidence_bracket(log_weights: Float[ArrayLike, " n"]) -> tuple[float, float]:
    """Estimates below and above the log evidence of the region that the draws cover.

    Args:
        log_weights: log p - log q at draws of q; NaN counts as -inf.

    Returns:
        log mean w, and the chi bound (1/2) log mean w^2.
    """
    lw = np.asarray(log_weights, np.float64)
    lw = np.where(np.isnan(lw), -np.inf, lw)
    top = np.max(lw)
    if not np.isfinite(top):
        return float(top), float(top)
    w = np.exp(lw - top)  # the largest weight is one, so that the squares do not overflow
    lower = np.log(np.mean(w)) + top
    upper = 0.5 * np.log(np.mean(w**2)) + top
    return float(lower), float(upper)
