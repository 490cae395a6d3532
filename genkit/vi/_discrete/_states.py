"""The outcomes of discrete sites."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike

from genkit.vi._discrete._graph import Spec
from genkit.vi._runtime._distributions import is_everywhere, kind, lane_mask, lane_shape, lanes, unchecked


_COUNTS = (dist.BinomialProbs, dist.BinomialLogits, dist.BetaBinomial)


def spec_of(name: str, distribution: dist.Distribution, bounds: Mapping[str, int]) -> Spec:
    """The outcomes and the shape of a discrete site.

    Args:
        name: the site.
        distribution: its distribution.
        bounds: largest values of sites without a finite support of their own.

    Returns:
        The outcomes of one lane, and the shape of a value.

    Raises:
        ValueError: if the outcomes cannot be listed.
    """
    base = lanes(distribution)
    refused = f"The discrete site {name!r} ({kind(distribution)}) cannot be summed out:"
    if base.event_shape:
        raise ValueError(
            f"{refused} its value is a vector of shape {base.event_shape}. Write it as single counts or labels, or "
            "keep it latent with `sites=`."
        )
    if name in bounds:
        return Spec(np.arange(bounds[name] + 1), lane_shape(distribution), True)
    if isinstance(base, _COUNTS):
        try:
            largest = int(np.max(np.asarray(base.total_count)))
        except jax.errors.TracerArrayConversionError as error:
            raise ValueError(
                f"{refused} its total count is only known at run time. Give its largest value, "
                f"`marginalize(model, sites={{{name!r}: 20}})`."
            ) from error
        return Spec(np.arange(largest + 1), lane_shape(distribution), True)
    if not base.has_enumerate_support:
        raise ValueError(
            f"{refused} its support has no end. Give the largest value to sum over, "
            f"`marginalize(model, sites={{{name!r}: 50}})`."
        )
    try:
        with jax.ensure_compile_time_eval():
            support = np.asarray(base.enumerate_support(expand=False)).reshape(-1)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"{refused} its bounds are only known at run time. Make them Python numbers, or give the largest value, "
            f"`marginalize(model, sites={{{name!r}: 50}})`."
        ) from error
    return Spec(support, lane_shape(distribution), False)


def lane_costs(distribution: dist.Distribution, value: ArrayLike, spec: Spec | None) -> Array:
    """The log-density of every lane of a value, masks applied.

    A member that is masked away is not there: summed over, it contributes nothing, so each of its outcomes counts with
    equal weight.

    Args:
        distribution: of the site.
        value: its value.
        spec: the outcomes of a site that is summed out, else None.

    Returns:
        An array of the shape of the value's lanes; for distributions over vectors, of the batch shape.
    """
    base = lanes(distribution)
    shape = lane_shape(distribution)
    if base.event_shape:
        shape = shape[: len(shape) - len(base.event_shape)]
    mask = lane_mask(distribution)
    value = jnp.asarray(value)
    # numpyro looks at every entry of a value whether it lies in the support, which costs more than its density.
    if spec is not None or is_everywhere(distribution):
        base = unchecked(base)
    if spec is not None and spec.is_ragged:
        # Outcomes that a lane does not have are impossible, and must not be evaluated.
        inside = base.support(value)
        log_prob = jnp.where(inside, base.log_prob(jnp.where(inside, value, spec.support[0])), -jnp.inf)
    else:
        log_prob = base.log_prob(value)
    log_prob = jnp.broadcast_to(log_prob, jnp.broadcast_shapes(jnp.shape(log_prob), shape))
    if mask is None:
        return log_prob
    rest = 0.0
    if spec is not None:
        rest = -math.log(len(spec.support))
    return jnp.where(mask, log_prob, rest)
