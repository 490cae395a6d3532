"""Doubly exponential (tanh-sinh) quadrature on (0, 1), for integrands with power singularities at the ends."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Rule(NamedTuple):
    """Logarithms of nodes v on (0, 1), of 1 - v and of the weights, each of shape (num,)."""

    log_node: np.ndarray
    log_rest: np.ndarray
    log_weight: np.ndarray

    def cast(self, dtype: np.dtype) -> tuple[Float[Array, " num"], Float[Array, " num"], Float[Array, " num"]]:
        """The three arrays in another dtype, on the device."""
        return jnp.asarray(self.log_node, dtype), jnp.asarray(self.log_rest, dtype), jnp.asarray(self.log_weight, dtype)


@functools.cache
def tanh_sinh(num: int, span: float) -> Rule:
    """The rule with `num` nodes at equal steps of u in [-span, span], v = 1 / (1 + exp(-pi sinh u))."""
    u, step = np.linspace(-span, span, num, retstep=True)
    z = np.pi * np.sinh(u)
    # log v and log (1 - v) are computed apart, so that nodes as small as 1e-124 keep their relative precision.
    log_node = -np.logaddexp(0.0, -z)
    log_rest = -np.logaddexp(0.0, z)
    log_weight = np.log(step * np.pi * np.cosh(u)) + log_node + log_rest
    return Rule(log_node, log_rest, log_weight)
