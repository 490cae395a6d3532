"""Entropic optimal transport: one Sinkhorn iteration in the log domain, and the divergence built on it."""

import abc
import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int

from genkit._core._checks import check, check_count, check_finite, check_positive, describe
from genkit._core._fields import as_number

from ._pairs import as_samples, map_rows, squares


class AbstractCost(eqx.Module):
    """A cost between two finite sets, seen through its rows."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Numbers of sources and of targets."""

    @abc.abstractmethod
    def transpose(self) -> "AbstractCost":
        """The cost from targets to sources."""

    @abc.abstractmethod
    def map_rows(self, function) -> Array:
        """`function(row, i)` for every source `i`, `row` its costs to all targets."""


class MatrixCost(AbstractCost):
    """A cost given as a matrix.

    Args:
        matrix: costs `(n, m)`, finite.

    Example:
        >>> import genkit as gk
        >>> gk.divergence.MatrixCost([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0]]).shape
        (2, 3)
    """

    matrix: Float[Array, " n m"] = eqx.field(converter=as_number)

    def __check_init__(self):
        check(self.matrix.ndim == 2 and self.matrix.size > 0, "cost", "a matrix (n, m)", describe(self.matrix))
        check_finite("cost", self.matrix)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of sources and of targets."""
        sources, targets = self.matrix.shape
        return sources, targets

    def transpose(self) -> "MatrixCost":
        """The cost from targets to sources."""
        return MatrixCost(self.matrix.T)

    def map_rows(self, function) -> Array:
        """`function(row, i)` for every source `i`, all at once: the matrix is in memory anyway."""
        return jax.vmap(function)(self.matrix, jnp.arange(self.matrix.shape[0]))


class PointCost(AbstractCost):
    """Half the squared distance between two sets of points, computed block by block and never stored.

    Args:
        x: sources `(n, d)`.
        y: targets `(m, d)`.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> gk.divergence.PointCost(jnp.zeros((2, 3)), jnp.ones((4, 3))).shape
        (2, 4)
    """

    x: Float[Array, " n d"]
    y: Float[Array, " m d"]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of sources and of targets."""
        return self.x.shape[0], self.y.shape[0]

    def transpose(self) -> "PointCost":
        """The cost from targets to sources."""
        return PointCost(self.y, self.x)

    def map_rows(self, function) -> Array:
        """`function(row, i)` for every source `i`, a block of sources at a time."""
        rows = (self.x, jnp.arange(self.x.shape[0]))
        return map_rows(lambda row: function(0.5 * squares(row[0], self.y), row[1]), rows, self.y)


class SinkhornState(eqx.Module):
    """Potentials of an entropic transport problem, and how good they are.

    Args:
        f: potential of the sources.
        g: potential of the targets.
        marginal_error: total absolute difference between the first marginal of the plan and what it should be (for
            unbalanced problems: what the optimality condition says it should be).
        num_iterations: number of sweeps, each an update of both potentials.
        converged: whether `marginal_error` reached the tolerance (or what rounding permits, where that is more).
    """

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    marginal_error: Float[Array, ""]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]


class _Carry(NamedTuple):
    f: Array
    g: Array
    epsilon: Array
    error: Array
    floor: Array
    step: Array


def sinkhorn_potentials(
    cost: AbstractCost,
    log_a: Float[Array, " n"],
    log_b: Float[Array, " m"],
    epsilon: Float[ArrayLike, ""],
    *,
    tau: Float[ArrayLike, ""] | None = None,
    tolerance: Float[ArrayLike, ""] = 1e-6,
    max_iterations: int = 10_000,
    symmetric: bool = False,
) -> SinkhornState:
    r"""Potentials of entropic optimal transport, by Sinkhorn's iteration on logarithms.

    $$\min_P\; \langle P, C \rangle + \varepsilon\, KL(P \mid a \otimes b), \qquad
      P_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon},$$

    over plans with marginals `a` and `b`. A sweep sets $f_i \leftarrow -\rho\,\varepsilon \log \sum_j b_j
    e^{(g_j - C_{ij})/\varepsilon}$, then `g` likewise, with $\rho = 1$, or $\rho = \tau/(\tau + \varepsilon)$ when the
    marginals are only held by $\tau\, KL$. The regularization starts at the mean cost and halves with every sweep until
    it is `epsilon`. No gradient flows through the potentials; that of the value does not need it (see
    `transport_value`).

    Args:
        cost: `MatrixCost` or `PointCost`.
        log_a: logarithms of the weights of the sources; `-inf` for none.
        log_b: logarithms of the weights of the targets; `-inf` for none.
        epsilon: regularization, positive, in the units of the cost.
        tau: weight of the marginals' divergence; `None` makes them exact.
        tolerance: bound on the marginal error. Rounding limits what can be reached: a bound below that is raised to it.
        max_iterations: bound on the number of sweeps.
        symmetric: whether both sides are the same problem (`x = y`, `a = b`): then one averaged update, which
            converges within a few sweeps.

    Returns:
        A `SinkhornState`.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> cost, half = gk.divergence.MatrixCost(jnp.array([[0.0, 1.0], [1.0, 0.0]])), jnp.log(jnp.full(2, 0.5))
        >>> state = gk.divergence.sinkhorn_potentials(cost, half, half, 0.1)
        >>> state.f.shape, bool(state.converged)
        ((2,), True)

    Source: Peyre and Cuturi, "Computational Optimal Transport", 2019, remark 4.23 (log domain); Chizat et al., "Scaling
    Algorithms for Unbalanced Optimal Transport Problems", Mathematics of Computation 2018, section 4; Feydy et al.,
    "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019, equation 25 (symmetric).
    """
    check_positive("epsilon", epsilon)
    check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    if tau is not None:
        check_positive("tau", tau)
    for name, weights, size in (("a", log_a, cost.shape[0]), ("b", log_b, cost.shape[1])):
        check(weights.shape == (size,), name, f"of shape ({size},)", f"shape {weights.shape}")
    epsilon, tolerance = jnp.asarray(epsilon, log_a.dtype), jnp.asarray(tolerance, log_a.dtype)
    tau = None if tau is None else jnp.asarray(tau, log_a.dtype)
    fixed = jax.lax.stop_gradient((cost, log_a, log_b, epsilon, tau, tolerance))
    return _iterate(*fixed, max_iterations=max_iterations, symmetric=symmetric)


@eqx.filter_jit
def _iterate(
    cost: AbstractCost,
    log_a: Float[Array, " n"],
    log_b: Float[Array, " m"],
    epsilon: Float[Array, ""],
    tau: Float[Array, ""] | None,
    tolerance: Float[Array, ""],
    max_iterations: int,
    symmetric: bool,
) -> SinkhornState:
    """The iteration itself; compiled here for the reason given in `_pairs.py`."""
    dtype, back = log_a.dtype, cost.transpose()
    a = jnp.exp(log_a)
    mean_cost = jnp.sum(a * cost.map_rows(lambda row, i: jnp.sum(jnp.exp(log_b) * row))) / jnp.sum(a)

    def damping(strength: Array) -> Array:
        return jnp.ones((), dtype) if tau is None else tau / (tau + strength)

    def sweep(carry: _Carry) -> _Carry:
        strength = carry.epsilon
        f = -damping(strength) * soft_minimum(cost, carry.g, log_b, strength)
        # The row marginal of the old pair of potentials is a * exp((f_old - f_new) / epsilon): no further pass needed.
        error = jnp.sum(a * jnp.abs(jnp.expm1((carry.f - f) / (damping(strength) * strength))))
        if symmetric:
            f = 0.5 * (carry.f + f)
            g = f
        else:
            g = -damping(strength) * soft_minimum(back, f, log_a, strength)
        # Potentials of size s carry rounding errors of about s * eps, which the exponent divides by epsilon.
        size = jnp.maximum(jnp.max(jnp.abs(f)), jnp.max(jnp.abs(g)))
        floor = 2 * jnp.finfo(dtype).eps * jnp.sum(a) * (1 + size / strength)
        settled = jnp.where(strength > epsilon, jnp.inf, error)
        return _Carry(f, g, jnp.maximum(0.5 * strength, epsilon), settled, floor, carry.step + 1)

    def unsettled(carry: _Carry) -> Array:
        return (carry.step < max_iterations) & ~(carry.error <= jnp.maximum(tolerance, carry.floor))

    start = _Carry(
        jnp.zeros(cost.shape[0], dtype),
        jnp.zeros(cost.shape[1], dtype),
        jnp.maximum(mean_cost.astype(dtype), epsilon),
        jnp.asarray(jnp.inf, dtype),
        jnp.zeros((), dtype),
        jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(unsettled, sweep, start)
    converged = end.error <= jnp.maximum(tolerance, end.floor)
    return SinkhornState(end.f, end.g, end.error, end.step, converged)


def soft_minimum(
    cost: AbstractCost, g: Float[Array, " m"], log_b: Float[Array, " m"], epsilon: Float[Array, ""]
) -> Float[Array, " n"]:
    r"""For every source the value $\varepsilon \log \sum_j b_j e^{(g_j - C_{ij})/\varepsilon}$."""
    offset = log_b + g / epsilon
    return epsilon * cost.map_rows(lambda row, i: jax.nn.logsumexp(offset - row / epsilon))


def transport_value(
    cost: AbstractCost,
    log_a: Float[Array, " n"],
    log_b: Float[Array, " m"],
    epsilon: Float[ArrayLike, ""],
    state: SinkhornState,
    *,
    tau: Float[ArrayLike, ""] | None = None,
) -> Float[Array, ""]:
    r"""The value $\langle P, C\rangle + \varepsilon\, KL(P \mid a \otimes b)$ (plus $\tau\,KL$ of both marginals) at the optimum.

    It is the dual objective at the potentials. Because they maximize it, its derivative with the potentials held fixed
    is the derivative of the value: gradients in points, cost, weights and `epsilon` are exact at convergence, and cost
    one pass over the pairs.

    Args:
        cost: the cost that was solved.
        log_a: logarithms of the weights of the sources.
        log_b: logarithms of the weights of the targets.
        epsilon: the regularization that was solved with.
        state: what `sinkhorn_potentials` returned.
        tau: the weight of the marginals' divergence that was solved with.

    Returns:
        The value, a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> cost, half = gk.divergence.MatrixCost(jnp.array([[0.0, 1.0], [1.0, 0.0]])), jnp.log(jnp.full(2, 0.5))
        >>> state = gk.divergence.sinkhorn_potentials(cost, half, half, 0.01)
        >>> value = gk.divergence.transport_value(cost, half, half, 0.01, state)
        >>> bool(jnp.abs(value - 0.01 * jnp.log(2.0)) < 1e-5)  # nothing moves; the entropy of the plan remains
        True

    Source: Peyre and Cuturi, "Computational Optimal Transport", 2019, proposition 4.4 and section 9.1.
    """  # noqa: E501
    epsilon = jnp.asarray(epsilon, state.f.dtype)
    f, g = jax.lax.stop_gradient((state.f, state.g))
    a, b = jnp.exp(log_a), jnp.exp(log_b)

    def row_mass(row: Array, i: Array) -> Array:
        return a[i] * jnp.sum(b * jnp.exp((f[i] + g - row) / epsilon))

    mass = jnp.sum(cost.map_rows(row_mass))
    if tau is None:
        held = jnp.sum(a * _finite(f)) + jnp.sum(b * _finite(g))
    else:
        held = -jnp.asarray(tau) * (jnp.sum(a * jnp.expm1(-f / tau)) + jnp.sum(b * jnp.expm1(-g / tau)))
    return held + epsilon * (jnp.sum(a) * jnp.sum(b) - mass)


def sinkhorn_divergence(
    x: Inexact[ArrayLike, " n *shape"],
    y: Inexact[ArrayLike, " m *shape"],
    epsilon: Float[ArrayLike, ""],
    *,
    tolerance: Float[ArrayLike, ""] = 1e-6,
    max_iterations: int = 10_000,
) -> Float[Array, ""]:
    r"""Sinkhorn divergence $W_\varepsilon(x, y) - \tfrac12 W_\varepsilon(x, x) - \tfrac12 W_\varepsilon(y, y)$ of two samples.

    $W_\varepsilon = \min_P \langle P, C\rangle + \varepsilon\, KL(P \mid a \otimes b)$ with $C = |x - y|^2/2$ and equal
    weights; the entropy is included. It is zero for equal samples, tends to half the squared Wasserstein distance for small
    `epsilon` and to half the squared distance of the means for large ones.

    Args:
        x: first sample `(n, *shape)`.
        y: second sample `(m, *shape)`.
        epsilon: regularization, positive, in the units of the cost.
        tolerance: bound on the marginal error; raised to what rounding permits.
        max_iterations: bound on the number of sweeps.

    Returns:
        The divergence, a scalar; differentiable in both samples.

    Raises:
        ValueError: for empty samples, shapes that differ, an `epsilon` that is not positive.
        NonFiniteError: for NaN or infinity.
        RuntimeError: if the iteration did not converge.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> round(float(gk.divergence.sinkhorn_divergence(jnp.zeros((3, 2)), jnp.ones((2, 2)), 0.1)), 5)
        1.0

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019,
    equation 3.
    """  # noqa: E501
    check_positive("epsilon", epsilon)
    x, y = as_samples(x=x, y=y)
    return _divergence(x, y, jnp.asarray(epsilon, x.dtype), jnp.asarray(tolerance, x.dtype), max_iterations)


@eqx.filter_jit
def _divergence(
    x: Float[Array, " n d"],
    y: Float[Array, " m d"],
    epsilon: Float[Array, ""],
    tolerance: Float[Array, ""],
    max_iterations: int,
) -> Float[Array, ""]:
    """The divergence of samples as matrices; compiled here for the reason given in `_pairs.py`."""

    def value(a: Array, b: Array, symmetric: bool) -> tuple[Array, Array]:
        cost = PointCost(a, b)
        log_a, log_b = (jnp.full(n, -math.log(n), x.dtype) for n in cost.shape)
        state = sinkhorn_potentials(
            cost, log_a, log_b, epsilon, tolerance=tolerance, max_iterations=max_iterations, symmetric=symmetric
        )
        return transport_value(cost, log_a, log_b, epsilon, state), state.converged

    (across, first), (within_x, second), (within_y, third) = value(x, y, False), value(x, x, True), value(y, y, True)
    return eqx.error_if(
        across - 0.5 * within_x - 0.5 * within_y,
        ~(first & second & third),
        f"`sinkhorn_divergence` did not converge within {max_iterations} sweeps. Try a larger `epsilon` (about 0.05 of "
        "the mean cost is usual), a larger `max_iterations`, or float64.",
    )


def _finite(potential: Float[Array, " n"]) -> Float[Array, " n"]:
    """Potentials of points without weight may be infinite; they do not count."""
    return jnp.where(jnp.isfinite(potential), potential, 0)
