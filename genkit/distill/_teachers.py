"""Teachers: what a denoiser must know beside its prediction for the losses that ask more of it."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from genkit.guidance import Guided
from genkit.sampling import as_denoiser


@runtime_checkable
class Analytic(Protocol):
    """A denoiser that knows the density of what it denoises."""

    def __call__(self, x: Array, sigma: Array, cond: PyTree = None) -> Array:
        """The posterior mean."""
        ...

    def log_density(self, x: Array, sigma: Array, cond: PyTree = None) -> Array:
        """The log-density of a noisy example."""
        ...


@runtime_checkable
class Drawable(Protocol):
    """A teacher that can be drawn from."""

    def __call__(self, x: Array, sigma: Array, cond: PyTree = None) -> Array:
        """The posterior mean."""
        ...

    def sample(self, num_samples: int, *, cond: PyTree = None, key: Array) -> Array:
        """Draws."""
        ...


def has_log_density(denoiser: Callable[..., Array]) -> bool:
    """Return True for analytic denoisers, which declare the density of what they denoise."""
    return as_denoiser(denoiser).log_density is not None


def is_network(denoiser: Callable[..., Array]) -> bool:
    """Return True for denoisers with parameters that could learn another distribution."""
    has_parameters = any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(denoiser))
    return has_parameters and not has_log_density(denoiser)


def under_guidance(teacher: Callable[..., Array], guidance: PyTree) -> Callable[..., Array]:
    """The teacher, or the teacher under its guidance."""
    if guidance is None:
        return teacher
    return Guided(teacher, guidance, forget=True)
