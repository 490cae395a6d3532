"""Discrete entropic transport: plans between samples, the bridges they define, and the Monge gap."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from genkit._core._checks import check, check_finite, check_interval, check_positive, check_shape, is_concrete
from genkit.divergence import MatrixCost, PointCost, sinkhorn_potentials, transport_value

from ._bridge import Bridge
from ._closed_form import check_epsilon
from ._potential import MixturePotential
from ._scale import Zero


class DiscretePlan(eqx.Module):
    r"""An entropic plan between two finite sets, $P_{ij} = a_i b_j e^{(f_i + g_j - |x_i - y_j|^2/2)/\epsilon}$.

    The plan itself is never stored: it is computed when asked for.

    Args:
        x: points of the source, shape (n, d).
        y: points of the target, shape (m, d).
        log_a: logarithms of the weights of the source, shape (n,).
        log_b: logarithms of the weights of the target, shape (m,).
        potentials: (f, g) of shapes (n,) and (m,); gradients through them solve one linear system (m x m).
        epsilon: the regularization: variance of the reference at t = 1.
        value: <P, C> + epsilon KL(P | a x b), plus tau KL of both marginals where these are soft; its gradient is
            that of the envelope theorem.
        marginal_error: total absolute error of the first marginal (its optimality condition where it is soft).
        converged: whether the error reached the tolerance, or what rounding permits.
        num_iterations: sweeps taken.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> plan = gk.bridge.sinkhorn(jnp.zeros((1, 1)), jnp.array([[-1.0], [1.0]]), 0.5)
        >>> print(plan.plan, bool(plan.converged), plan.to_bridge().drift(0.0, jnp.zeros(1)))
        [[0.5 0.5]] True [0.]
    """

    x: Float[Array, " n d"]
    y: Float[Array, " m d"]
    log_a: Float[Array, " n"]
    log_b: Float[Array, " m"]
    potentials: tuple[Float[Array, " n"], Float[Array, " m"]]
    epsilon: Float[Array, ""]
    value: Float[Array, ""] = eqx.field(kw_only=True)
    marginal_error: Float[Array, ""] = eqx.field(kw_only=True)
    converged: Bool[Array, ""] = eqx.field(kw_only=True)
    num_iterations: Int[Array, ""] = eqx.field(kw_only=True)

    @property
    def plan(self) -> Float[Array, " n m"]:
        """The plan as a matrix."""
        f, g = self.potentials
        exponent = (f[:, None] + g - _cost_matrix(self.x, self.y)) / self.epsilon
        return jnp.exp(exponent + self.log_a[:, None] + self.log_b)

    @property
    def cost(self) -> Float[Array, ""]:
        """<P, C>, half the mean squared displacement (times the mass of the plan); row by row, without the plan."""
        f, g = self.potentials

        def row(x, f, log_a):
            cost = 0.5 * jnp.sum((x - self.y) ** 2, -1)
            return jnp.sum(jnp.exp((f + g - cost) / self.epsilon + log_a + self.log_b) * cost)

        block = max(1, min(self.x.shape[0], 2**22 // max(1, self.y.size)))
        return jnp.sum(jax.lax.map(lambda args: row(*args), (self.x, f, self.log_a), batch_size=block))

    def to_bridge(self) -> Bridge:
        r"""The Schrödinger bridge that joins the two finite sets: the member S = 0 of the mixture family.

        Its coupling from any point is the entropic map's law on the points of the target; it knows its source.

        Returns:
            A bridge, whose drift at t = 1 is singular because it ends in points.

        Raises:
            ValueError: if the plan has not converged.
        """
        if is_concrete(self.converged):
            got = f"a marginal error of {float(self.marginal_error):.3g} after {int(self.num_iterations)} iterations"
            hint = "Raise `max_iterations`, `tol` or `epsilon`."
            check(bool(self.converged), "plan", "converged", got, hint)
        f, g = self.potentials
        center = jnp.exp(self.log_b) @ self.y / jnp.sum(jnp.exp(self.log_b))

        def potential(points, log_weights, dual):
            z = points - center
            weights = log_weights + (dual - 0.5 * jnp.sum(z * z, -1)) / self.epsilon
            return MixturePotential(weights, z, Zero(jnp.zeros_like(weights)), self.epsilon, center)

        gauge = -0.5 * self.x.shape[1] * jnp.log(2.0 * jnp.pi * self.epsilon)
        backward = potential(self.x, self.log_a, f).shifted(gauge)
        return Bridge(potential(self.y, self.log_b, g), backward=backward)


def _cost_matrix(x, y):
    """Half squared distances, as differences: they keep their digits however far from the origin."""
    return jax.vmap(lambda x: 0.5 * jnp.sum((x - y) ** 2, -1))(x)


def _log_weights(name: str, weights: Any, size: int, dtype: Any, *, balanced: bool) -> Float[Array, " n"]:
    """Checked logarithms of weights; equal ones by default."""
    if weights is None:
        return jnp.full(size, -np.log(size), dtype)
    weights = jnp.asarray(weights, dtype)
    check_shape(name, weights, (size,), "One weight per point.")
    check_interval(name, weights, 0.0)
    if balanced and is_concrete(weights):
        total = float(jnp.sum(weights))
        hint = "Divide by the sum, or pass `tau` for an unbalanced problem."
        check(abs(total - 1.0) < 1e-4, name, "weights that sum to one", f"a sum of {total:.6g}", hint)
    return jnp.log(weights)


def sinkhorn(
    x: Float[ArrayLike, " n d"],
    y: Float[ArrayLike, " m _"],
    epsilon: Real[ArrayLike, ""],
    *,
    a: Float[ArrayLike, " n"] | None = None,
    b: Float[ArrayLike, " m"] | None = None,
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
        tol: bound on the total absolute marginal error.
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
    x, y = jnp.asarray(x), jnp.asarray(y)
    check_shape("x", x, (None, None), "One point per row.")
    check_shape("y", y, (None, x.shape[1]), "Both ends live in one space.")
    check(x.shape[0] > 0 and y.shape[0] > 0, "x and y", "non-empty", f"{x.shape[0]} and {y.shape[0]} points")
    check_finite("x", x)
    check_finite("y", y)
    epsilon = jnp.asarray(epsilon, x.dtype)
    log_a = _log_weights("a", a, x.shape[0], x.dtype, balanced=tau is None)
    log_b = _log_weights("b", b, y.shape[0], x.dtype, balanced=tau is None)
    tau = None if tau is None else jnp.asarray(tau, x.dtype)
    state, potentials, value = _solve(x, y, log_a, log_b, epsilon, tau, jnp.asarray(tol, x.dtype), max_iterations)
    return DiscretePlan(
        x,
        y,
        log_a,
        log_b,
        potentials,
        epsilon,
        value=value,
        marginal_error=state.marginal_error,
        converged=state.converged,
        num_iterations=state.num_iterations,
    )


@eqx.filter_jit
def _solve(x, y, log_a, log_b, epsilon, tau, tol, max_iterations):
    """Iteration, derivatives of its end and value in one program: outside of one, each call would trace the latter."""
    cost = PointCost(x, y)
    state = sinkhorn_potentials(cost, log_a, log_b, epsilon, tau=tau, tolerance=tol, max_iterations=max_iterations)
    potentials = _implicit(x, y, log_a, log_b, epsilon, tau, state.f, state.g)
    return state, potentials, transport_value(cost, log_a, log_b, epsilon, state, tau=tau)


def _implicit(x, y, log_a, log_b, epsilon, tau, f, g):
    """The converged potentials, with the derivatives of the fixed point they solve (implicit function theorem)."""
    damping = 1.0 if tau is None else tau / (tau + epsilon)

    def update_f(g):
        exponent = lambda x: (g - 0.5 * jnp.sum((x - y) ** 2, -1)) / epsilon + log_b
        return -damping * epsilon * jax.vmap(lambda x: jax.nn.logsumexp(exponent(x)))(x)

    def update_g(f):
        exponent = lambda y: (f - 0.5 * jnp.sum((x - y) ** 2, -1)) / epsilon + log_a
        return -damping * epsilon * jax.vmap(lambda y: jax.nn.logsumexp(exponent(y)))(y)

    def residual(g):
        # Potentials of exact marginals are known up to a constant; its derivative is fixed by a mean that stays.
        gauge = 0.0 if tau is not None else jnp.mean(g - jax.lax.stop_gradient(g_end))
        return g - update_g(update_f(g)) + gauge

    g_end = jax.lax.stop_gradient(g)
    f_end = jax.lax.stop_gradient(f)

    def tangent_solve(_, rhs):
        cost = jax.lax.stop_gradient(_cost_matrix(x, y))
        eps, rho = jax.lax.stop_gradient((epsilon, jnp.asarray(damping)))
        rows = jax.nn.softmax((g_end - cost) / eps + jax.lax.stop_gradient(log_b), 1)
        columns = jax.nn.softmax((f_end[:, None] - cost) / eps + jax.lax.stop_gradient(log_a)[:, None], 0)
        matrix = jnp.eye(rows.shape[1], dtype=rows.dtype) - rho**2 * columns.T @ rows
        if tau is None:
            matrix = matrix + 1.0 / rows.shape[1]
        return jnp.linalg.solve(matrix, rhs)

    root = jax.lax.custom_root(residual, g_end, lambda _, start: start, tangent_solve)
    # f follows from g by half a sweep; its value stays that of the iteration.
    follow = update_f(root)
    return f_end + follow - jax.lax.stop_gradient(follow), root


def monge_gap(
    map_fn: Callable[[Float[Array, " d"]], Float[Array, " d"]],
    x: Float[ArrayLike, " n d"],
    *,
    cost: Callable[[Array, Array], Array] | None = None,
    epsilon: Real[ArrayLike, ""],
    tol: Real[ArrayLike, ""] = 1e-5,
    max_iterations: int = 10_000,
) -> Float[Array, ""]:
    r"""How far a map is from optimal: $\frac1n \sum c(x_i, T x_i) - W_{c,\epsilon}(\rho_n, T\rho_n)$.

    As epsilon tends to 0 this is non-negative, and zero exactly where T is c-optimal on the samples; at epsilon > 0 the
    value contains the entropy, which lowers the gap by at most epsilon log n: with the gap G at epsilon = 0, the result
    lies in [G - epsilon log n, G]. The sweeps it takes grow with (range of the cost) / epsilon. Its gradient in the
    parameters of the map is that of the envelope theorem: one pass over the pairs.

    Args:
        map_fn: the map, for one point.
        x: samples, shape (n, d).
        cost: `cost(x, y)` for one pair, default half the squared distance.
        epsilon: regularization in the units of the cost.
        tol: bound on the marginal error of the inner problem.
        max_iterations: bound on its sweeps.

    Returns:
        The gap, a scalar.

    Raises:
        ValueError: if epsilon is not positive.
        RuntimeError: if the inner problem did not converge.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> x = jax.random.normal(jax.random.key(0), (32, 2))
        >>> bool(gk.bridge.monge_gap(lambda x: -x, x, epsilon=0.01) > 0.5)
        True

    Source: Uscidda and Cuturi, "The Monge gap", ICML 2023, definition 1.
    """
    check_epsilon(epsilon)
    x = jnp.asarray(x)
    check_shape("x", x, (None, None), "One sample per row.")
    check_finite("x", x)
    y = jax.vmap(map_fn)(x)
    log_weights = jnp.full(x.shape[0], -np.log(x.shape[0]), x.dtype)
    epsilon = jnp.asarray(epsilon, x.dtype)
    if cost is None:
        check_shape("map_fn(x)", y, x.shape, "The default cost compares points of one space.")
        pairs, own = PointCost(x, y), 0.5 * jnp.sum((x - y) ** 2, -1)
    else:
        pairs = MatrixCost(jax.vmap(lambda x: jax.vmap(lambda y: cost(x, y))(y))(x))
        own = jax.vmap(cost)(x, y)
    state = sinkhorn_potentials(pairs, log_weights, log_weights, epsilon, tolerance=tol, max_iterations=max_iterations)
    value = transport_value(pairs, log_weights, log_weights, epsilon, state)
    return eqx.error_if(
        jnp.mean(own) - value,
        ~state.converged,
        f"the Sinkhorn iteration of `monge_gap` did not converge within {max_iterations} sweeps: raise `epsilon`, "
        "`tol` or `max_iterations`.",
    )
