r"""Measure-valued derivatives: the derivative of a law as a difference of two laws."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from jax.lax import stop_gradient
from jaxtyping import Array, Key

from ._frame import draw_law, fold_name, is_exact
from ._laws import is_finite, lane_shape, lanes, parameter
from ._multishot import AbstractAlternatives, lane_alternatives
from ._strategies import refuse


class MVD(AbstractAlternatives):
    r"""Measure-valued derivative: $\partial_\theta q = c\,(q^+ - q^-)$, one lane perturbed at a time.

    Exact in expectation for programs that need not be differentiable or even continuous in the value. Rules:
    Bernoulli and Categorical (sum over outcomes), Binomial $n(k(1+B) - k(B))$ with $B \sim Bin(n-1, p)$, Poisson
    $k(X+1) - k(X)$, Geometric $\frac1p(k(X) - k(1+X+X'))$, Exponential $\frac1r(k(X) - k(X+X'))$, Gamma rate
    $\frac ab(k(X) - k(X+E/b))$ (its concentration gets a score term), Normal mean with Rayleigh and Normal scale with
    double-sided Maxwell perturbations. Common random numbers are used downstream and, where the law allows, within a
    pair.

    Args:
        second_order: differentiate the alternatives too; exact second derivatives for Bernoulli and Categorical.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.MVD())
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0

    Source: Mohamed, Rosca, Figurnov & Mnih, "Monte Carlo Gradient Estimation in Machine Learning", JMLR 21 (2020),
    table 1; the Binomial, Geometric and Gamma rules follow from differentiating the laws.
    """

    second_order: bool = eqx.field(static=True, default=False)

    @property
    def keep_gradient(self) -> bool:
        """Whether the alternatives are differentiated."""
        return self.second_order

    def alternatives(self, key: Key[Array, ""], law: dist.Distribution) -> tuple[Any, Any, Any, Any]:
        """The draw, its perturbed copies and their coefficients."""
        key_value, key_rule = fold_name(key, "value"), fold_name(key, "rule")
        if is_finite(law) and not isinstance(lanes(law), (dist.BinomialProbs, dist.BinomialLogits)):
            value = stop_gradient(draw_law(law, key_value)[0])
            return value, *lane_alternatives(value, law), None
        value = stop_gradient(draw_law(law, key_value)[0])
        rule = _rule(law)
        assert rule is not None  # `check` has refused laws without one
        pairs, score = rule(law, value, key_rule)
        alts, coefficients = zip(*(_one_lane(value, alt, c) for alt, c in pairs), strict=True)
        return value, jnp.concatenate(alts), jnp.concatenate(coefficients), score

    def check(self, law: dist.Distribution, address: str) -> None:
        """Refuse laws without a rule."""
        if not is_finite(law) and _rule(law) is None:
            known = "Bernoulli, Categorical, Binomial, Poisson, Geometric, Exponential, Gamma and Normal"
            refuse(self, law, address, f"has rules for {known}", "Use Reparam(), RLOO(2) or Score().")


def _one_lane(value: Any, alt: Any, coefficient: Any) -> tuple[Any, Any]:
    """Turn lane-wise perturbed values (*shape) into whole values with one lane perturbed, (L, *shape)."""
    size, shape = value.size, value.shape
    replaced = jnp.where(jnp.eye(size, dtype=bool), alt.reshape(-1)[:, None], value.reshape(-1)[None, :])
    return replaced.reshape(size, *shape).astype(value.dtype), coefficient.reshape(-1)


def _moved(theta: Any) -> Any:
    """Zero in value, the gradient of `theta`."""
    return theta - stop_gradient(theta)


def _binomial(law: Any, value: Any, key: Any) -> tuple[list, Any]:
    del value
    base = lanes(law)
    probs = base.probs if isinstance(base, dist.BinomialProbs) else jax.nn.sigmoid(base.logits)
    probs = jnp.broadcast_to(probs, lane_shape(law))
    total = base.total_count  # known ones stay so: `exact` needs the support
    fewer = jnp.maximum(total - 1, 0) if isinstance(total, Tracer) else np.maximum(np.asarray(total) - 1, 0)
    draw, _ = draw_law(dist.Binomial(fewer, stop_gradient(probs)), key)
    return [(draw + 1, total * _moved(probs)), (draw, -total * _moved(probs))], None


def _poisson(law: Any, value: Any, key: Any) -> tuple[list, Any]:
    del key
    return [(value + 1, _moved(parameter(law, "rate")))], None


def _geometric(law: Any, value: Any, key: Any) -> tuple[list, Any]:
    base = lanes(law)
    probs = base.probs if isinstance(base, dist.GeometricProbs) else jax.nn.sigmoid(base.logits)
    probs = jnp.broadcast_to(probs, lane_shape(law))
    extra, _ = draw_law(dist.GeometricProbs(stop_gradient(probs)), key)
    return [(1 + value + extra, -_moved(probs) / stop_gradient(probs))], None


def _exponential(law: Any, value: Any, key: Any) -> tuple[list, Any]:
    rate = parameter(law, "rate")
    extra, _ = draw_law(dist.Exponential(stop_gradient(rate)), key)
    return [(value + extra, -_moved(rate) / stop_gradient(rate))], None


def _gamma(law: Any, value: Any, key: Any) -> tuple[list, Any]:
    rate, concentration = parameter(law, "rate"), parameter(law, "concentration")
    fixed = stop_gradient(rate)
    extra, _ = draw_law(dist.Exponential(fixed), key)
    score = dist.Gamma(concentration, fixed).log_prob(value)  # for the concentration, which has no rule
    return [(value + extra, -stop_gradient(concentration) / fixed * _moved(rate))], score


def _normal(law: Any, value: Any, key: Any) -> tuple[list, Any]:
    if is_exact():
        raise ValueError("`exact` must meet discrete draws only; got MVD at a Normal site.")
    mean, scale = parameter(law, "loc"), parameter(law, "scale")
    mu, sigma = stop_gradient(mean), stop_gradient(scale)
    shape, dtype = value.shape, value.dtype
    key_w, key_m, key_s, key_u = jr.split(key, 4)
    rayleigh = jnp.sqrt(2.0 * jr.exponential(key_w, shape, dtype))
    maxwell = jnp.linalg.norm(jr.normal(key_m, (3, *shape), dtype), axis=0) * jr.rademacher(key_s, shape, dtype)
    inside = maxwell * jr.uniform(key_u, shape, dtype)  # standard normal, coupled with the Maxwell draw
    by_mean = _moved(mean) / (sigma * jnp.sqrt(2 * jnp.pi))
    by_scale = _moved(scale) / sigma
    return [
        (mu + sigma * rayleigh, by_mean),
        (mu - sigma * rayleigh, -by_mean),
        (mu + sigma * maxwell, by_scale),
        (mu + sigma * inside, -by_scale),
    ], None


_RULES: tuple[tuple[tuple, Callable], ...] = (
    ((dist.BinomialProbs, dist.BinomialLogits), _binomial),
    ((dist.Poisson,), _poisson),
    ((dist.GeometricProbs, dist.GeometricLogits), _geometric),
    ((dist.Exponential,), _exponential),
    ((dist.Gamma,), _gamma),
    ((dist.Normal,), _normal),
)


def _rule(law: dist.Distribution) -> Callable | None:
    """The rule of a law, or None."""
    base = lanes(law)
    for types, rule in _RULES:
        if type(base) in types:
            return rule
    return None
