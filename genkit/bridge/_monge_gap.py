"""The Monge gap: the distance of a map from optimal transport."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from genkit._core._checks import check, check_finite, check_shape
from genkit.bridge._inputs import as_floats, check_epsilon
from genkit.divergence import MatrixCost, PointCost, sinkhorn_potentials, transport_value


def monge_gap(
    map_fn: Callable[[Float[Array, " d"]], Float[Array, " d"]],
    x: Shaped[ArrayLike, " n d"],
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
        NonFiniteError: if samples, or known values of the map, are not finite.
        RuntimeError: if the inner problem did not converge, or the map returns NaN inside `jit`.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> x = jax.random.normal(jax.random.key(0), (32, 2))
        >>> bool(gk.bridge.monge_gap(lambda x: -x, x, epsilon=0.01) > 0.5)
        True

    Source: Uscidda and Cuturi, "The Monge gap", ICML 2023, definition 1.
    """
    check_epsilon(epsilon)
    check_shape("x", x, (None, None), "One sample per row.")
    check(np.shape(x)[0] > 0, "x", "samples of shape (n, d)", x)
    check_finite("x", x)
    x = as_floats(x)[0]
    y = jax.vmap(map_fn)(x)
    check_finite("map_fn(x)", y)
    log_weights = jnp.full(x.shape[0], -np.log(x.shape[0]), x.dtype)
    epsilon = jnp.asarray(epsilon, x.dtype)
    if cost is None:
        check_shape("map_fn(x)", y, x.shape, "The default cost compares points of one space.")
        pairs = PointCost(x, y)
        own = 0.5 * jnp.sum((x - y) ** 2, -1)
    else:
        pairs = MatrixCost(jax.vmap(lambda x: jax.vmap(lambda y: cost(x, y))(y))(x))
        own = jax.vmap(cost)(x, y)
    state = sinkhorn_potentials(pairs, log_weights, log_weights, epsilon, tolerance=tol, max_iterations=max_iterations)
    value = transport_value(pairs, log_weights, log_weights, epsilon, state)
    gap = jnp.mean(own) - value
    # Inside a trace NaN can only be seen when it runs, and must not be taken for a lack of sweeps.
    is_finite = jnp.isfinite(jnp.sum(own))
    gap = eqx.error_if(gap, ~is_finite, "`map_fn(x)` must be finite, and so must the cost; got NaN or infinity.")
    return eqx.error_if(
        gap,
        ~state.converged & is_finite,
        f"the Sinkhorn iteration of `monge_gap` did not converge within {max_iterations} sweeps: raise `epsilon`, "
        "`tol` or `max_iterations`.",
    )
