"""Weights and histories of a lift as Chebyshev series in the Hurst index, computed once on the host in float64."""

import functools

import numpy as np
from scipy import special


HURST_RANGE = (0.01, 0.99)
# Chebyshev in H; weights then good to 1e-8 of the largest, at the ends of the range too.
NUM_COEFFICIENTS = 97
# Truncation error of the covariance below 3e-6 relative for every H in the range.
_HISTORY_RANK = 12
# Relative to unit diagonal: bounds the weights, costs nothing visible in the error.
_RIDGE = 1e-10


def grid(num_terms: int, lo: float, hi: float) -> np.ndarray:
    """The speeds on the unit clock, geometrically spaced."""
    if num_terms == 1:
        return np.array([np.sqrt(lo * hi)])
    return np.geomspace(lo, hi, num_terms)


def kind_one_variance(hurst: np.ndarray | float) -> np.ndarray | float:
    """Variance at t = 1 of the unnormalized Mandelbrot-Van Ness integral, 1 / (Gamma(2H+1) sin(pi H))."""
    return 1.0 / (special.gamma(2 * hurst + 1) * np.sin(np.pi * hurst))


def _solve(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.diagonal(gram))
    system = gram / np.outer(scale, scale) + _RIDGE * np.eye(len(scale))
    return np.linalg.solve(system, target / scale) / scale


def weights_kind_two(gamma: np.ndarray, hurst: float) -> np.ndarray:
    """Mean-square optimal weights on [0, 1] of the unnormalized Riemann-Liouville process, all started at 0."""
    total = gamma[:, None] + gamma[None, :]
    gram = (1 + np.expm1(-total) / total) / total
    a = hurst + 0.5
    target = gamma**-a * special.gammainc(a, gamma) - a * gamma ** -(a + 1) * special.gammainc(a + 1, gamma)
    return _solve(gram, target)


def weights_of_full_variance(gamma: np.ndarray, hurst: float) -> np.ndarray:
    """The weights of kind II, with the variance that the projection loses given back to the fastest process.

    What a projection cannot follow is faster than `gamma[-1]`, hence all but white on the scale of the observations:
    its variance matters, its path does not. Putting the mean variance over [0, 1] right costs nothing and takes the
    error of the evidence at H = .1 from half a nat to a hundredth. Above H = .5 nothing is lost; the correction fades
    out on the way there, because it has a kink where the loss vanishes and the tables need smooth functions of H.
    """
    omega = weights_kind_two(gamma, hurst)
    total = gamma[:, None] + gamma[None, :]
    cross = (1 + np.expm1(-total) / total) / total
    wanted = 1.0 / (2 * hurst * (2 * hurst + 1) * special.gamma(hurst + 0.5) ** 2)
    lost = max(wanted - omega @ cross @ omega, 0.0)
    slope = cross[-1] @ omega
    curvature = cross[-1, -1]
    extra = (np.sqrt(slope**2 + curvature * lost) - slope) / curvature
    omega[-1] += special.erfc((hurst - 0.3) / 0.08) / 2 * extra
    return omega


def _scaled_upper_gamma(a: float, x: np.ndarray) -> np.ndarray:
    """e^x Q(a, x) without overflow: direct for small x, Gauss-Laguerre for large."""
    nodes, weights = np.polynomial.laguerre.laggauss(60)
    far = np.maximum(x, 10.0)
    tail = ((far[:, None] + nodes) ** (a - 1)) @ weights / special.gamma(a)
    return np.where(x > 10, tail, np.exp(np.minimum(x, 10.0)) * special.gammaincc(a, np.minimum(x, 10.0)))


def weights_published(gamma: np.ndarray, hurst: float) -> np.ndarray:
    """Mean-square optimal weights on [0, 1] of the unnormalized kind I process from stationary processes."""
    total = gamma[:, None] + gamma[None, :]
    single = np.expm1(-gamma) / gamma
    gram = (2 + single[:, None] + single[None, :]) / total
    a = hurst + 0.5
    end = np.exp(-gamma) - _scaled_upper_gamma(a, gamma)
    target = 2 * gamma**-a - 1 / (gamma * special.gamma(a + 1)) + end * gamma ** -(a + 1)
    return _solve(gram, target)


def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre on panels graded towards 0, on (0, 1)."""
    edges = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 28)])
    nodes, weights = np.polynomial.legendre.leggauss(12)
    left = edges[:-1, None]
    width = np.diff(edges)[:, None]
    return (left + width * (nodes + 1) / 2).ravel(), (width * weights / 2).ravel()


class _History:
    """Projection of h(t), kind I minus kind II, on 1 - exp(-gamma t): a factor F(H) of the coefficients' covariance.

    h(t) = kappa int (e^{-g t} - 1) Y_g(0) g^{-(H + 1/2)} dg, kappa = cos(pi H) / pi, with Cov(Y_g(0), Y_g'(0)) =
    1 / (g + g'): a trapezoid sum on a very wide logarithmic grid, whose small end matters as H -> 1, large as H -> 0.
    """

    def __init__(self, gamma: np.ndarray):
        t, w = _quadrature()
        # By measurement, for hi = 1e2, 1e3 and 1e4.
        self.fade = np.clip(0.0175 * np.log10(gamma[-1]), 0.02, 0.07)
        self.x = np.arange(np.log(1e-150), np.log(1e18), 1.5)
        basis = -np.expm1(-np.outer(t, gamma)) * np.sqrt(w)[:, None]
        wanted = np.expm1(-np.outer(t, np.exp(self.x))) * np.sqrt(w)[:, None]
        scale = np.linalg.norm(basis, axis=0)
        self.projection = np.linalg.lstsq(basis / scale, wanted, rcond=1e-10)[0] / scale[:, None]
        self.root = np.linalg.cholesky(0.5 / np.cosh((self.x[:, None] - self.x[None, :]) / 2))
        # One set of directions serves every H: the leading right singular vectors of the family of functions of t.
        # |metric c| is the norm of the function with coefficients c.
        self.metric = np.linalg.qr(basis, mode="r")
        family = [self.metric @ self(h) for h in np.linspace(*HURST_RANGE, 60)]
        self.directions = np.linalg.svd(np.vstack(family), full_matrices=False)[2][:_HISTORY_RANK].T

    def __call__(self, hurst: float) -> np.ndarray:
        """The full factor at one H, normalized to unit variance of the whole process."""
        return _history_scale(hurst) * (self.projection * (np.exp(-hurst * self.x) * 1.5)) @ self.root

    def compressed(self, hurst: float) -> np.ndarray:
        """The factor in the common directions, with the variance of the speeds beyond the grid given back.

        All of them contribute -1 at any t > 0, so what is missing is one constant function: 44 % of the covariance at
        H = .01. Its variance goes along the direction e in which the factor already varies like that constant. At
        larger H the little that is missing balances the error of the projection, so the correction fades out there.
        """
        factor = self(hurst) @ self.directions
        constant = self.projection[:, -1]
        functions = self.metric @ factor
        # Bounds e where nothing is missing.
        system = functions @ functions.T + 1e-4 * np.eye(len(functions))
        e = functions.T @ np.linalg.solve(system, self.metric @ constant)
        missing = self.missing(hurst) * np.exp(-((hurst / self.fade) ** 4))
        return factor + missing / (1 + np.sqrt(1 + e @ e * missing)) * np.outer(constant, e)

    def missing(self, hurst: float) -> float:
        """Variance of the constant function that the speeds beyond the grid add, their correlation with it included."""
        # Speeds of the grid that are constant functions too; slower ones are uncorrelated with the rest.
        near = 20
        x = self.x[-near] + 1.5 * np.arange(440)
        root = _history_scale(hurst) * 1.5 * np.exp(-hurst * x)
        cov = np.outer(root, root) * 0.5 / np.cosh((x[:, None] - x[None, :]) / 2)
        return float(cov.sum() - cov[:near, :near].sum())


def _history_scale(hurst: float) -> float:
    """Factor kappa of the history, over the standard deviation of the whole process at t = 1."""
    return np.cos(np.pi * hurst) / np.pi / np.sqrt(kind_one_variance(hurst))


@functools.cache
def start_projection(num_terms: int, lo: float, hi: float) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms x (m,) of the history's own speeds g, and the matrix (m, r) from covariances to loadings.

    With c a variable's covariances with the sqrt(g) Y_g(0), `c @ matrix` are its covariances with the normals that the
    compressed factor of the history multiplies.
    """
    history = _history(num_terms, lo, hi)
    return history.x, np.linalg.solve(history.root.T, history.directions)


@functools.cache
def _history(num_terms: int, lo: float, hi: float) -> _History:
    return _History(grid(num_terms, lo, hi))


@functools.cache
def chebyshev_tables(num_terms: int, lo: float, hi: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev coefficients (n, K) of the weights and (n, K, r) of the history factor.

    The weights are tabulated without the normalizer of the variance, which is not analytic at H = 0 and H = 1.
    """
    gamma = grid(num_terms, lo, hi)
    n = NUM_COEFFICIENTS
    x = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    hursts = np.mean(HURST_RANGE) + np.ptp(HURST_RANGE) / 2 * x
    solve = weights_published if kind == "I-published" else weights_of_full_variance
    basis = np.cos(np.outer(np.arange(n), np.arccos(x))) * 2 / n
    basis[0] /= 2
    omega = basis @ np.array([solve(gamma, h) for h in hursts])
    if kind == "I":
        history = _history(num_terms, lo, hi)
        factors = np.array([history.compressed(h) for h in hursts])
        factor = np.tensordot(basis, factors, axes=1)
    else:
        factor = np.zeros((n, num_terms, 0))
    for table in (omega, factor):
        table.setflags(write=False)
    return omega, factor
