"""Value of an entropic transport problem and the derivatives of its potentials, from a solved state."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from genkit.divergence._costs import AbstractCost
from genkit.divergence._entropic_transport import Potential, SinkhornState, damping, soft_minimum


# Up to this many pairs the linear system of the implicit derivative is solved directly.
_FEW_PAIRS = 2**22
# Bound on the steps of conjugate gradients beyond that.
_MAX_GRADIENTS = 500


def transport_value(
    cost: AbstractCost,
    log_a: Float[Array, " n"],
    log_b: Float[Array, " m"],
    epsilon: Real[ArrayLike, ""],
    state: SinkhornState,
    *,
    tau: Real[ArrayLike, ""] | None = None,
) -> Float[Array, ""]:
    r"""The value $\langle P, C\rangle + \varepsilon\, KL(P \mid a \otimes b)$ (plus $\tau\,KL$ of both marginals) at the optimum.

    It is the dual objective at the first potential and the second that is best for it. Because the potentials maximize
    it, its derivative with the first held fixed is the derivative of the value: gradients in points, cost, weights and
    `epsilon` are exact at convergence, and cost one pass over the pairs.

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
    return weighted_value(cost, jnp.exp(log_a), jnp.exp(log_b), epsilon, state, tau=tau)


def weighted_value(
    cost: AbstractCost,
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    epsilon: Real[ArrayLike, ""],
    state: SinkhornState,
    *,
    tau: Real[ArrayLike, ""] | None = None,
) -> Float[Array, ""]:
    r"""The value of a solved problem as a function of its weights, with a gradient that is finite where they are zero.

    The potentials are held fixed and the value is taken from one half-sweep, which reaches points of weight zero too.

    Args:
        cost: the cost that was solved.
        a: weights of the sources, `(n,)`.
        b: weights of the targets, `(m,)`.
        epsilon: the regularization that was solved with.
        state: what `sinkhorn_potentials` returned.
        tau: the weight of the marginals' divergence that was solved with; `None` for fixed marginals.

    Returns:
        A scalar: $\langle P, C \rangle + \epsilon\, KL(P | a \otimes b)$, plus the penalty of the marginals with `tau`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> cost = gk.divergence.PointCost(jnp.zeros((1, 1)), jnp.ones((1, 1)))
        >>> one = jnp.ones(1)
        >>> state = gk.divergence.sinkhorn_potentials(cost, jnp.log(one), jnp.log(one), 0.1)
        >>> round(float(gk.divergence.weighted_value(cost, one, one, 0.1, state)), 4)  # |0 - 1|^2 / 2
        0.5
    """
    epsilon = jnp.asarray(epsilon, state.f.dtype)
    f = jax.lax.stop_gradient(Potential(state.f, state.f_rest))
    minimum = soft_minimum(cost.transpose(), f, a, epsilon)
    product = jnp.sum(a) * jnp.sum(b)
    if tau is None:
        # The second marginal is exact, so that the plan has the mass of b.
        held = jnp.sum(a * f.value) + jnp.sum(a * f.rest) - jnp.sum(b * minimum)
        return held + epsilon * (product - jnp.sum(b))
    tau = jnp.asarray(tau, state.f.dtype)
    g = -damping(epsilon, tau) * minimum
    held = -tau * (jnp.sum(a * jnp.expm1(-f.value / tau)) + jnp.sum(b * jnp.expm1(-g / tau)))
    return held + epsilon * (product - jnp.sum(b * jnp.exp(-g / tau)))


def differentiable_potentials(
    cost: AbstractCost,
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    epsilon: Float[Array, ""],
    state: SinkhornState,
    *,
    tau: Float[Array, ""] | None = None,
) -> SinkhornState:
    """The converged potentials, with the derivatives of the fixed point they solve (implicit function theorem).

    The linear system of the derivative is solved directly up to four million pairs, and beyond that by conjugate
    gradients, whose steps are two passes over the pairs in blocks: memory does not grow with n m.

    Args:
        cost: the cost that was solved.
        a: weights of the sources, `(n,)`.
        b: weights of the targets, `(m,)`.
        epsilon: the regularization that was solved with.
        state: what `sinkhorn_potentials` returned.
        tau: the weight of the marginals' divergence that was solved with.

    Returns:
        The same state; its `f` and `g` have derivatives in cost, weights, `epsilon` and `tau`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> half = jnp.full(2, 0.5)
        >>> def gap(scale):
        ...     cost = gk.divergence.MatrixCost(scale * jnp.array([[0.0, 1.0], [1.0, 0.0]]))
        ...     state = gk.divergence.sinkhorn_potentials(cost, jnp.log(half), jnp.log(half), 1.0, tau=1.0)
        ...     return gk.divergence.differentiable_potentials(cost, half, half, jnp.asarray(1.0), state,
        ...                                                    tau=jnp.asarray(1.0)).f[0]
        >>> bool(jax.grad(gap)(1.0) > 0)
        True
    """
    back = cost.transpose()
    held = damping(epsilon, tau)
    f_end, g_end, f_rest, g_rest = jax.lax.stop_gradient((state.f, state.g, state.f_rest, state.g_rest))

    def update_f(g: Array) -> Array:
        return -held * soft_minimum(cost, Potential(g, g_rest), b, epsilon)

    def update_g(f: Array) -> Array:
        return -held * soft_minimum(back, Potential(f, f_rest), a, epsilon)

    def residual(g: Array) -> Array:
        value = g - update_g(update_f(g))
        if tau is None:
            # Potentials of exact marginals are known up to a constant; its derivative is fixed by a mean that stays.
            value = value + jnp.mean(g - g_end)
        return value

    def solve(_: object, rhs: Array) -> Array:
        return _solve_tangent(*jax.lax.stop_gradient((cost, a, b, epsilon, held)), state, rhs, tau is None)

    root = jax.lax.custom_root(residual, g_end, lambda _, start: start, solve)
    # f follows from g by half a sweep; its value stays that of the iteration.
    follow = update_f(root)
    f = f_end + follow - jax.lax.stop_gradient(follow)
    return eqx.tree_at(lambda s: (s.f, s.g), state, (f, root))


def _solve_tangent(
    cost: AbstractCost,
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    epsilon: Float[Array, ""],
    damping: Float[Array, ""],
    state: SinkhornState,
    rhs: Float[Array, " m"],
    is_balanced: bool,
) -> Float[Array, " m"]:
    """Solve (I - damping^2 Q R) v = rhs with the transition matrices R of the rows and Q of the columns of the plan."""
    back = cost.transpose()
    state = jax.lax.stop_gradient(state)
    turned = SinkhornState(
        state.g, state.f, state.marginal_error, state.num_iterations, state.converged, state.g_rest, state.f_rest
    )

    def transitions(weights: Array, density: Array) -> Array:
        """Shares of one row of the plan."""
        shares = weights * jnp.exp(density - jnp.max(jnp.where(weights > 0, density, -jnp.inf)))
        return jnp.where(weights > 0, shares / jnp.sum(shares), 0.0)

    def row_means(v: Array) -> Array:
        return cost.map_rows(lambda row, i: transitions(b, state.log_density(row, i, epsilon)) @ v)

    def column_means(u: Array) -> Array:
        return back.map_rows(lambda row, j: transitions(a, turned.log_density(row, j, epsilon)) @ u)

    sources, targets = cost.shape
    if sources * targets <= _FEW_PAIRS and targets <= 2048:
        rows = cost.map_rows(lambda row, i: transitions(b, state.log_density(row, i, epsilon)))
        columns = back.map_rows(lambda row, j: transitions(a, turned.log_density(row, j, epsilon)))
        matrix = jnp.eye(targets, dtype=rhs.dtype) - damping**2 * columns @ rows
        if is_balanced:
            matrix = matrix + 1.0 / targets
        return jnp.linalg.solve(matrix, rhs)

    # Q R is self-adjoint in the inner product of the second marginal: with its roots on both sides conjugate gradients
    # apply. A rank-one term fixes the constant of balanced potentials, whose derivative only has to be the same
    # throughout.
    marginal = b * back.map_rows(lambda row, j: a @ jnp.exp(turned.log_density(row, j, epsilon)))
    roots = jnp.sqrt(marginal)
    inverse = jnp.where(marginal > 0, 1.0 / jnp.where(marginal > 0, roots, 1.0), 0.0)

    def system(v: Array) -> Array:
        applied = v - damping**2 * roots * column_means(row_means(inverse * v))
        if is_balanced:
            applied = applied + roots * (roots @ v) / jnp.sum(marginal)
        return applied

    solved = jax.lax.custom_linear_solve(system, roots * rhs, _conjugate_gradients, symmetric=True)
    weighted = inverse * solved
    # Targets without weight follow from the others.
    followed = rhs + damping**2 * column_means(row_means(weighted))
    if is_balanced:
        followed = followed - (roots @ solved) / jnp.sum(marginal)
    return jnp.where(marginal > 0, weighted, followed)


def _conjugate_gradients(
    system: Callable[[Float[Array, " m"]], Float[Array, " m"]], rhs: Float[Array, " m"]
) -> Float[Array, " m"]:
    """Solve a positive definite system to the digits of its dtype; JAX cannot transpose its own solver."""
    tolerance = (10 * jnp.finfo(rhs.dtype).eps) ** 2 * jnp.sum(rhs**2)

    def is_unsettled(carry: tuple[Array, ...]) -> Array:
        _, _, _, square, step = carry
        return (square > tolerance) & (step < _MAX_GRADIENTS)

    def advance(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        solution, residual, direction, square, step = carry
        image = system(direction)
        length = square / jnp.sum(direction * image)
        solution = solution + length * direction
        residual = residual - length * image
        new_square = jnp.sum(residual**2)
        return solution, residual, residual + new_square / square * direction, new_square, step + 1

    start = (jnp.zeros_like(rhs), rhs, rhs, jnp.sum(rhs**2), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(is_unsettled, advance, start)[0]
