"""Facts that a student, a denoiser or a pool of the user's may declare, and the values of those that it does not."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from genkit.diffusion import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from genkit.guidance import Guided


_Value = TypeVar("_Value")


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
class KnowsItself(Protocol):
    """A student whose distribution is known in closed form."""

    def __call__(self, z: Array, cond: PyTree = None) -> Array:
        """One draw from its latent."""
        ...

    def denoiser(self) -> Callable[..., Array]:
        """The denoiser of the student's distribution."""
        ...


@runtime_checkable
class TakesSteps(Protocol):
    """A student of several steps, each of which can be trained alone."""

    num_evaluations: int

    def rollout(self, z: Array, cond: PyTree, step: Array) -> Array:
        """The prediction of one step."""
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


def declared(thing: object, name: str, default: _Value) -> _Value:
    """A fact that `thing` declares, or the default.

    Students, networks and denoisers come from users as plain callables: any of them may say its `shape`, its
    `latent_shape`, its `num_labels`, its `num_evaluations` or its `sigma_data`, and none has to.
    """
    return getattr(thing, name, default)


def own_denoiser(student: KnowsItself) -> Callable[..., Array]:
    """The denoiser of the student's distribution, to be called with the condition of each draw."""
    denoiser = student.denoiser()
    if ignores_condition(denoiser):
        # It would refuse the condition, which its student does not look at.
        return Unconditional(cast("Analytic", denoiser))
    return denoiser


def ignores_condition(denoiser: Callable[..., Array]) -> bool:
    """Return True for analytic denoisers without labels, which refuse a condition."""
    if isinstance(denoiser, (MixtureDenoiser, EmpiricalDenoiser)):
        return denoiser.num_labels is None
    return isinstance(denoiser, GaussianDenoiser)


class Unconditional(eqx.Module):
    """The denoiser of a student that draws the same whatever the condition.

    Args:
        denoiser: an analytic denoiser without labels.
    """

    denoiser: Analytic

    def __call__(self, x: Array, sigma: Array, cond: PyTree = None) -> Array:
        """The posterior mean."""
        return self.denoiser(x, sigma)

    def log_density(self, x: Array, sigma: Array, cond: PyTree = None) -> Array:
        """The log-density of a noisy example."""
        return self.denoiser.log_density(x, sigma)


def is_network(denoiser: Callable[..., Array]) -> bool:
    """Return True for denoisers with parameters that could learn another distribution."""
    has_parameters = any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(denoiser))
    return has_parameters and not isinstance(denoiser, Analytic)


def under_guidance(teacher: Callable[..., Array], guidance: PyTree) -> Callable[..., Array]:
    """The teacher, or the teacher under its guidance."""
    if guidance is None:
        return teacher
    return Guided(teacher, guidance, forget=True)
