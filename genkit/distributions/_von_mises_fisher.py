"""The von Mises-Fisher distribution of directions, in up to tens of thousands of dimensions."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from jaxtyping import Array, ArrayLike, Float, Key
from numpyro.distributions import constraints

from genkit._core._checks import check
from genkit.distributions._bessel import bessel_ratio, log_0f1


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def _mean_length(concentration: Float[Array, "..."], dim: int) -> Float[Array, "..."]:
    return bessel_ratio(jnp.full_like(concentration, dim / 2 - 1), concentration)


class VonMisesFisher(dist.Distribution):
    r"""Von Mises-Fisher distribution on the unit sphere of $R^d$: $p(x) = C_d(\kappa) \exp(\kappa\, \mu^T x)$.

    The density is taken relative to the uniform one, so that no term grows with the dimension; draws carry gradients in
    both parameters (implicit reparameterization of the angle to $\mu$).

    Args:
        direction: $\mu$, unit vectors `(..., d)` with d at least 2.
        concentration: $\kappa \ge 0$, of shape `(...)`; zero is the uniform distribution.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> pole = gk.distributions.VonMisesFisher(jnp.array([0.0, 0.0, 1.0]), 10.0)
        >>> round(float(pole.log_prob(jnp.array([0.0, 0.0, 1.0]))), 4)  # log(10 / (2 pi (1 - exp(-20))))
        0.4647

    Source: Mardia and Jupp (2000), Directional Statistics, 9.3; Wood (1994) for the draws; Figurnov et al. (2018) for
    their gradients.
    """

    arg_constraints: ClassVar = {"direction": constraints.sphere, "concentration": constraints.nonnegative}
    support = constraints.sphere
    reparametrized_params: ClassVar = ["direction", "concentration"]

    def __init__(self, direction: ArrayLike, concentration: ArrayLike, *, validate_args: bool | None = None):
        direction = jnp.asarray(direction)
        check(direction.ndim > 0 and direction.shape[-1] >= 2, "direction", "unit vectors (..., d), d >= 2", direction)
        concentration = jnp.asarray(concentration, direction.dtype)
        batch_shape = jax.lax.broadcast_shapes(direction.shape[:-1], concentration.shape)
        self.direction = jnp.broadcast_to(direction, batch_shape + direction.shape[-1:])
        self.concentration = jnp.broadcast_to(concentration, batch_shape)
        super().__init__(batch_shape, direction.shape[-1:], validate_args=validate_args)

    @property
    def dim(self) -> int:
        """Dimension d of the space that holds the sphere."""
        return self.event_shape[0]

    def log_prob(self, value: ArrayLike, intermediates: list | None = None) -> Float[Array, "..."]:
        """Log-density with respect to the area of the sphere."""
        half = self.dim / 2
        uniform = gammaln(half) - jnp.log(2.0) - half * jnp.log(jnp.pi)
        along = jnp.sum(self.direction * jnp.asarray(value), axis=-1)
        return (
            uniform
            + self.concentration * along
            - log_0f1(jnp.full_like(self.concentration, half - 1), self.concentration)
        )

    @property
    def mean(self) -> Float[Array, "..."]:
        """Mean vector, of length I_{d/2}(kappa) / I_{d/2-1}(kappa)."""
        return _mean_length(self.concentration, self.dim)[..., None] * self.direction

    @property
    def variance(self) -> Float[Array, "..."]:
        """Variance of each coordinate."""
        length = _mean_length(self.concentration, self.dim)[..., None]
        kappa = self.concentration[..., None]
        # length / kappa has the limit 1/d at kappa = 0.
        across = jnp.where(kappa > 0, length / jnp.where(kappa > 0, kappa, 1.0), 1 / self.dim)
        along = 1 - length**2 - (self.dim - 1) * across
        return along * self.direction**2 + across * (1 - self.direction**2)

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Unit vectors of shape `sample_shape + batch_shape + (d,)`."""
        key_along, key_across = jr.split(key)
        shape = sample_shape + self.batch_shape
        kappa = jnp.broadcast_to(self.concentration, shape)
        theta = _angle(key_along, kappa, self.dim)
        noise = jr.normal(key_across, (*shape, self.dim), self.direction.dtype)
        noise -= jnp.sum(noise * self.direction, axis=-1, keepdims=True) * self.direction
        across = noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)
        return jnp.cos(theta)[..., None] * self.direction + jnp.sin(theta)[..., None] * across

    @classmethod
    def fit(cls, x: ArrayLike, *, marginal: bool = False) -> "VonMisesFisher":
        r"""Most likely distribution of directions.

        The concentration solves $A_d(\kappa) = \bar R$, with $A_d$ the ratio of Bessel functions and $\bar R$ the
        length of the mean. It is biased upwards when there are few directions for the dimension; `marginal=True`
        integrates over the unknown direction, $A_d(\kappa) = \bar R A_d(n \bar R \kappa)$, and is zero where
        $n \bar R^2 \le 1$. The solution is differentiated implicitly.

        Args:
            x: unit vectors `(n, d)`.
            marginal: whether to maximize the likelihood of the concentration alone.

        Returns:
            A distribution without batch shape.

        Example:
            >>> import jax.numpy as jnp
            >>> import genkit as gk
            >>> x = jnp.array([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
            >>> round(float(gk.distributions.VonMisesFisher.fit(x).concentration), 2)
            7.06
        """
        x = jnp.asarray(x)
        is_rows = x.ndim == 2 and x.shape[0] > 0 and x.shape[1] >= 2
        check(is_rows, "x", "unit vectors of shape (n, d) with n >= 1 and d >= 2", x)
        mean = jnp.mean(x, axis=0)
        length = jnp.linalg.norm(mean)
        count = x.shape[0] if marginal else None
        return cls(mean / length, concentration_of(length, x.shape[1], count=count))


def concentration_of(length: Float[Array, ""], dim: int, *, count: int | None = None) -> Float[Array, ""]:
    """Concentration that solves the likelihood equation for a mean of this length.

    Args:
        length: length of the mean direction, between 0 and 1.
        dim: dimension d.
        count: number of directions, for the equation with the direction integrated out; `None` for the other.

    Returns:
        A scalar.
    """

    def equation(log_kappa: Float[Array, ""]) -> Float[Array, ""]:
        kappa = jnp.exp(log_kappa)
        if count is None:
            return _mean_length(kappa, dim) - length
        return _mean_length(kappa, dim) - length * _mean_length(count * length * kappa, dim)

    def bisect(function, start):
        # Both sides rise from negative to positive; the root of either equation lies below the bound of Banerjee's
        # estimate times d, and 60 halvings of its logarithm reach float64.
        r = jax.lax.stop_gradient(length)
        high = jnp.log(r * dim / (1 - r**2)) + 1.0
        low = high - 40.0

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = function(middle) > 0
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        low, high = jax.lax.fori_loop(0, 64, halve, (low, high))
        return (low + high) / 2

    def solve_tangent(linear, right):
        return right / linear(jnp.ones_like(right))

    start = jnp.zeros_like(length)
    kappa = jnp.exp(jax.lax.custom_root(equation, start, bisect, solve_tangent))
    if count is None:
        return kappa
    return jnp.where(count * length**2 > 1, kappa, 0.0)


def _angle(key: Key[Array, ""], kappa: Float[Array, "..."], dim: int) -> Float[Array, "..."]:
    """Angles to the mean direction, with their derivative in kappa."""
    fixed = jax.lax.stop_gradient(kappa)
    theta = _wood(key, fixed, dim)
    slope = jax.lax.stop_gradient(_angle_slope(theta, fixed, dim))
    return theta + slope * (kappa - fixed)


def _wood(key: Key[Array, ""], kappa: Float[Array, "..."], dim: int) -> Float[Array, "..."]:
    """Wood's rejection sampler of the angle; every entry is accepted with probability of at least .66 a round."""
    m = dim - 1
    b = m / (2 * kappa + jnp.hypot(2 * kappa, m))
    x0 = (1 - b) / (1 + b)
    c = kappa * x0 + m * jnp.log1p(-(x0**2))

    def propose(state):
        w, done, key = state
        key, key_beta, key_uniform = jr.split(key, 3)
        z = jr.beta(key_beta, m / 2, m / 2, kappa.shape, kappa.dtype)
        new = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        u = jr.uniform(key_uniform, kappa.shape, kappa.dtype)
        accepted = kappa * new + m * jnp.log1p(-x0 * new) - c >= jnp.log(u)
        return jnp.where(done, w, new), done | accepted, key

    start = (jnp.zeros_like(kappa), jnp.zeros(kappa.shape, bool), key)
    w, _, _ = jax.lax.while_loop(lambda state: ~jnp.all(state[1]), propose, start)
    return jnp.arccos(jnp.clip(w, -1.0, 1.0))


def _angle_slope(theta: Float[Array, "..."], kappa: Float[Array, "..."], dim: int) -> Float[Array, "..."]:
    r"""Derivative of the angle in kappa at a fixed quantile.

    With density $f(\theta) \propto \exp(\kappa \cos\theta) \sin^{d-2}\theta$ it is
    $-\int_0^\theta (\cos t - A) f(t) dt / f(\theta)$. The integral is taken on the side of theta on which the integrand
    keeps its sign, over twelve standard deviations of the angle at most.
    """
    mean = _mean_length(kappa, dim)
    # Mode and curvature of the angle's log-density bound the range that matters.
    tiny = jnp.finfo(kappa.dtype).tiny  # in the plane with kappa = 0 every angle is a mode
    cos_mode = 2 * kappa / ((dim - 2) + jnp.hypot(2 * kappa, dim - 2) + tiny)
    curvature = kappa * cos_mode + (dim - 2) / jnp.maximum(1 - cos_mode**2, tiny)
    reach = 12 / jnp.sqrt(jnp.maximum(curvature, 1e-2))
    near = jnp.cos(theta) > mean
    start = jnp.where(near, jnp.maximum(theta - reach, 0.0), theta)
    end = jnp.where(near, theta, jnp.minimum(theta + reach, jnp.pi))
    t = start[..., None] + (end - start)[..., None] * (jnp.asarray(_NODES, theta.dtype) + 1) / 2

    def log_density(angle: Array, kappa: Array) -> Array:
        sine = jnp.sin(angle)
        return kappa * jnp.cos(angle) + (dim - 2) * jnp.log(jnp.maximum(sine, jnp.finfo(sine.dtype).tiny))

    relative = jnp.exp(log_density(t, kappa[..., None]) - log_density(theta, kappa)[..., None])
    integral = jnp.sum((jnp.cos(t) - mean[..., None]) * relative * jnp.asarray(_WEIGHTS, theta.dtype), axis=-1)
    return -jnp.where(near, 1.0, -1.0) * integral * (end - start) / 2
