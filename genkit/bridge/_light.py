"""The bridge of a given mixture potential."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Real, Shaped

from genkit._core._checks import check_finite, check_shape, fail
from genkit.bridge._bridge import Bridge
from genkit.bridge._inputs import as_floats, check_epsilon
from genkit.bridge._potential import MixturePotential
from genkit.bridge._scales import AbstractScale, Diag, Full, make_scale


def light(
    log_weights: Shaped[ArrayLike, " k"],
    shifts: Shaped[ArrayLike, " k d"],
    scales: AbstractScale | Real[ArrayLike, " k ..."],
    epsilon: Real[ArrayLike, ""],
) -> Bridge:
    r"""The bridge of a known potential $v(y) = \sum_k e^{\ell_k} N(y \mid r_k, \epsilon S_k)$.

    Args:
        log_weights: $\ell_k$, shape (K,); they need not be normalized.
        shifts: $r_k$, shape (K, d).
        scales: $S_k$ as an `AbstractScale`, or as an array of shape (K,), (K, d) or (K, d, d).
        epsilon: variance of the reference at t = 1.

    Returns:
        A bridge for any starting distribution.

    Raises:
        ValueError: if shapes differ, epsilon is not positive or a scale is not positive definite.

    Example:
        >>> import jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.light(jnp.zeros(2), jnp.array([[-1.0], [1.0]]), jnp.full(2, 0.5), 0.1)
        >>> print(bridge.coupling(jnp.zeros(1)).mean)
        [0.]

    Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024.
    """
    check_epsilon(epsilon)
    check_shape("shifts", shifts, (None, None), "One row per component.")
    count, dim = np.shape(shifts)
    check_shape("log_weights", log_weights, (count,), "One weight per component.")
    check_finite("log_weights", log_weights)
    check_finite("shifts", shifts)
    scale = make_scale(scales)
    if scale.num_components != count:
        fail("scales", f"of {count} components", f"{scale.num_components}")
    if isinstance(scale, (Diag, Full)):
        check_shape("scales", scale.log_values, (count, dim), "Scales and shifts share the space.")
    shifts, log_weights = as_floats(shifts, log_weights)
    epsilon = jnp.asarray(epsilon, shifts.dtype)
    return Bridge(MixturePotential(log_weights, shifts, scale, epsilon, jnp.zeros(dim, shifts.dtype)))
