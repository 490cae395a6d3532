r"""Coefficients of exponential multistep methods, computed on the host in float64.

In the clock $\lambda = -\log\sigma$ every reverse process of the family (probability flow $\tau = 0$, reverse diffusion
$\tau = 1$) is linear up to the prediction $D$:

$$x_t = e^{-(1+\tau^2)h} x_s
  + \int_{\lambda_s}^{\lambda_t} (1+\tau^2) e^{-(1+\tau^2)(\lambda_t-\lambda)} D(\lambda)\,d\lambda
  + \sigma_t \sqrt{1 - e^{-2\tau^2 h}}\, z, \qquad h = \lambda_t - \lambda_s.$$

Replacing $D$ by the polynomial through past predictions gives one weight per prediction. They are integrated by
Gauss-Legendre quadrature, which is exact to rounding here and free of the cancellation of closed forms.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def log_snr_clock(sigma: float) -> float:
    """The clock of exponential methods, minus the log noise level; infinite at zero noise."""
    return np.inf if sigma == 0 else -float(np.log(sigma))


def decay(sigma_start: float, sigma_next: float, tau2: float = 0.0) -> float:
    """Weight of the state in one step, the ratio of noise levels to the power `1 + tau2`."""
    return float((sigma_next / sigma_start) ** (1 + tau2))


def fresh_noise(sigma_start: float, sigma_next: float, tau2: float) -> float:
    """Standard deviation of the noise that one step of the reverse process adds."""
    return float(sigma_next * np.sqrt(1 - (sigma_next / sigma_start) ** (2 * tau2)))


def lagrange(nodes: Sequence[float], at: Float[np.ndarray, " m"]) -> Float[np.ndarray, " k m"]:
    """Values at `at` of the Lagrange polynomials through `nodes`."""
    points = np.asarray(nodes, np.float64)
    values = np.ones((len(points), len(at)))
    for j, node in enumerate(points):
        for other in np.delete(points, j):
            values[j] *= (at - other) / (node - other)
    return values


def exponential_weights(nodes: Sequence[float], start: float, end: float, tau2: float = 0.0) -> Float[np.ndarray, " k"]:
    """Weights of predictions made at the clock times `nodes` in a step from clock time `start` to `end`.

    Args:
        nodes: clock times of the predictions, all different; one before `start` is an extrapolation (predictor), one at
            `end` makes a corrector.
        start: clock time at the start of the step.
        end: clock time at its end; infinite (zero noise) with a single node only.
        tau2: squared stochasticity, 0 for the probability flow, 1 for the reverse diffusion.

    Returns:
        One weight per node; they sum to `1 - exp(-(1 + tau2) (end - start))`.
    """
    rate = 1 + tau2
    if len(nodes) == 1:
        return np.array([-np.expm1(-rate * (end - start))])
    half = (end - start) / 2
    at = start + half * (1 + _NODES)
    kernel = rate * np.exp(-rate * (end - at)) * half * _WEIGHTS
    return lagrange(nodes, at) @ kernel
