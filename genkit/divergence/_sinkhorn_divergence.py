"""The debiased divergence built on entropic transport."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from genkit._core._checks import check_positive
from genkit.divergence._costs import PointCost
from genkit.divergence._entropic_transport import sinkhorn_potentials
from genkit.divergence._pairs import as_samples
from genkit.divergence._transport_value import transport_value


def sinkhorn_divergence(
    x: Shaped[ArrayLike, " n *shape"],
    y: Shaped[ArrayLike, " m *shape"],
    epsilon: Real[ArrayLike, ""],
    *,
    tolerance: Real[ArrayLike, ""] = 1e-6,
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
        tolerance: bound on the marginal error.
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

    def value(sources: Array, targets: Array, *, symmetric: bool) -> tuple[Array, Array]:
        cost = PointCost(sources, targets)
        log_a, log_b = (jnp.full(size, -math.log(size), x.dtype) for size in cost.shape)
        state = sinkhorn_potentials(
            cost, log_a, log_b, epsilon, tolerance=tolerance, max_iterations=max_iterations, symmetric=symmetric
        )
        return transport_value(cost, log_a, log_b, epsilon, state), state.converged

    across, across_converged = value(x, y, symmetric=False)
    within_x, x_converged = value(x, x, symmetric=True)
    within_y, y_converged = value(y, y, symmetric=True)
    return eqx.error_if(
        across - 0.5 * within_x - 0.5 * within_y,
        ~(across_converged & x_converged & y_converged),
        f"`sinkhorn_divergence` did not converge within {max_iterations} sweeps. Try a larger `epsilon` (about 0.05 of "
        "the mean cost is usual), a larger `max_iterations` or `tolerance`, or float64.",
    )
