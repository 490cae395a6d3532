"""The adapted power generalized Weibull distribution: one family for most survival models."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import xlogy
from jaxtyping import Array, ArrayLike, Float, Key
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes

from genkit._core._checks import check


def _quotient(function: ArrayLike, series: ArrayLike, y: Float[Array, "..."]) -> Float[Array, "..."]:
    small = jnp.abs(y) < 1e-4
    return jnp.where(small, series, function / jnp.where(small, 1.0, y))


def expm1_over(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """expm1(y) / y, one at zero."""
    # The series of four terms is exact to 1e-17 below 1e-4; the quotient alone has no gradient at zero.
    return _quotient(jnp.expm1(y), 1 + y / 2 * (1 + y / 3 * (1 + y / 4)), y)


def log1p_over(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """log1p(y) / y, one at zero."""
    return _quotient(jnp.log1p(y), 1 - y * (1 / 2 - y * (1 / 3 - y / 4)), y)


class APGW(dist.Distribution):
    r"""Adapted power generalized Weibull distribution of a positive duration, possibly with a cured fraction.

    With $u = (\phi t)^\gamma$ the cumulative hazard is

    $$H(t) = \lambda \frac{\kappa + 1}{\kappa} \left[\left(1 + \frac{u}{\kappa + 1}\right)^\kappa - 1\right].$$

    $\kappa = 1$ is Weibull's distribution, 0 Burr's (log-logistic at $\lambda = 1$), infinity Gompertz' at
    $\gamma = 1$. For $-1 < \kappa < 0$ the hazard's integral is finite: a fraction
    $\exp(\lambda (\kappa + 1) / \kappa)$ never has the event. Those are drawn as +inf, and `log_prob(inf)` is the
    logarithm of the fraction. Covariates on `scale` give proportional hazards, on `time_scale` accelerated failure.

    Args:
        scale: $\lambda > 0$, multiplies the hazard.
        time_scale: $\phi > 0$, multiplies time (one over the unit of time).
        shape: $\gamma > 0$, power of time.
        kappa: $\kappa > -1$, infinity allowed.

    Example:
        >>> import genkit as gk
        >>> duration = gk.distributions.APGW(1.2, 0.4, 1.3, -0.4)
        >>> round(float(duration.cure_fraction), 4)
        0.1653

    Source: Burke, Jones and Noufaily (2020), A flexible parametric modelling framework for survival analysis.
    """

    arg_constraints: ClassVar = {
        "scale": constraints.positive,
        "time_scale": constraints.positive,
        "shape": constraints.positive,
        "kappa": constraints.greater_than(-1.0),
    }
    support = constraints.positive
    reparametrized_params: ClassVar = ["scale", "time_scale", "shape", "kappa"]

    def __init__(
        self,
        scale: ArrayLike,
        time_scale: ArrayLike,
        shape: ArrayLike,
        kappa: ArrayLike,
        *,
        validate_args: bool | None = None,
    ):
        self.scale, self.time_scale, self.shape, self.kappa = promote_shapes(scale, time_scale, shape, kappa)
        arrays = (scale, time_scale, shape, kappa)
        batch_shape = jax.lax.broadcast_shapes(*(jnp.shape(array) for array in arrays))
        super().__init__(batch_shape, validate_args=validate_args)

    @property
    def _mix(self) -> Float[Array, "..."]:
        # m = 1 / (1 + kappa) turns every formula into products of l(y) = log1p(y)/y and e(y) = expm1(y)/y, smooth
        # through kappa = 0 (m = 1) and kappa = inf (m = 0): H = lambda u l(um) e(y) with y = (1 - m) u l(um).
        return 1 / (1 + jnp.asarray(self.kappa, jnp.result_type(float)))

    def _parts(self, value: ArrayLike) -> tuple[Array, Array, Array]:
        u = (self.time_scale * jnp.asarray(value)) ** self.shape
        m = self._mix
        stretched = u * log1p_over(u * m)
        return u, stretched, (1 - m) * stretched

    def cumulative_hazard(self, value: ArrayLike) -> Float[Array, "..."]:
        """Integral of the hazard from zero to `value`.

        Args:
            value: durations, at least 0; inf allowed.

        Returns:
            An array of the broadcast shape; where there is a cured fraction, minus its logarithm at inf.
        """
        value = jnp.asarray(value)
        _, stretched, y = self._parts(jnp.where(jnp.isinf(value), 1.0, value))
        finite = self.scale * stretched * expm1_over(y)
        return jnp.where(jnp.isinf(value), -self._log_cure, finite)

    def hazard(self, value: ArrayLike) -> Float[Array, "..."]:
        """Rate of the event at `value` among those who have not had it.

        Args:
            value: durations, positive and finite.

        Returns:
            An array of the broadcast shape.
        """
        return jnp.exp(self._log_hazard(value))

    def _log_hazard(self, value: ArrayLike) -> Float[Array, "..."]:
        u, _, y = self._parts(value)
        scale = jnp.log(self.scale) + jnp.log(self.shape) + self.shape * jnp.log(self.time_scale)
        return scale + xlogy(self.shape - 1, value) + y - jnp.log1p(u * self._mix)

    @property
    def _log_cure(self) -> Float[Array, "..."]:
        excess = self._mix - 1
        cured = excess > 0
        return jnp.where(cured, -self.scale / jnp.where(cured, excess, 1.0), -jnp.inf)

    @property
    def cure_fraction(self) -> Float[Array, "..."]:
        """Probability that the event never happens: zero unless kappa is negative."""
        return jnp.exp(self._log_cure)

    def log_survival(self, value: ArrayLike) -> Float[Array, "..."]:
        """Logarithm of the probability of a longer duration.

        Args:
            value: durations, at least 0.

        Returns:
            An array of the broadcast shape.
        """
        return -self.cumulative_hazard(value)

    def log_prob(self, value: ArrayLike, intermediates: list | None = None) -> Float[Array, "..."]:
        """Log-density of a finite duration; logarithm of the cured fraction at inf."""
        value = jnp.asarray(value)
        never = jnp.isinf(value)
        finite = jnp.where(never, 1.0, value)
        density = self._log_hazard(finite) - self.cumulative_hazard(finite)
        return jnp.where(never, self._log_cure, jnp.where(value > 0, density, -jnp.inf))

    def cdf(self, value: ArrayLike) -> Float[Array, "..."]:
        """Probability of a duration of at most `value`."""
        return -jnp.expm1(self.log_survival(jnp.maximum(jnp.asarray(value), 0.0)))

    def icdf(self, q: ArrayLike) -> Float[Array, "..."]:
        """Duration that is not exceeded with probability `q`; inf from one minus the cured fraction on."""
        e = -jnp.log1p(-jnp.asarray(q)) / self.scale
        m = self._mix
        inner = (1 - m) * e
        never = (inner <= -1) | jnp.isinf(e)
        safe = jnp.where(never, 0.0, e)
        longest = safe * log1p_over((1 - m) * safe)
        u = longest * expm1_over(m * longest)
        positive = u > 0
        root = jnp.where(positive, jnp.where(positive, u, 1.0) ** (1 / self.shape), 0.0) / self.time_scale
        return jnp.where(never, jnp.inf, root)

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Durations of shape `sample_shape + batch_shape`; inf for the cured."""
        check(isinstance(sample_shape, tuple), "sample_shape", "a tuple of lengths", sample_shape)
        return self.icdf(jax.random.uniform(key, sample_shape + self.batch_shape, jnp.result_type(float)))
