"""The process a bridge tilts."""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, Real

from genkit._core._fields import FROZEN, as_number
from genkit.bridge._scales import Time


class AbstractReference(eqx.Module):
    """A process on [0, 1] whose transition density and whose bridges between two points are known."""

    @abc.abstractmethod
    def log_kernel(
        self,
        s: Real[Array, " ..."] | Time,
        x: Float[Array, " ..."],
        t: Real[Array, " ..."] | Time,
        y: Float[Array, " ..."],
    ) -> Float[Array, " ..."]:
        """Log p(X_t = y | X_s = x); leading axes broadcast."""

    @abc.abstractmethod
    def bridge(
        self, x: Float[Array, " d"], x1: Float[Array, " d"], ts: Real[Array, " n"], start: Time, *, key: Key[Array, ""]
    ) -> Float[Array, " n d"]:
        """A path at `ts` given that it is at `x` at time `start` and at `x1` at time 1."""


class Brownian(AbstractReference):
    """dX = sqrt(epsilon) dB: Brownian motion of variance epsilon at t = 1.

    Args:
        epsilon: variance at t = 1, a positive scalar.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> reference = gk.bridge.Brownian(0.5)
        >>> path = reference.bridge(jnp.zeros(2), jnp.ones(2), jnp.array([0.5, 1.0]), 0.0, key=jax.random.key(0))
        >>> print(path.shape, path[-1])
        (2, 2) [1. 1.]
    """

    epsilon: Float[Array, ""] = eqx.field(metadata=FROZEN, converter=as_number)

    def log_kernel(
        self,
        s: Real[Array, " ..."] | Time,
        x: Float[Array, " ..."],
        t: Real[Array, " ..."] | Time,
        y: Float[Array, " ..."],
    ) -> Float[Array, " ..."]:
        """Log N(y | x, epsilon (t-s) I).

        Args:
            s: earlier times.
            x: states at `s`, shape (..., d).
            t: later times.
            y: states at `t`, shape (..., d).

        Returns:
            Shape (...).
        """
        variance = self.epsilon * (jnp.asarray(t) - jnp.asarray(s))
        distance = jnp.sum((y - x) ** 2, -1)
        return -0.5 * distance / variance - 0.5 * x.shape[-1] * jnp.log(2.0 * jnp.pi * variance)

    def bridge(
        self, x: Float[Array, " d"], x1: Float[Array, " d"], ts: Real[Array, " n"], start: Time, *, key: Key[Array, ""]
    ) -> Float[Array, " n d"]:
        """A Brownian bridge on the grid, exactly and without a loop.

        Args:
            x: state at `start`, shape (d,).
            x1: state at time 1, shape (d,).
            ts: non-decreasing times in [start, 1], shape (n,).
            start: time of `x`.
            key: typed PRNG key.

        Returns:
            States at `ts`, shape (n, d).
        """
        ts = jnp.asarray(ts, x.dtype)
        left = 1.0 - jnp.asarray(start, x.dtype)
        knots = jnp.concatenate([1.0 - left[None], ts, jnp.ones(1, x.dtype)])
        # Rounding may make a gap of equal times a tiny negative number.
        gaps = jnp.maximum(jnp.diff(knots), 0.0)
        steps = jnp.sqrt(self.epsilon * gaps)[:, None] * jr.normal(key, (gaps.shape[0], x.shape[0]), x.dtype)
        walk = jnp.cumsum(steps, 0)
        # A path that starts at the end stays there: the fraction is 1 and nothing is left to draw.
        fraction = jnp.where(left > 0, (ts - (1.0 - left)) / jnp.where(left > 0, left, 1.0), 1.0)[:, None]
        return x + fraction * (x1 - x) + walk[:-1] - fraction * walk[-1]
