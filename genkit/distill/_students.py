"""Students: a denoiser run once, or a few times with fresh noise between, and facts that any generator may declare."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from genkit._core._checks import check, check_positive, is_concrete
from genkit._core._fields import FROZEN, as_number
from genkit.diffusion import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from genkit.distill._teachers import Analytic
from genkit.sampling import as_denoiser


_Value = TypeVar("_Value")


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


def student_fact(student: Callable[..., Array], name: str, default: _Value) -> _Value:
    """A fact that a student declares (`shape`, `latent_shape`, `num_evaluations`), or the default."""
    # Students are the users' own generators, plain callables among them, without a base class that could declare a
    # default: this is the one place that asks them.
    return getattr(student, name, default)


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


class OneStep(eqx.Module):
    r"""A one-step generator made of a denoiser, $G(z, c) = D(\sigma z, \sigma, c)$: start it from the teacher.

    Args:
        net: a denoiser `(x, sigma, cond) -> x0`, whose weights the student trains.
        sigma: the noise level at which it is run; part of the student, never trained.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> student = gk.distill.OneStep(gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0), 1.0)
        >>> student(jnp.ones(2)).tolist()
        [0.5, 0.5]
    """

    net: Callable[..., Array]
    sigma: Float[Array, ""] = eqx.field(converter=as_number, metadata=FROZEN)

    def __check_init__(self):
        check_positive("sigma", self.sigma)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the denoiser knows it."""
        return as_denoiser(self.net).shape

    def __call__(self, z: Shaped[ArrayLike, " *shape"], cond: PyTree = None) -> Float[Array, " *shape"]:
        """One draw from its latent.

        Args:
            z: standard normal, of the shape of an example.
            cond: condition.

        Returns:
            The draw.
        """
        z = as_number(z)
        sigma = self.sigma.astype(z.dtype)
        return self.net(sigma * z, sigma, cond)


class FewStep(eqx.Module):
    r"""A generator of a few steps: denoise, add fresh noise of the next level, denoise again.

    $x_i = \hat x_{i-1} + \sigma_i z_i$, $\hat x_i = D(x_i, \sigma_i, c)$. It is trained by backward simulation: its own
    states, reached without gradient, are the inputs of the step that is trained, so that training sees what sampling
    will see.

    Args:
        net: a denoiser, whose weights the student trains.
        sigmas: noise levels `(k,)`, descending; never trained.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> student = gk.distill.FewStep(gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0), [80.0, 1.0])
        >>> student.latent_shape, student(jnp.ones((2, 2))).shape
        ((2, 2), (2,))

    Source: Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", NeurIPS 2024, section
    4.5.
    """

    net: Callable[..., Array]
    sigmas: Float[Array, " k"] = eqx.field(converter=as_number, metadata=FROZEN)

    def __check_init__(self):
        check(self.sigmas.ndim == 1 and self.sigmas.size > 0, "sigmas", "of shape (k,)", self.sigmas)
        check_positive("sigmas", self.sigmas)
        if is_concrete(self.sigmas):
            levels = np.asarray(self.sigmas)
            check(bool(np.all(np.diff(levels) < 0)), "sigmas", "descending", levels.tolist())

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the denoiser knows it."""
        return as_denoiser(self.net).shape

    @property
    def num_evaluations(self) -> int:
        """Evaluations of one draw."""
        return self.sigmas.shape[0]

    @property
    def latent_shape(self) -> tuple[int, ...] | None:
        """Shape of the latent: one noise for each step."""
        if self.shape is None:
            return None
        return (self.sigmas.shape[0], *self.shape)

    def _inputs(self, z: Array, cond: PyTree) -> Array:
        """The states before each step `(k, *shape)`."""
        sigmas = self.sigmas.astype(z.dtype)
        states = [sigmas[0] * z[0]]
        for i in range(1, z.shape[0]):
            states.append(self.net(states[-1], sigmas[i - 1], cond) + sigmas[i] * z[i])
        return jnp.stack(states)

    def rollout(self, z: Shaped[ArrayLike, " k *shape"], cond: PyTree, step: Int[Array, ""]) -> Float[Array, " *shape"]:
        """The prediction of one step at the state that the steps before it reach; only that step has a gradient.

        Args:
            z: standard normal `(k, *shape)`.
            cond: condition.
            step: number of the step, 0 to k - 1.

        Returns:
            The prediction.
        """
        z = as_number(z)
        # Gradients through the steps before would train each of them for all that follow.
        inputs = jax.lax.stop_gradient(self._inputs(z, cond))
        return self.net(inputs[step], self.sigmas.astype(z.dtype)[step], cond)

    def __call__(self, z: Shaped[ArrayLike, " k *shape"], cond: PyTree = None) -> Float[Array, " *shape"]:
        """One draw from its latent.

        Args:
            z: standard normal `(k, *shape)`.
            cond: condition.

        Returns:
            The draw.
        """
        z = as_number(z)
        return self.net(self._inputs(z, cond)[-1], self.sigmas.astype(z.dtype)[-1], cond)
