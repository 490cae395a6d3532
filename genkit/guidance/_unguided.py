"""Preparation of fits to an unguided sampler: the sampler itself, its evaluations per step, conditions of the draws."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, Shaped

from genkit._core._checks import check
from genkit.sampling import AbstractSampler, Guidance, Sampler, Table, as_sampler


def unguided_sampler(sampler: Table | AbstractSampler) -> Sampler:
    """A table-driven sampler without guidance, from a table or such a sampler.

    Args:
        sampler: what the user passed.

    Returns:
        The sampler.

    Raises:
        TypeError: if it is no sampler.
        ValueError: if it runs no table, or brings a guidance.
    """
    base = as_sampler(sampler)
    expected = "a table or a table-driven sampler without guidance"
    check(isinstance(base, Sampler) and base.guidance is None, "sampler", expected, type(base).__name__)
    assert isinstance(base, Sampler), "checked above"
    return base


def guided_by(sampler: Sampler, guidance: Guidance) -> Sampler:
    """The sampler with a guidance, for draws that are traced or recorded.

    Args:
        sampler: an unguided sampler.
        guidance: the guidance.

    Returns:
        The guided sampler; it draws the same values however the given one skips evaluations.
    """
    # Patterns are those of another guidance, "static" cannot trace the numbers of this one, and "phases" has no
    # derivative in reverse.
    return dataclasses.replace(sampler, guidance=guidance, skip="dynamic", patterns=None)


def evaluations_per_step(table: Table) -> Int[np.ndarray, " num_steps"]:
    """Number of evaluations of the denoiser in each step, without guidance."""
    steps = np.asarray(table.step)[np.asarray(table.evaluate)]
    return np.bincount(steps, minlength=table.num_steps)


def conditions_in_turn(cond: ArrayLike, num_samples: int) -> Shaped[Array, " n *cond"]:
    """One condition per draw, going around those given; a scalar is that of every draw."""
    given = jnp.atleast_1d(jnp.asarray(cond))
    return given[np.arange(num_samples) % len(given)]
