"""Discrete entropic transport: plans between samples, and the bridges they define."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real, Shaped

from genkit._core._checks import check, check_finite, check_interval, check_positive, check_shape, fail, is_concrete
from genkit.bridge._bridge import Bridge
from genkit.bridge._inputs import as_floats, check_epsilon
from genkit.bridge._potential import MixturePotential
from genkit.bridge._scales import Points
from genkit.divergence import (
    PointCost,
    SinkhornState,
    differentiable_potentials,
    sinkhorn_potentials,
    weighted_value,
)


class DiscretePlan(eqx.Module):
    r"""An entropic plan between two finite sets, $P_{ij} = a_i b_j e^{(f_i + g_j - |x_i - y_j|^2/2)/\epsilon}$.

    The plan itself is never stored: it is computed when asked for.

    Args:
        x: points of the source, shape (n, d).
        y: points of the target, shape (m, d).
        a: weights of the source, shape (n,).
        b: weights of the target, shape (m,).
        epsilon: the regularization: variance of the reference at t = 1.
        value: <P, C> + epsilon KL(P | a x b), plus tau KL of both marginals where these are soft; its gradient is
            that of the envelope theorem.
        state: potentials, marginal error and number of sweeps.
        is_balanced: True if the marginals are exact, and not only held by a divergence.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> plan = gk.bridge.sinkhorn(jnp.zeros((1, 1)), jnp.array([[-1.0], [1.0]]), 0.5)
        >>> print(plan.plan, bool(plan.converged), plan.to_bridge().drift(0.0, jnp.zeros(1)))
        [[0.5 0.5]] True [0.]
    """

    x: Float[Array, " n d"]
    y: Float[Array, " m d"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    epsilon: Float[Array, ""]
    value: Float[Array, ""]
    state: SinkhornState
    is_balanced: bool = eqx.field(static=True)

    @property
    def log_a(self) -> Float[Array, " n"]:
        """Logarithms of the weights of the source."""
        return jnp.log(self.a)

    @property
    def log_b(self) -> Float[Array, " m"]:
        """Logarithms of the weights of the target."""
        return jnp.log(self.b)

    @property
    def potentials(self) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """(f, g) of shapes (n,) and (m,); gradients through them solve one linear system."""
        return self.state.f, self.state.g

    @property
    def marginal_error(self) -> Float[Array, ""]:
        """Total absolute error of the first marginal (its optimality condition where it is soft)."""
        return self.state.marginal_error

    @property
    def converged(self) -> Bool[Array, ""]:
        """True if the error reached the tolerance."""
        return self.state.converged

    @property
    def num_iterations(self) -> Int[Array, ""]:
        """Sweeps taken."""
        return self.state.num_iterations

    @property
    def plan(self) -> Float[Array, " n m"]:
        """The plan as a matrix."""
        return PointCost(self.x, self.y).map_rows(self._row)

    @property
    def cost(self) -> Float[Array, ""]:
        """<P, C>, half the mean squared displacement (times the mass of the plan); row by row, without the plan."""

        def row_cost(costs: Float[Array, " m"], i: Int[Array, ""]) -> Float[Array, ""]:
            row = self._row(costs, i)
            cost = jnp.sum(row * costs)
            if not self.is_balanced:
                return cost
            # The mass of a converged row is known. Where costs are a million epsilon one rounding of a cost, which
            # compilers may do differently here than in the iteration, would be a factor.
            mass = jnp.maximum(jnp.sum(row), jnp.finfo(row.dtype).tiny)
            return jnp.where(self.converged, self.a[i] * cost / mass, cost)

        return jnp.sum(PointCost(self.x, self.y).map_rows(row_cost))

    def _row(self, costs: Float[Array, " m"], i: Int[Array, ""]) -> Float[Array, " m"]:
        """One row of the plan."""
        return self.a[i] * self.b * jnp.exp(self.state.log_density(costs, i, self.epsilon))

    def to_bridge(self) -> Bridge:
        r"""The Schrödinger bridge that joins the two finite sets: the member S = 0 of the mixture family.

        Its coupling from any point is the entropic map's distribution on the points of the target; it knows its source.

        Returns:
            A bridge, whose drift at t = 1 is singular because it ends in points.

        Raises:
            ValueError: if the plan has not converged, or epsilon is too small for the digits of its potentials.
        """
        if is_concrete(self.converged) and not bool(self.converged):
            got = f"a marginal error of {float(self.marginal_error):.3g} after {int(self.num_iterations)} iterations"
            fail("plan", "converged", got, "Raise `max_iterations`, `tol` or `epsilon`.")
        f, g = self.potentials
        center = self.b @ self.y / jnp.sum(self.b)

        def potential(points: Array, log_weights: Array, dual: Array) -> MixturePotential:
            z = points - center
            heights = dual - 0.5 * jnp.sum(z * z, -1)
            self._check_digits(heights)
            weights = log_weights + heights / self.epsilon
            return MixturePotential(weights, z, Points(jnp.zeros_like(weights)), self.epsilon, center)

        gauge = -0.5 * self.x.shape[1] * jnp.log(2.0 * jnp.pi * self.epsilon)
        backward = potential(self.x, self.log_a, f).shifted(gauge)
        return Bridge(potential(self.y, self.log_b, g), backward=backward)

    def _check_digits(self, heights: Float[Array, " n"]) -> None:
        """Refuse known logarithms of weights whose rounding would change the weights."""
        if not (is_concrete(heights) and is_concrete(self.epsilon)):
            return
        rounding = float(jnp.finfo(heights.dtype).eps) * float(np.max(np.abs(np.asarray(heights))))
        if rounding > 0.1 * float(self.epsilon):
            hint = "Use float64, or rescale the points."
            fail("epsilon", f"at least {10 * rounding:.3g} for a bridge in {heights.dtype}", self.epsilon, hint)


def _checked_weights(
    name: str, weights: Shaped[ArrayLike, " n"] | None, size: int, dtype: jnp.dtype, *, balanced: bool
) -> Float[Array, " n"]:
    """Checked weights; equal ones by default."""
    if weights is None:
        return jnp.full(size, 1.0 / size, dtype)
    check_shape(name, weights, (size,), "One weight per point.")
    check_interval(name, weights, 0.0)
    check_finite(name, weights)
    if is_concrete(weights):
        check(np.any(np.asarray(weights) > 0), name, "weights of which one is positive", "zeros")
    if balanced and is_concrete(weights):
        # By NumPy: a sum by JAX would be a tracer inside a trace, known weights or not.
        total = float(np.sum(np.asarray(weights, np.float64)))
        if abs(total - 1.0) >= 1e-4:
            hint = "Divide by the sum, or pass `tau` for an unbalanced problem."
            fail(name, "weights that sum to one", f"a sum of {total:.6g}", hint)
    return jnp.asarray(weights, dtype)


def sinkhorn(
    x: Shaped[ArrayLike, " n d"],
    y: Shaped[ArrayLike, " m _"],
    epsilon: Real[ArrayLike, ""],
    *,
    a: Shaped[ArrayLike, " n"] | None = None,
    b: Shaped[ArrayLike, " m"] | None = None,
    tau: Real[ArrayLike, ""] | None = None,
    tol: Real[ArrayLike, ""] = 1e-6,
    max_iterations: int = 10_000,
) -> DiscretePlan:
    r"""Entropic optimal transport between weighted points, cost $|x - y|^2 / 2$, in the log domain.

    $$\min_P \langle P, C\rangle + \epsilon\, KL(P \mid a \otimes b)\
      \big(+ \tau KL(P1 \mid a) + \tau KL(P'1 \mid b)\big)$$

    epsilon is annealed from the mean cost by halving. Costs are computed block by block, so memory does not grow with
    n m unless the plan is asked for. OTT, POT and torchcfm use the cost $|x-y|^2$: their regularization is 2 epsilon;
    geomloss's `blur` with p = 2 is the square root of epsilon.

    Args:
        x: points of the source, shape (n, d).
        y: points of the target, shape (m, d).
        epsilon: the regularization: variance of the reference at t = 1.
        a: weights of the source, shape (n,), summing to one unless `tau` is given; equal by default.
        b: weights of the target, likewise, shape (m,).
        tau: weight of the marginals' divergence; `None` holds the marginals exactly.
        tol: bound on the total absolute marginal error. Rounding may forbid what it asks; then the plan says so.
        max_iterations: bound on the number of sweeps.

    Returns:
        A `DiscretePlan`. One that has not converged says so: `.converged` is false, `.marginal_error` tells by how
        much, and `.to_bridge()` refuses.

    Raises:
        ValueError: for shapes that differ, weights that are negative or do not sum to one, a bad epsilon.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> plan = gk.bridge.sinkhorn(jnp.zeros((2, 1)), jnp.array([[-1.0], [1.0]]), 0.5)
        >>> print(plan.plan.sum(0), round(float(plan.cost), 4))
        [0.5 0.5] 0.5

    Source: Peyré and Cuturi, "Computational Optimal Transport", 2019, remark 4.23; Chizat et al., "Scaling algorithms
    for unbalanced optimal transport problems", 2018.
    """
    check_epsilon(epsilon)
    check_positive("tol", tol)
    if tau is not None:
        check_positive("tau", tau)
        check_finite("tau", tau, "Leave `tau` out for exact marginals.")
    check_shape("x", x, (None, None), "One point per row.")
    check_shape("y", y, (None, np.shape(x)[1]), "Both ends live in one space.")
    sizes = (np.shape(x)[0], np.shape(y)[0])
    check(min(sizes) > 0, "x and y", "non-empty", f"{sizes[0]} and {sizes[1]} points")
    check_finite("x", x)
    check_finite("y", y)
    x, y = as_floats(x, y)
    a = _checked_weights("a", a, sizes[0], x.dtype, balanced=tau is None)
    b = _checked_weights("b", b, sizes[1], x.dtype, balanced=tau is None)
    epsilon = jnp.asarray(epsilon, x.dtype)
    if tau is not None:
        tau = jnp.asarray(tau, x.dtype)
    state, value = _solve(x, y, a, b, epsilon, tau, jnp.asarray(tol, x.dtype), max_iterations)
    return DiscretePlan(x, y, a, b, epsilon, value, state, tau is None)


@eqx.filter_jit
def _solve(
    x: Float[Array, " n d"],
    y: Float[Array, " m d"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    epsilon: Float[Array, ""],
    tau: Float[Array, ""] | None,
    tol: Float[Array, ""],
    max_iterations: int,
) -> tuple[SinkhornState, Float[Array, ""]]:
    """Iteration, derivatives of its end and value in one program: outside of one, each call would trace the latter."""
    cost = PointCost(x, y)
    # No gradient flows through the iteration, so that the logarithm of a weight of zero does no harm.
    log_a = jnp.log(jax.lax.stop_gradient(a))
    log_b = jnp.log(jax.lax.stop_gradient(b))
    state = sinkhorn_potentials(cost, log_a, log_b, epsilon, tau=tau, tolerance=tol, max_iterations=max_iterations)
    value = weighted_value(cost, a, b, epsilon, state, tau=tau)
    return differentiable_potentials(cost, a, b, epsilon, state, tau=tau), value
