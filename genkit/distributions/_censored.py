"""Observations of which only a bound is known."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaincc, gammaln, log_ndtr
from jaxtyping import Array, ArrayLike, Float, Key
from numpyro.distributions import constraints

from genkit._core._checks import check, describe
from genkit._core._known import is_known
from genkit.distributions._apgw import APGW


def _log_upper_gamma(a: ArrayLike, x: ArrayLike) -> Float[Array, "..."]:
    r"""Log Q(a, x), also where Q underflows: Legendre's continued fraction from x > a + 1 on."""
    a = jnp.asarray(a)
    x = jnp.asarray(x)
    far = x > a + 1
    safe = jnp.where(far, x, a + 2)

    def level(n: Array, tail: Array) -> Array:
        k = 60.0 - n
        return k * (k - a) / (safe + 2 * k + 1 - a - tail)

    # 60 levels from below: at x = a + 1, the slowest place, 1e-15 for a up to 100.
    tail = jax.lax.fori_loop(0, 60, level, jnp.zeros_like(safe + a))
    fraction = a * jnp.log(safe) - safe - gammaln(a) - jnp.log(safe + 1 - a - tail)
    return jnp.where(far, fraction, jnp.log(gammaincc(a, jnp.where(far, a, x))))


def _standard(base: dist.Distribution, value: Array) -> Array:
    return (value - base.loc) / base.scale


# Both tails, as log P(X > value) and log P(X < value), where a form exists that does not pass through 1 - F.
_TAILS: dict[type, tuple[Callable[..., Array], Callable[..., Array] | None]] = {
    APGW: (lambda d, v: d.log_survival(v), None),
    dist.Normal: (lambda d, v: log_ndtr(-_standard(d, v)), lambda d, v: log_ndtr(_standard(d, v))),
    dist.LogNormal: (
        lambda d, v: log_ndtr(-(jnp.log(v) - d.loc) / d.scale),
        lambda d, v: log_ndtr((jnp.log(v) - d.loc) / d.scale),
    ),
    dist.Logistic: (
        lambda d, v: jax.nn.log_sigmoid(-_standard(d, v)),
        lambda d, v: jax.nn.log_sigmoid(_standard(d, v)),
    ),
    dist.Exponential: (lambda d, v: -d.rate * v, None),
    dist.Weibull: (lambda d, v: -((v / d.scale) ** d.concentration), None),
    dist.Gamma: (lambda d, v: _log_upper_gamma(d.concentration, d.rate * v), None),
    dist.Pareto: (lambda d, v: d.alpha * (jnp.log(d.scale) - jnp.log(v)), None),
    dist.Gumbel: (
        lambda d, v: jnp.log(-jnp.expm1(-jnp.exp(-_standard(d, v)))),
        lambda d, v: -jnp.exp(-_standard(d, v)),
    ),
}


def log_survival(distribution: dist.Distribution, value: Array) -> Array:
    """Log P(X > value); through 1 - F where no direct form is known, which ends at the precision of the dtype."""
    upper, _ = _TAILS.get(type(distribution), (None, None))
    if upper is not None:
        return upper(distribution, value)
    return jnp.log1p(-distribution.cdf(value))


def log_cdf(distribution: dist.Distribution, value: Array) -> Array:
    """Log P(X <= value)."""
    _, lower = _TAILS.get(type(distribution), (None, None))
    if lower is not None:
        return lower(distribution, value)
    return jnp.log(distribution.cdf(value))


class Censored(dist.Distribution):
    """Distribution of a value that is recorded as a bound where it lies beyond one; see `censored`.

    Args:
        base: distribution of the value itself, of empty event shape, with a `cdf`.
        lower: bound below, or `None`.
        upper: bound above, or `None`.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> import genkit as gk
        >>> counts = gk.distributions.Censored(dist.Poisson(3.0), None, 5)
        >>> int(counts.sample(jax.random.key(0), (100,)).max())
        5
    """

    # Bounds may be infinite, which no constraint of numpyro's allows.
    arg_constraints: ClassVar = {}
    pytree_data_fields = ("base", "lower", "upper")

    def __init__(
        self,
        base: dist.Distribution,
        lower: ArrayLike | None,
        upper: ArrayLike | None,
        *,
        validate_args: bool | None = None,
    ):
        self.base = base
        self.lower = jnp.asarray(-jnp.inf if lower is None else lower)
        self.upper = jnp.asarray(jnp.inf if upper is None else upper)
        batch_shape = jax.lax.broadcast_shapes(base.batch_shape, self.lower.shape, self.upper.shape)
        super().__init__(batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Support of the base distribution, which holds the bounds too."""
        return self.base.support

    def _step(self) -> int:
        # A count recorded as the upper bound stands for that bound and all above it: P(X > upper - 1).
        return 1 if self.base.is_discrete else 0

    def log_prob(self, value: ArrayLike, intermediates: list | None = None) -> Float[Array, "..."]:
        """Log-density between the bounds, log-probability of lying beyond at a bound."""
        value = jnp.asarray(value)
        above = value >= self.upper
        below = value <= self.lower
        # Each formula gets arguments at which it is finite, so that the others' gradients are not NaN.
        inside = ~(above | below)
        anchor = jax.lax.stop_gradient(
            jnp.broadcast_to(jnp.asarray(self._inner_point()), jnp.shape(value + self.upper))
        )
        plain = self.base.log_prob(jnp.where(inside, value, anchor))
        upper = log_survival(self.base, jnp.where(above, self.upper, anchor) - self._step())
        lower = log_cdf(self.base, jnp.where(below, self.lower, anchor))
        return jnp.where(above, upper, jnp.where(below, lower, plain))

    def _inner_point(self) -> Array:
        """A value inside the support at which densities and tails are finite."""
        return self.base.support.feasible_like(jnp.zeros(self.base.batch_shape)) + self._step()

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Values of the base distribution, clipped to the bounds."""
        shape = sample_shape + self.batch_shape
        base = self.base.expand(self.batch_shape) if self.base.batch_shape != self.batch_shape else self.base
        return jnp.broadcast_to(jnp.clip(base.sample(key, sample_shape), self.lower, self.upper), shape)


def censored(
    distribution: dist.Distribution, lower: ArrayLike | None = None, upper: ArrayLike | None = None
) -> Censored:
    r"""Distribution of min(max(X, lower), upper): exact values inside, probabilities of the tails at the bounds.

    $$\log p(y) = \log S(u) \text{ at } y \ge u, \quad \log F(l) \text{ at } y \le l, \quad \log f(y) \text{ between}.$$

    For survival data, `upper` is the time at which a subject left the study (inf, or anything later than the event,
    for those whose event was seen), and the observation is the earlier of the two times. Tails do not pass through
    1 - F for normal, log-normal, logistic, exponential, Weibull, gamma, Pareto, Gumbel and `APGW` distributions; for
    others they end where 1 - F rounds to zero.

    Args:
        distribution: numpyro distribution with empty event shape and a `cdf`.
        lower: bound below, broadcast against the batch shape; `None` for none.
        upper: bound above, broadcast against the batch shape; `None` for none.

    Returns:
        A numpyro distribution.

    Raises:
        ValueError: if the distribution has an event shape, or a known lower bound lies above the upper one.

    Example:
        >>> import numpyro.distributions as dist
        >>> import genkit as gk
        >>> survival = gk.distributions.censored(dist.Weibull(1.0, 1.0), upper=30.0)
        >>> float(survival.log_prob(30.0))
        -30.0
    """
    is_scalar = isinstance(distribution, dist.Distribution) and distribution.event_shape == ()
    check(is_scalar, "distribution", "a numpyro distribution of empty event shape", distribution)
    if lower is not None and upper is not None and is_known(lower, upper):
        ordered = bool(np.all(np.asarray(lower) <= np.asarray(upper)))
        check(ordered, "lower", lambda: f"at most `upper` ({describe(upper)})", lower)
    return Censored(distribution, lower, upper)
