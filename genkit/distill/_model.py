"""What is distilled from what: the student with its critics, and the guided teacher."""

from collections.abc import Callable
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from genkit._core import Context, Table, sample
from genkit._core._checks import check
from genkit._core._fields import FROZEN, maybe_number
from genkit.guidance import Guided, Linear


def has_density(guidance: Any) -> TypeGuard[Linear]:
    """Whether the guided prediction is the score of a law known up to a constant."""
    plain = lambda slot: slot.loss is None and slot.ask is None and slot.cond != "asked"
    return isinstance(guidance, Linear) and all(plain(slot) for slot in guidance.predictions)


def log_density(target: Any, x: Array, sigma: Array, cond: Any) -> Float[Array, ""]:
    r"""Log-density of the law whose score a teacher's prediction is; under a guidance, up to a constant of the level.

    A weighted sum of the predictions of analytic denoisers is the score of the same sum of log-densities: for
    classifier-free guidance $w \log p(x \mid c) + (1 - w) \log p(x)$.

    Args:
        target: an analytic denoiser, or one under a guidance that `has_density`.
        x: noisy example.
        sigma: noise level.
        cond: condition.

    Returns:
        A scalar, under a guidance not normalized.
    """
    if not isinstance(target, Guided):
        return target.log_density(x, sigma, cond)
    guidance: Any = target.guidance
    zero = jnp.zeros((), jnp.int32)
    # What such weights may look at is the noise level: `Guided` refuses those that need a grid.
    ctx = Context(x, sigma, sigma, sigma, zero, zero + 1, jnp.asarray(False), cond, jr.key(0))
    weights = [weight(ctx).astype(x.dtype) for weight in guidance.weights]
    total = jnp.zeros((), x.dtype)
    for slot, share in zip(guidance.predictions, [1 - sum(weights, total), *weights], strict=True):
        law: Any = target.model if slot.net is None else slot.net
        given = {"given": cond, "null": None}[slot.cond] if isinstance(slot.cond, str) else slot.cond
        total = total + share * law.log_density(x, sigma, given)
    return total


class Distillation(eqx.Module):
    """All that a distillation holds: the student, its critics, the teacher.

    Args:
        student: the generator `(z, cond=None) -> x`, for one example.
        teacher: the denoiser that is distilled; never trained.
        fake: a denoiser that learns the law of the student; `None` where the student knows its own.
        discriminator: a network `(x, sigma, cond) -> log p/q`; `None` where the ratio is known otherwise.
        guidance: guidance of the teacher, or `None`.
        positives: `positives(key, n)` draws of the (guided) teacher, or `(draws, conditions)`; `None` asks the teacher.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> model = gk.distill.Distillation(gk.distill.OneStep(teacher, 80.0), teacher)
        >>> model(jnp.ones(2)).shape, model.shape
        ((2,), (2,))
    """

    student: Any
    teacher: Any = eqx.field(metadata=FROZEN)
    fake: Any = None
    discriminator: Any = None
    guidance: Any = eqx.field(default=None, metadata=FROZEN)
    positives: Any = eqx.field(default=None, metadata=FROZEN)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the teacher or the student knows it."""
        own = getattr(self.teacher, "shape", None)
        return own if own is not None else getattr(self.student, "shape", None)

    @property
    def num_labels(self) -> int | None:
        """Number of classes, where the teacher knows it."""
        return getattr(self.teacher, "num_labels", None)

    @property
    def latent_shape(self) -> tuple[int, ...] | None:
        """Shape of the latent of the student, where it differs from the example's."""
        return getattr(self.student, "latent_shape", None)

    @property
    def num_evaluations(self) -> int:
        """Network evaluations of one draw of the student."""
        return getattr(self.student, "num_evaluations", 1)

    def __call__(self, z: Float[Array, "..."], cond: Any = None) -> Float[Array, "..."]:
        """One draw of the student from its latent."""
        return self.student(z, cond)

    @property
    def target(self) -> Callable:
        """The denoiser to be matched: the teacher under its guidance."""
        return self.teacher if self.guidance is None else Guided(self.teacher, self.guidance, forget=True)

    @property
    def own(self) -> Callable:
        """The denoiser of the student's law: learned, or its own."""
        if self.fake is not None:
            return self.fake
        law = self.student.denoiser()
        return lambda x, sigma, cond=None: law(x, sigma)

    def draw_positives(self, cond: PyTree, num: int, *, key: Key[Array, ""]) -> tuple[Array, PyTree]:
        """Draws of the target, with their conditions.

        Args:
            cond: the conditions of a batch, or `None`.
            num: number of draws.
            key: typed PRNG key.

        Returns:
            Draws `(num, *shape)` and conditions.
        """
        if self.positives is None:
            return self.teacher.sample(num, cond=cond, key=key), cond
        drawn = self.positives(key, num)
        return drawn if isinstance(drawn, tuple) else (drawn, cond)


class Positives(eqx.Module):
    """A pool of draws of a guided teacher, to learn from: `positives(key, n)` takes random rows.

    `teacher_pool` makes one that also keeps the noise each draw came from, which `Regression` needs.

    Args:
        x: the draws `(m, *shape)`.
        cond: their conditions `(m, ...)`, or `None`.
        latents: the standard normals that a deterministic sampler took to the draws `(m, *shape)`, or `None`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> pool = gk.distill.Positives(jnp.zeros((10, 2)), jnp.arange(10))
        >>> x, cond = pool(jax.random.key(0), 4)
        >>> x.shape, cond.shape
        ((4, 2), (4,))
    """

    x: Float[Array, " m *shape"] = eqx.field(converter=jnp.asarray)
    cond: Any = None
    latents: Float[Array, " m *shape"] | None = eqx.field(converter=maybe_number, default=None)

    def __check_init__(self):
        if self.latents is not None:
            what, got = f"of the shape {self.x.shape} of the draws", f"shape {self.latents.shape}"
            check(self.latents.shape == self.x.shape, "latents", what, got)
        for leaf in jax.tree.leaves(self.cond):
            size = jnp.shape(leaf)[:1]
            check(size == self.x.shape[:1], "cond", f"one entry for each of {self.x.shape[0]} draws", f"{size}")

    def __call__(self, key: Key[Array, ""], n: int) -> Any:
        """Draw rows.

        Args:
            key: typed PRNG key.
            n: number of rows.

        Returns:
            Draws `(n, *shape)`, or a pair of them and their conditions.
        """
        _, x, cond = self.rows(key, n)
        return x if self.cond is None else (x, cond)

    def rows(self, key: Key[Array, ""], n: int) -> tuple[Array | None, Array, PyTree]:
        """Random rows of all there is.

        Args:
            key: typed PRNG key.
            n: number of rows.

        Returns:
            Latents, draws and conditions, each `(n, ...)` or `None`.
        """
        index = jr.randint(key, (n,), 0, self.x.shape[0])
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], (self.latents, self.x, self.cond))


def teacher_pool(
    teacher: Callable,
    sampler: Any,
    num_samples: int,
    *,
    key: Key[Array, ""],
    cond: Any = None,
    guidance: Any = None,
    shape: tuple[int, ...] | None = None,
    batch_size: int | None = None,
) -> Positives:
    """Draws of a (guided) teacher by a deterministic sampler, with the noise each came from.

    Args:
        teacher: the denoiser.
        sampler: a deterministic fixed-grid sampler that starts from noise, such as `gk.diffusion.heun(grid)`.
        num_samples: number of draws.
        key: typed PRNG key.
        cond: conditions as in `gk.sample`.
        guidance: guidance of the teacher.
        shape: shape of one example, where the teacher does not know it.
        batch_size: draws at a time.

    Returns:
        The pool: draws, conditions and latents.

    Raises:
        ValueError: for a sampler that is no table of steps, or one that adds noise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> heun = gk.diffusion.heun(gk.diffusion.karras(60, 0.002, 80.0))
        >>> pool = gk.distill.teacher_pool(teacher, heun, 5, key=jax.random.key(0))
        >>> bool(jnp.allclose(pool.x, pool.latents, atol=0.05))  # of the standard normal the flow is the identity
        True

    Source: Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", 2021.
    """  # noqa: E501
    check(isinstance(sampler, Table), "sampler", "a fixed-grid sampler, such as `gk.diffusion.heun(grid)`", sampler)
    quiet = not (np.any(np.asarray(sampler.c)) or np.any(np.asarray(sampler.c_stage)))
    check(quiet, "sampler", "deterministic, so that the noise determines the draw", "one that adds noise")
    shape = getattr(teacher, "shape", None) if shape is None else shape
    check(shape is not None, "shape", "given", "None", "The teacher does not know its shape.")
    key_latent, key_draw = jr.split(key)
    latents = jr.normal(key_latent, (num_samples, *(shape or ())))
    start = jnp.asarray(sampler.sigma)[0].astype(latents.dtype) * latents
    drawn = sample(
        sampler, teacher, num_samples, cond=cond, guidance=guidance, x_init=start, key=key_draw, batch_size=batch_size
    )
    if cond is not None and jnp.ndim(cond) == 0:
        cond = jnp.broadcast_to(cond, (num_samples,))
    return Positives(drawn.value, cond, latents)
