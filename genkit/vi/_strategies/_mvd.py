r"""Measure-valued derivatives: the derivative of a distribution as a difference of two distributions."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from jax.lax import stop_gradient
from jaxtyping import Array, ArrayLike, Key

from genkit.vi._runtime._distributions import is_finite, lane_shape, lanes, parameter
from genkit.vi._runtime._enumeration import draw_from, is_exact
from genkit.vi._runtime._keys import fold_name
from genkit.vi._strategies._alternatives import AbstractAlternatives, Alternatives, lane_alternatives
from genkit.vi._strategies._single import refuse


class MVD(AbstractAlternatives):
    r"""Measure-valued derivative: $\partial_\theta q = c\,(q^+ - q^-)$, one lane perturbed at a time.

    Exact in expectation for programs that need not be differentiable or even continuous in the value. Rules:
    Bernoulli and Categorical (sum over outcomes), Binomial $n(k(1+B) - k(B))$ with $B \sim Bin(n-1, p)$, Poisson
    $k(X+1) - k(X)$, Geometric $\frac1p(k(X) - k(1+X+X'))$, Exponential $\frac1r(k(X) - k(X+X'))$, Gamma rate
    $\frac ab(k(X) - k(X+E/b))$ (its concentration gets a score term), Normal mean with Rayleigh and Normal scale with
    double-sided Maxwell perturbations. Common random numbers are used downstream and, where possible, within a pair.

    Args:
        second_order: differentiate the alternatives too; exact second derivatives for Bernoulli and Categorical.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.MVD())
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0

    Source: Mohamed, Rosca, Figurnov & Mnih, "Monte Carlo Gradient Estimation in Machine Learning", JMLR 21 (2020),
    table 1; the Binomial, Geometric and Gamma rules follow from differentiating the distributions.
    """

    second_order: bool = eqx.field(static=True, default=False)

    @property
    def keep_gradient(self) -> bool:
        """True if the alternatives are differentiated."""
        return self.second_order

    def alternatives(self, key: Key[Array, ""], distribution: dist.Distribution) -> Alternatives:
        """The draw, its perturbed copies and their coefficients."""
        value = stop_gradient(draw_from(distribution, fold_name(key, "value"))[0])
        if is_finite(distribution) and not isinstance(lanes(distribution), (dist.BinomialProbs, dist.BinomialLogits)):
            return Alternatives(value, *lane_alternatives(value, distribution))
        rule = _rule(distribution)
        assert rule is not None  # `check` has refused distributions without one
        pairs, score = rule(distribution, value, fold_name(key, "rule"))
        alts = []
        coefficients = []
        for perturbed, coefficient in pairs:
            alts.append(_one_lane(value, perturbed))
            coefficients.append(coefficient.reshape(-1))
        return Alternatives(value, jnp.concatenate(alts), jnp.concatenate(coefficients), score)

    def check(self, distribution: dist.Distribution, address: str) -> None:
        """Refuse distributions without a rule."""
        if not is_finite(distribution) and _rule(distribution) is None:
            known = "Bernoulli, Categorical, Binomial, Poisson, Geometric, Exponential, Gamma and Normal"
            refuse(self, distribution, address, f"has rules for {known}", "Use Reparam(), RLOO(2) or Score().")


def _one_lane(value: Array, perturbed: Array) -> Array:
    """Turn lane-wise perturbed values (*shape) into whole values with one lane perturbed, (L, *shape)."""
    size = value.size
    replaced = jnp.where(jnp.eye(size, dtype=bool), perturbed.reshape(-1)[:, None], value.reshape(-1)[None, :])
    return replaced.reshape(size, *value.shape).astype(value.dtype)


def _moved(theta: Array) -> Array:
    """Zero in value, the gradient of `theta`."""
    return theta - stop_gradient(theta)


# Perturbed values (*shape) with their zero-valued coefficients, and a score for what they do not cover.
Rule = tuple[list[tuple[Array, Array]], ArrayLike | None]


def _lane_probs(distribution: dist.Distribution, by_probs: type[dist.Distribution]) -> Array:
    """The success probability of every lane, from probabilities or logits."""
    base = lanes(distribution)
    probs = base.probs if isinstance(base, by_probs) else jax.nn.sigmoid(base.logits)
    return jnp.broadcast_to(probs, lane_shape(distribution))


def _binomial(distribution: dist.Distribution, value: Array, key: Key[Array, ""]) -> Rule:
    del value
    probs = _lane_probs(distribution, dist.BinomialProbs)
    total = lanes(distribution).total_count
    if isinstance(total, Tracer):
        fewer = jnp.maximum(total - 1, 0)
    else:
        fewer = np.maximum(np.asarray(total) - 1, 0)  # a known count stays known: `exact` needs the support
    draw, _ = draw_from(dist.Binomial(fewer, stop_gradient(probs)), key)
    return [(draw + 1, total * _moved(probs)), (draw, -total * _moved(probs))], None


def _poisson(distribution: dist.Distribution, value: Array, key: Key[Array, ""]) -> Rule:
    del key
    return [(value + 1, _moved(parameter(distribution, "rate")))], None


def _geometric(distribution: dist.Distribution, value: Array, key: Key[Array, ""]) -> Rule:
    probs = _lane_probs(distribution, dist.GeometricProbs)
    extra, _ = draw_from(dist.GeometricProbs(stop_gradient(probs)), key)
    return [(1 + value + extra, -_moved(probs) / stop_gradient(probs))], None


def _exponential(distribution: dist.Distribution, value: Array, key: Key[Array, ""]) -> Rule:
    rate = parameter(distribution, "rate")
    extra, _ = draw_from(dist.Exponential(stop_gradient(rate)), key)
    return [(value + extra, -_moved(rate) / stop_gradient(rate))], None


def _gamma(distribution: dist.Distribution, value: Array, key: Key[Array, ""]) -> Rule:
    rate = parameter(distribution, "rate")
    concentration = parameter(distribution, "concentration")
    fixed = stop_gradient(rate)
    extra, _ = draw_from(dist.Exponential(fixed), key)
    score = dist.Gamma(concentration, fixed).log_prob(value)  # for the concentration, which has no rule
    return [(value + extra, -stop_gradient(concentration) / fixed * _moved(rate))], score


def _normal(distribution: dist.Distribution, value: Array, key: Key[Array, ""]) -> Rule:
    if is_exact():
        raise ValueError("`exact` must meet discrete draws only; got MVD at a Normal site.")
    mean = parameter(distribution, "loc")
    scale = parameter(distribution, "scale")
    mu = stop_gradient(mean)
    sigma = stop_gradient(scale)
    shape = value.shape
    dtype = value.dtype
    key_rayleigh, key_norm, key_sign, key_shrink = jr.split(key, 4)
    rayleigh = jnp.sqrt(2.0 * jr.exponential(key_rayleigh, shape, dtype))
    maxwell = jnp.linalg.norm(jr.normal(key_norm, (3, *shape), dtype), axis=0) * jr.rademacher(key_sign, shape, dtype)
    inside = maxwell * jr.uniform(key_shrink, shape, dtype)  # standard normal, coupled with the Maxwell draw
    by_mean = _moved(mean) / (sigma * jnp.sqrt(2 * jnp.pi))
    by_scale = _moved(scale) / sigma
    return [
        (mu + sigma * rayleigh, by_mean),
        (mu - sigma * rayleigh, -by_mean),
        (mu + sigma * maxwell, by_scale),
        (mu + sigma * inside, -by_scale),
    ], None


_RULES: tuple[tuple[tuple, Callable[..., Rule]], ...] = (
    ((dist.BinomialProbs, dist.BinomialLogits), _binomial),
    ((dist.Poisson,), _poisson),
    ((dist.GeometricProbs, dist.GeometricLogits), _geometric),
    ((dist.Exponential,), _exponential),
    ((dist.Gamma,), _gamma),
    ((dist.Normal,), _normal),
)


def _rule(distribution: dist.Distribution) -> Callable[..., Rule] | None:
    """The rule of a distribution, or None."""
    base = lanes(distribution)
    for types, rule in _RULES:
        if type(base) in types:
            return rule
    return None
