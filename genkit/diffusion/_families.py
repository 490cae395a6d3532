r"""Four ways to write the probability flow, each linear in time but for one prediction.

In every family the flow reads $du = K(\tau)\, H\, d\tau$ with $u = x / s(\sigma)$, a clock $\tau(\sigma)$ and a
quantity $H = p\,x + q\,D$ that the denoiser gives. Extrapolating $H$ by a polynomial in the clock makes a multistep
method, evaluating it at inner points a one-step method; families differ in what they take to vary slowly.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ._coefficients import lagrange


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


class Family(abc.ABC):
    """One way to write the flow."""

    @abc.abstractmethod
    def clock(self, sigma: float) -> float:
        """Time on the family's clock."""

    @abc.abstractmethod
    def level(self, clock: float) -> float:
        """The noise level at a time of the clock."""

    def scale(self, sigma: float) -> float:
        """What the state is divided by; one unless said otherwise."""
        del sigma
        return 1.0

    def kernel(self, clock: np.ndarray) -> np.ndarray:
        """The factor of the prediction; one unless said otherwise."""
        return np.ones_like(clock)

    @abc.abstractmethod
    def push(self, sigma: float) -> tuple[float, float]:
        """Weights of the state and of the prediction in what enters the history."""

    def weights(self, nodes: Sequence[float], start: float, end: float) -> Float[np.ndarray, " k"]:
        """Weights of predictions made at the clock times `nodes` in a step from `start` to `end`."""
        half = (end - start) / 2
        at = start + half * (1 + _NODES)
        return lagrange(nodes, at) @ (self.kernel(at) * half * _WEIGHTS)


class NoiseInLog(Family):
    """The noise prediction, polynomial in the log noise level: DPM-Solver, and DEIS as most run it."""

    def clock(self, sigma: float) -> float:
        """Logarithm of the noise level."""
        return float(np.log(sigma))

    def level(self, clock: float) -> float:
        """Its inverse."""
        return float(np.exp(clock))

    def kernel(self, clock: np.ndarray) -> np.ndarray:
        """`d sigma / d log sigma`."""
        return np.exp(clock)

    def push(self, sigma: float) -> tuple[float, float]:
        """The predicted noise."""
        return 1 / sigma, -1 / sigma


class NoiseInSigma(Family):
    """The noise prediction, polynomial in the noise level: linear multistep methods."""

    def clock(self, sigma: float) -> float:
        """The noise level itself."""
        return float(sigma)

    def level(self, clock: float) -> float:
        """The noise level itself."""
        return float(clock)

    def push(self, sigma: float) -> tuple[float, float]:
        """The predicted noise."""
        return 1 / sigma, -1 / sigma


class Velocity(Family):
    """The velocity of straight paths, polynomial in their time."""

    def clock(self, sigma: float) -> float:
        """Time of a straight path."""
        return float(sigma / (1 + sigma))

    def level(self, clock: float) -> float:
        """Its inverse."""
        return float(clock / (1 - clock))

    def scale(self, sigma: float) -> float:
        """Straight paths shrink the data by `1 / (1 + sigma)`."""
        return float(1 + sigma)

    def push(self, sigma: float) -> tuple[float, float]:
        """The velocity: predicted noise minus predicted data."""
        return 1 / sigma, -(1 + sigma) / sigma


@dataclass(frozen=True)
class Angle(Family):
    """The prediction of EDM's network, polynomial in the angle; exact on Gaussian data of the given deviation.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float

    def clock(self, sigma: float) -> float:
        """The angle between noise and data."""
        return float(np.arctan(sigma / self.sigma_data))

    def level(self, clock: float) -> float:
        """Its inverse."""
        return float(self.sigma_data * np.tan(clock))

    def scale(self, sigma: float) -> float:
        """The standard deviation of the noisy data."""
        return float(np.hypot(sigma, self.sigma_data))

    def kernel(self, clock: np.ndarray) -> np.ndarray:
        """The network's output points from noise to data."""
        return -np.ones_like(clock)

    def push(self, sigma: float) -> tuple[float, float]:
        """The network's output: what is left of the data beyond the linear part."""
        norm = np.hypot(sigma, self.sigma_data)
        return float(-self.sigma_data / (norm * sigma)), float(norm / (sigma * self.sigma_data))
