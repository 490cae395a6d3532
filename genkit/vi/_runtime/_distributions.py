"""Facts about numpyro distributions that strategies need: lanes, finite supports, masks.

Three ways to look through the wrappers `mask`, `expand` and `to_event`, and no fourth:

- `unmask`: what is really drawn. Shapes stay; only masks go.
- `lanes`: the elementary distribution. All wrappers go; its parameters broadcast to the lanes.
- `lane_mask`: the masks alone, lane by lane, for those who count a density that `lanes` has freed of them.
"""

import copy

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike


_WRAPPERS = (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)


def unmask(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution a value is really drawn from: a mask changes what is counted, not what is drawn."""
    if isinstance(distribution, dist.MaskedDistribution):
        return unmask(distribution.base_dist)
    if not isinstance(distribution, (dist.ExpandedDistribution, dist.Independent)):
        return distribution
    inner = unmask(distribution.base_dist)
    if inner is distribution.base_dist:
        return distribution
    if isinstance(distribution, dist.Independent):
        return inner.to_event(distribution.reinterpreted_batch_ndims)
    return inner.expand(distribution.batch_shape)


def unchecked(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution without numpyro's support check in `log_prob`, for values known to lie in the support.

    The check costs a good part of a small gradient step, and turns a NaN value into a density of zero.
    """
    if not distribution._validate_args:
        return distribution
    distribution = copy.copy(distribution)
    distribution._validate_args = False
    if isinstance(distribution, _WRAPPERS):
        distribution.base_dist = unchecked(distribution.base_dist)
    return distribution


def smooth(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution with its logits a hair off zero, which is where many guides start.

    numpyro writes the softplus of Bernoulli and Binomial logits as `clip(x, 0) + log1p(exp(-abs(x)))`. At exactly zero
    JAX takes half the slope of the first and the right-hand slope of the second: together 0 where 1/2 is right. Values
    do not change.
    """
    if type(distribution) in (dist.BernoulliLogits, dist.BinomialLogits):
        hair = float(jnp.finfo(jnp.result_type(float, distribution.logits)).tiny)
        distribution = copy.copy(distribution)
        distribution.logits = distribution.logits + hair
    elif isinstance(distribution, _WRAPPERS):
        inner = smooth(distribution.base_dist)
        if inner is not distribution.base_dist:
            distribution = copy.copy(distribution)
            distribution.base_dist = inner
    return distribution


def is_everywhere(distribution: dist.Distribution) -> bool:
    """True if the support is the whole real space."""
    support = distribution.support
    while isinstance(support, dist.constraints.independent):
        support = support.base_constraint
    # numpyro's constraints are instances of private classes: only their types can be compared.
    return type(support) is type(dist.constraints.real)


def lanes(distribution: dist.Distribution) -> dist.Distribution:
    """The elementary distribution: without `mask`, `expand` and `to_event`; its parameters broadcast to the lanes."""
    while isinstance(distribution, _WRAPPERS):
        distribution = distribution.base_dist
    return distribution


def lane_mask(distribution: dist.Distribution) -> Array | None:
    """The product of all masks, inside `to_event` and out, broadcastable to the lanes; None without any."""
    mask = None
    inner = distribution
    while isinstance(inner, _WRAPPERS):
        if isinstance(inner, dist.MaskedDistribution):
            # Dimensions that `to_event` has made of the batch are lanes; those of the elementary event are not.
            added = inner.event_dim - lanes(inner).event_dim
            own = jnp.broadcast_to(inner._mask, inner.batch_shape).reshape(*inner.batch_shape, *(1,) * added)
            mask = own if mask is None else mask & own
        inner = inner.base_dist
    return mask


def lane_shape(distribution: dist.Distribution) -> tuple[int, ...]:
    """The shape of a value whose every entry is one lane."""
    return tuple(distribution.batch_shape) + tuple(distribution.event_shape)


def is_finite(distribution: dist.Distribution) -> bool:
    """True if every lane has a finite, enumerable support."""
    base = lanes(distribution)
    return bool(base.is_discrete and base.has_enumerate_support and not base.event_shape)


def lane_support(distribution: dist.Distribution) -> Array:
    """The outcomes of one lane, shape (K,)."""
    base = lanes(distribution)
    return jnp.reshape(base.enumerate_support(expand=False), (-1,))


def support_size(distribution: dist.Distribution) -> int:
    """The number of joint outcomes of all lanes, a Python integer of any size."""
    return int(lane_support(distribution).shape[0]) ** int(np.prod(lane_shape(distribution), dtype=int))


def joint_support(distribution: dist.Distribution, max_paths: int) -> Array:
    """All joint outcomes, shape (K ** lanes, *lane_shape)."""
    if not is_finite(distribution):
        raise ValueError(
            f"`distribution` must have a finite support to be enumerated; got {type(lanes(distribution)).__name__}."
        )
    count = support_size(distribution)
    if count > max_paths:
        raise ValueError(
            f"`distribution` must have at most max_paths={max_paths} joint outcomes to be enumerated; got {count} "
            f"({type(lanes(distribution)).__name__} of shape {lane_shape(distribution)})."
        )
    values, shape = lane_support(distribution), lane_shape(distribution)
    index = np.indices((values.shape[0],) * int(np.prod(shape, dtype=int))).reshape(-1, count).T
    return values[index].reshape(count, *shape)


def lane_log_probs(distribution: dist.Distribution, value: ArrayLike) -> Array:
    """The log-probability of every lane of `value` (no sum over event dimensions, masks ignored)."""
    base = lanes(distribution)
    return jnp.broadcast_to(base.log_prob(value), jnp.broadcast_shapes(jnp.shape(value), lane_shape(distribution)))


def parameter(distribution: dist.Distribution, name: str) -> Array:
    """A parameter of the elementary distribution, broadcast to the lanes."""
    return jnp.broadcast_to(getattr(lanes(distribution), name), lane_shape(distribution))


def kind(distribution: dist.Distribution) -> str:
    """The name of the elementary distribution, for messages."""
    return type(lanes(distribution)).__name__
