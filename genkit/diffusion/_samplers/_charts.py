r"""Charts of the reverse process, and the one generator of coefficients that all multistep samplers share.

A chart writes the reverse process between two noise levels as

$$x_t = k(s, t)\, x_s + \int_{\tau(s)}^{\tau(t)} K(\tau, \tau(t))\, H(\tau)\, d\tau + \nu(s, t)\, z ,$$

with a clock $\tau(\sigma)$ and a prediction $H = p\,x + q\,D$ of the denoiser. Replacing $H$ by the polynomial through
predictions already made gives one weight per prediction: the integral of its Lagrange polynomial against the kernel
$K$. Charts differ in the quantity that they take to vary slowly. Three of them on one step:

- `NoiseInLogLevel`: $H = \varepsilon$, $\tau = \log\sigma$, $k = 1$, $K = e^\tau$. One prediction is DDIM, several are
  DEIS; inner predictions make DPM-Solver.
- `DataInLogLevel`: $H = D$, $\tau = -\log\sigma$, $k = \sigma_t / \sigma_s$, $K = e^{\tau - \tau_t}$. One prediction is
  DDIM again, several are DPM-Solver++; with fresh noise, SA-Solver.
- `VelocityInTime`: $H = \varepsilon - D$, $\tau$ the time of a straight path, $K$ constant: Adams-Bashforth.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


# 32 points are exact to rounding for the kernels below over any step of a usable grid, and free of the cancellation
# that closed forms suffer on short steps.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


class AbstractChart(abc.ABC):
    """Coordinates in which the reverse process is linear up to one slowly varying prediction."""

    @abc.abstractmethod
    def clock(self, sigma: float) -> float:
        """Time on the chart's clock at a positive noise level."""

    @abc.abstractmethod
    def level(self, clock: float) -> float:
        """Noise level at a time of the clock; the inverse of `clock`."""

    @abc.abstractmethod
    def prediction(self, sigma: float) -> tuple[float, float]:
        """Weights `(p, q)` of the state and of the denoised state in the prediction."""

    def carried(self, sigma_start: float, sigma_next: float) -> float:
        """Weight of the state at the start of a step in the state at its end."""
        del sigma_start, sigma_next
        return 1.0

    def kernel(self, clock: Float[np.ndarray, " m"], sigma_next: float) -> Float[np.ndarray, " m"]:
        """Weight per clock time of a prediction made at `clock` in the state at the end of the step."""
        del sigma_next
        return np.ones_like(clock)

    def fresh_noise(self, sigma_start: float, sigma_next: float) -> float:
        """Standard deviation of the noise that one step adds."""
        del sigma_start, sigma_next
        return 0.0

    def weights(self, levels: Sequence[float], sigma_start: float, sigma_next: float) -> Float[np.ndarray, " k"]:
        """Weights of predictions in one step.

        Args:
            levels: noise levels of the predictions, all different; one above `sigma_start` is extrapolated (a
                predictor), one at `sigma_next` makes a corrector.
            sigma_start: noise level at the start of the step.
            sigma_next: noise level at its end, positive.

        Returns:
            One weight per prediction, in the order given.
        """
        start = self.clock(sigma_start)
        half = (self.clock(sigma_next) - start) / 2
        at = start + half * (1 + _NODES)
        nodes = [self.clock(level) for level in levels]
        return lagrange(nodes, at) @ (self.kernel(at, sigma_next) * half * _WEIGHTS)


def lagrange(nodes: Sequence[float], at: Float[np.ndarray, " m"]) -> Float[np.ndarray, " k m"]:
    """Values at `at` of the Lagrange polynomials through `nodes`."""
    points = np.asarray(nodes, np.float64)
    values = np.ones((len(points), len(at)))
    for j, node in enumerate(points):
        for other in np.delete(points, j):
            values[j] *= (at - other) / (node - other)
    return values


@dataclass(frozen=True)
class DataInLogLevel(AbstractChart):
    r"""Data prediction, polynomial in the log noise level, for a process of any stochasticity $\tau$.

    $\tau = 0$ is the probability flow, $\tau = 1$ the reverse diffusion:

    $$x_t = \Bigl(\frac{\sigma_t}{\sigma_s}\Bigr)^{1+\tau^2} x_s
      + \int_{\lambda_s}^{\lambda_t} (1+\tau^2) e^{-(1+\tau^2)(\lambda_t-\lambda)} D(\lambda)\,d\lambda
      + \sigma_t \sqrt{1 - e^{-2\tau^2 (\lambda_t - \lambda_s)}}\, z, \qquad \lambda = -\log\sigma.$$

    Args:
        tau2: squared stochasticity, non-negative.

    Source: Xue et al., "SA-Solver", NeurIPS 2023, equation 11.
    """

    tau2: float = 0.0

    def clock(self, sigma: float) -> float:
        return -float(np.log(sigma))

    def level(self, clock: float) -> float:
        return float(np.exp(-clock))

    def prediction(self, sigma: float) -> tuple[float, float]:
        del sigma
        return 0.0, 1.0

    def carried(self, sigma_start: float, sigma_next: float) -> float:
        return float((sigma_next / sigma_start) ** (1 + self.tau2))

    def kernel(self, clock: Float[np.ndarray, " m"], sigma_next: float) -> Float[np.ndarray, " m"]:
        rate = 1 + self.tau2
        return rate * np.exp(-rate * (self.clock(sigma_next) - clock))

    def fresh_noise(self, sigma_start: float, sigma_next: float) -> float:
        return float(sigma_next * np.sqrt(1 - (sigma_next / sigma_start) ** (2 * self.tau2)))


class NoiseInLogLevel(AbstractChart):
    """Noise prediction, polynomial in the log noise level: DPM-Solver, and DEIS as most run it."""

    def clock(self, sigma: float) -> float:
        return float(np.log(sigma))

    def level(self, clock: float) -> float:
        return float(np.exp(clock))

    def prediction(self, sigma: float) -> tuple[float, float]:
        return 1 / sigma, -1 / sigma

    def kernel(self, clock: Float[np.ndarray, " m"], sigma_next: float) -> Float[np.ndarray, " m"]:
        # d sigma / d log sigma, which is sigma.
        del sigma_next
        return np.exp(clock)


class NoiseInLevel(AbstractChart):
    """Noise prediction, polynomial in the noise level: linear multistep methods."""

    def clock(self, sigma: float) -> float:
        return float(sigma)

    def level(self, clock: float) -> float:
        return float(clock)

    def prediction(self, sigma: float) -> tuple[float, float]:
        return 1 / sigma, -1 / sigma


class VelocityInTime(AbstractChart):
    """Velocity of straight paths, polynomial in their time: the state is `1 + sigma` times that of the path."""

    def clock(self, sigma: float) -> float:
        return float(sigma / (1 + sigma))

    def level(self, clock: float) -> float:
        return float(clock / (1 - clock))

    def prediction(self, sigma: float) -> tuple[float, float]:
        return 1 / sigma, -(1 + sigma) / sigma

    def carried(self, sigma_start: float, sigma_next: float) -> float:
        return float((1 + sigma_next) / (1 + sigma_start))

    def kernel(self, clock: Float[np.ndarray, " m"], sigma_next: float) -> Float[np.ndarray, " m"]:
        return np.full_like(clock, 1 + sigma_next)


@dataclass(frozen=True)
class NetworkInAngle(AbstractChart):
    """Output of EDM's network, polynomial in the angle; exact on Gaussian data of the given standard deviation.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float

    def clock(self, sigma: float) -> float:
        return float(np.arctan(sigma / self.sigma_data))

    def level(self, clock: float) -> float:
        return float(self.sigma_data * np.tan(clock))

    def prediction(self, sigma: float) -> tuple[float, float]:
        norm = np.hypot(sigma, self.sigma_data)
        return float(-self.sigma_data / (norm * sigma)), float(norm / (sigma * self.sigma_data))

    def carried(self, sigma_start: float, sigma_next: float) -> float:
        return float(np.hypot(sigma_next, self.sigma_data) / np.hypot(sigma_start, self.sigma_data))

    def kernel(self, clock: Float[np.ndarray, " m"], sigma_next: float) -> Float[np.ndarray, " m"]:
        # The network's output points from noise to data; in the angle the state has unit standard deviation.
        return np.full_like(clock, -np.hypot(sigma_next, self.sigma_data))
