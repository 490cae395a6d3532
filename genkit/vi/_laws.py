"""What the strategies need to know about numpyro laws: lanes, finite supports, masks."""

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist


def unmask(law: dist.Distribution) -> dist.Distribution:
    """The law a value is really drawn from: a mask changes what is counted, not what is drawn."""
    if isinstance(law, dist.MaskedDistribution):
        return unmask(law.base_dist)
    if isinstance(law, dist.ExpandedDistribution):
        inner = unmask(law.base_dist)
        return law if inner is law.base_dist else inner.expand(law.batch_shape)
    if isinstance(law, dist.Independent):
        inner = unmask(law.base_dist)
        return law if inner is law.base_dist else inner.to_event(law.reinterpreted_batch_ndims)
    return law


def unchecked(law: dist.Distribution) -> dist.Distribution:
    """The law without numpyro's support check in `log_prob`, for values that lie in the support by construction.

    The check costs a good part of a small gradient step, and turns a NaN value into a density of zero.
    """
    if not law._validate_args:
        return law
    law = copy.copy(law)
    law._validate_args = False
    if isinstance(law, (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)):
        law.base_dist = unchecked(law.base_dist)
    return law


def smooth(law: dist.Distribution) -> dist.Distribution:
    """The law with its logits a hair off zero, which is where many guides start.

    numpyro writes the softplus of Bernoulli and Binomial logits as `clip(x, 0) + log1p(exp(-abs(x)))`. At exactly zero
    JAX takes half the slope of the first and the right-hand slope of the second: together 0 where 1/2 is right. Values
    do not change.
    """
    if type(law) in (dist.BernoulliLogits, dist.BinomialLogits):
        hair = float(jnp.finfo(jnp.result_type(float, law.logits)).tiny)
        law = copy.copy(law)
        law.logits = law.logits + hair
    elif isinstance(law, (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)):
        inner = smooth(law.base_dist)
        if inner is not law.base_dist:
            law = copy.copy(law)
            law.base_dist = inner
    return law


def is_everywhere(law: dist.Distribution) -> bool:
    """Whether the support is the whole real space."""
    support = law.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return type(support) is type(dist.constraints.real)


def lanes(law: dist.Distribution) -> dist.Distribution:
    """The elementary law: wrappers (`mask`, `expand`, `to_event`) removed; its parameters broadcast to the lanes."""
    while isinstance(law, (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)):
        law = law.base_dist
    return law


def lane_shape(law: dist.Distribution) -> tuple[int, ...]:
    """The shape of a value whose every entry is one lane."""
    return tuple(law.batch_shape) + tuple(law.event_shape)


def is_finite(law: dist.Distribution) -> bool:
    """Whether every lane has a finite, enumerable support."""
    base = lanes(law)
    return bool(base.is_discrete and base.has_enumerate_support and not base.event_shape)


def lane_support(law: dist.Distribution) -> Any:
    """The outcomes of one lane, shape (K,)."""
    base = lanes(law)
    return jnp.reshape(base.enumerate_support(expand=False), (-1,))


def support_size(law: dist.Distribution) -> int:
    """The number of joint outcomes of all lanes, a Python integer of any size."""
    return int(lane_support(law).shape[0]) ** int(np.prod(lane_shape(law), dtype=int))


def joint_support(law: dist.Distribution, max_paths: int) -> Any:
    """All joint outcomes, shape (K ** lanes, *lane_shape)."""
    if not is_finite(law):
        raise ValueError(f"`law` must have a finite support to be enumerated; got {type(lanes(law)).__name__}.")
    count = support_size(law)
    if count > max_paths:
        raise ValueError(
            f"`law` must have at most max_paths={max_paths} joint outcomes to be enumerated; got {count} "
            f"({type(lanes(law)).__name__} of shape {lane_shape(law)})."
        )
    values, shape = lane_support(law), lane_shape(law)
    index = np.indices((values.shape[0],) * int(np.prod(shape, dtype=int))).reshape(-1, count).T
    return values[index].reshape(count, *shape)


def lane_log_probs(law: dist.Distribution, value: Any) -> Any:
    """The log-probability of every lane of `value` (no sum over event dimensions, masks ignored)."""
    base = lanes(law)
    return jnp.broadcast_to(base.log_prob(value), jnp.broadcast_shapes(jnp.shape(value), lane_shape(law)))


def parameter(law: dist.Distribution, name: str) -> Any:
    """A parameter of the elementary law, broadcast to the lanes."""
    return jnp.broadcast_to(getattr(lanes(law), name), lane_shape(law))


def kind(law: dist.Distribution) -> str:
    """The name of the elementary law, for messages."""
    return type(lanes(law)).__name__
