"""Samplers of students, for `gk.sample` and the command line."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Inexact, Key, PyTree

from genkit._core._checks import check, check_positive
from genkit._core._fields import as_number
from genkit.distill._model import Distillation
from genkit.distill._students import FewStep, OneStep, student_fact
from genkit.sampling import AbstractSampler, Draws


class StudentSampler(AbstractSampler):
    """Draws of a student, by its own steps: one evaluation for a one-step student.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> student = gk.distill.OneStep(gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0), 80.0)
        >>> draws = gk.sample(gk.distill.StudentSampler(), student, 3, key=jax.random.key(0))
        >>> draws.value.shape, draws.nfe.tolist()
        ((3, 2), [1, 1, 1])
    """

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Draw one example per key.

        Args:
            model: a student `(z, cond=None) -> x`, or a `Distillation`.
            keys: one typed key per draw.
            cond: conditions, or `None`.
            x_init: must be `None`: a student starts from its latent.
            shape: shape of one example.

        Returns:
            The draws.
        """
        check(x_init is None, "x_init", "None: a student starts from its own latent", x_init)
        latent = student_fact(model, "latent_shape", None) or shape
        z = jax.vmap(lambda key: jr.normal(key, latent))(keys)
        value = jax.vmap(lambda one, c: model(one, c))(z, cond)
        count = jnp.full(keys.shape[0], student_fact(model, "num_evaluations", 1), jnp.int32)
        return Draws(value, count, count)


class Renoise(AbstractSampler):
    r"""Multistep draws of a consistency model or student: denoise, add fresh noise of the next level, denoise again.

    Args:
        sigmas: noise levels `(k,)`, descending.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> draws = gk.sample(gk.distill.Renoise([80.0, 1.0]), denoiser, 3, key=jax.random.key(0))
        >>> draws.value.shape, int(draws.nfe[0])
        ((3, 2), 2)

    Source: Song et al., "Consistency Models", ICML 2023, algorithm 1.
    """

    sigmas: Float[Array, " k"] = eqx.field(converter=as_number)

    def __check_init__(self):
        check(self.sigmas.ndim == 1 and self.sigmas.size > 0, "sigmas", "of shape (k,)", self.sigmas)
        check_positive("sigmas", self.sigmas)

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Draw one example per key.

        Args:
            model: a denoiser-like `(x, sigma, cond) -> x`, or a student made of one.
            keys: one typed key per draw.
            cond: conditions, or `None`.
            x_init: states at the first noise level, or `None`.
            shape: shape of one example.

        Returns:
            The draws.
        """
        net = model
        if isinstance(net, Distillation):
            net = net.student
        # A student renoises by the denoiser inside it, which takes any level.
        if isinstance(net, (OneStep, FewStep)):
            net = net.net

        def noise(step: int) -> Array:
            return jax.vmap(lambda key: jr.normal(jr.fold_in(key, step), shape))(keys)

        run = jax.vmap(lambda x, s, c: net(x, s, c), in_axes=(0, None, 0))
        x = x_init
        if x is None:
            x = self.sigmas[0] * noise(0)
        for i in range(self.sigmas.shape[0]):
            if i > 0:
                x = x + self.sigmas[i].astype(x.dtype) * noise(i)
            x = run(x, self.sigmas[i].astype(x.dtype), cond)
        count = jnp.full(keys.shape[0], self.sigmas.shape[0], jnp.int32)
        return Draws(x, count, count)
