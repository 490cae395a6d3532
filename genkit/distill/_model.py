"""The parts of a distillation: the student with its critics, and the guided teacher."""

from collections.abc import Callable
from typing import TypeGuard, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import check, check_finite, fail
from genkit._core._fields import FROZEN, maybe_number
from genkit.distill._students import KnowsItself, own_denoiser, student_fact
from genkit.distill._teachers import Analytic, Drawable, under_guidance
from genkit.guidance import Guided, Linear
from genkit.sampling import AbstractSampler, Context, Guidance, Slot, Table, as_denoiser, sample


def has_density(guidance: PyTree) -> TypeGuard[Linear]:
    """Return True if the guided prediction is the score of a density known up to a constant."""
    return isinstance(guidance, Linear) and all(_is_plain(slot) for slot in guidance.predictions)


def _is_plain(slot: Slot) -> bool:
    return slot.loss is None and slot.ask is None and slot.cond != "asked"


def log_density(
    target: Callable[..., Array], x: Array, sigma: Array, cond: PyTree, *, key: Key[Array, ""] | None = None
) -> Float[Array, ""]:
    r"""Log-density whose score a teacher's prediction is; under a guidance, up to a constant of the noise level.

    A weighted sum of the predictions of analytic denoisers is the score of the same sum of log-densities: for
    classifier-free guidance $w \log p(x \mid c) + (1 - w) \log p(x)$.

    Args:
        target: an analytic denoiser, or one under a guidance that `has_density`.
        x: noisy example.
        sigma: noise level.
        cond: condition.
        key: typed PRNG key for weights that draw; those of guidances with a density do not.

    Returns:
        A scalar, under a guidance not normalized.
    """
    if not isinstance(target, Guided):
        return cast("Analytic", target).log_density(x, sigma, cond)
    guidance = cast("Linear", target.guidance)
    if key is None:
        key = jr.key(0)
    # What such weights may look at is the noise level: `Guided` refuses those that need a grid.
    ctx = Context.alone(x, sigma, cond=cond, key=key)
    # Weights in the dtype of the example: a float64 scale must not widen the whole evaluation.
    weights = [weight(ctx).astype(x.dtype) for weight in guidance.weights]
    # The first prediction has what the weights of the others leave: guidances are affine combinations.
    shares = [1 - sum(weights, jnp.zeros((), x.dtype)), *weights]
    total = jnp.zeros((), x.dtype)
    for slot, share in zip(guidance.predictions, shares, strict=True):
        denoiser = target.model if slot.net is None else slot.net
        total = total + share * cast("Analytic", denoiser).log_density(x, sigma, _condition_of(slot, cond))
    return total


def _condition_of(slot: Slot, cond: PyTree) -> PyTree:
    """The condition that a slot names: the caller's, none, or its own."""
    if isinstance(slot.cond, str):
        return {"given": cond, "null": None}[slot.cond]
    return slot.cond


class Distillation(eqx.Module):
    """The model of a distillation: the student, its critics, the teacher.

    Args:
        student: the generator `(z, cond=None) -> x`, for one example.
        teacher: the denoiser that is distilled; never trained.
        fake: a denoiser that learns the distribution of the student; `None` where the student knows its own.
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

    student: Callable[..., Array]
    teacher: Callable[..., Array] = eqx.field(metadata=FROZEN)
    fake: Callable[..., Array] | None = None
    discriminator: Callable[..., Array] | None = None
    guidance: PyTree = eqx.field(default=None, metadata=FROZEN)
    positives: Callable[..., PyTree] | None = eqx.field(default=None, metadata=FROZEN)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the teacher or the student knows it."""
        own = as_denoiser(self.teacher).shape
        if own is None:
            own = student_fact(self.student, "shape", None)
        return own

    @property
    def num_labels(self) -> int | None:
        """Number of classes, where the teacher knows it."""
        return as_denoiser(self.teacher).num_labels

    @property
    def latent_shape(self) -> tuple[int, ...] | None:
        """Shape of the latent of the student, where it differs from the example's."""
        return student_fact(self.student, "latent_shape", None)

    @property
    def num_evaluations(self) -> int:
        """Network evaluations of one draw of the student."""
        return student_fact(self.student, "num_evaluations", 1)

    def __call__(self, z: Float[Array, "..."], cond: PyTree = None) -> Float[Array, "..."]:
        """One draw of the student from its latent."""
        return self.student(z, cond)

    @property
    def target(self) -> Callable[..., Array]:
        """The denoiser to be matched: the teacher under its guidance."""
        return under_guidance(self.teacher, self.guidance)

    @property
    def own(self) -> Callable[..., Array]:
        """The denoiser of the student's distribution: learned, or the student's own; it takes the condition."""
        if self.fake is not None:
            return self.fake
        return own_denoiser(cast("KnowsItself", self.student))

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
            return cast("Drawable", self.teacher).sample(num, cond=cond, key=key), cond
        drawn = self.positives(key, num)
        if isinstance(drawn, tuple):
            return drawn
        return drawn, cond


class TeacherSamples(eqx.Module):
    """A pool of draws of a guided teacher, to learn from: `positives(key, n)` takes random rows.

    `teacher_pool` makes one that also keeps the noise each draw came from, which `PairRegression` needs.

    Args:
        x: the draws `(m, *shape)`.
        cond: their conditions `(m, ...)`, or `None`.
        latents: the standard normals that a deterministic sampler took to the draws `(m, *shape)`, or `None`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> pool = gk.distill.TeacherSamples(jnp.zeros((10, 2)), jnp.arange(10))
        >>> x, cond = pool(jax.random.key(0), 4)
        >>> x.shape, cond.shape
        ((4, 2), (4,))
    """

    x: Float[Array, " m *shape"] = eqx.field(converter=jnp.asarray)
    cond: PyTree = None
    latents: Float[Array, " m *shape"] | None = eqx.field(converter=maybe_number, default=None)

    def __check_init__(self):
        # Transformations of JAX rebuild modules with other things than arrays in place of their leaves.
        if isinstance(self.x, (jax.Array, np.ndarray)):
            check(self.x.shape[:1] != (0,), "x", "draws (m, *shape), m at least 1", self.x)
            check_finite("x", self.x)
        if self.latents is not None:
            fits = self.latents.shape == self.x.shape
            check(fits, "latents", lambda: f"of the shape {self.x.shape} of the draws", self.latents)
        for leaf in jax.tree.leaves(self.cond):
            size = jnp.shape(leaf)[:1]
            check(size == self.x.shape[:1], "cond", lambda: f"one entry for each of {self.x.shape[0]} draws", size)

    def __call__(self, key: Key[Array, ""], n: int) -> Array | tuple[Array, PyTree]:
        """Draw rows.

        Args:
            key: typed PRNG key.
            n: number of rows.

        Returns:
            Draws `(n, *shape)`, or a pair of them and their conditions.
        """
        _, x, cond = self.rows(key, n)
        if self.cond is None:
            return x
        return x, cond

    def rows(self, key: Key[Array, ""], n: int) -> tuple[Array | None, Array, PyTree]:
        """Random rows of all there is.

        Args:
            key: typed PRNG key.
            n: number of rows.

        Returns:
            Latents, draws and conditions, each `(n, ...)` or `None`.
        """
        # One index for all three, so that latents stay with their draws.
        index = jr.randint(key, (n,), 0, self.x.shape[0])
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], (self.latents, self.x, self.cond))


def teacher_pool(
    teacher: Callable[..., Array],
    sampler: Table | AbstractSampler,
    num_samples: int,
    *,
    key: Key[Array, ""],
    cond: PyTree = None,
    guidance: Guidance | None = None,
    shape: tuple[int, ...] | None = None,
    batch_size: int | None = None,
) -> TeacherSamples:
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
    if not isinstance(sampler, Table):
        fail("sampler", "a fixed-grid sampler, such as `gk.diffusion.heun(grid)`", sampler)
    is_deterministic = not (np.any(np.asarray(sampler.c)) or np.any(np.asarray(sampler.c_stage)))
    check(is_deterministic, "sampler", "deterministic, so that the noise determines the draw", "one that adds noise")
    if shape is None:
        shape = as_denoiser(teacher).shape
    if shape is None:
        fail("shape", "given", "None", "The teacher does not know its shape.")
    key_latent, key_draw = jr.split(key)
    latents = jr.normal(key_latent, (num_samples, *shape))
    # The pool keeps standard normals: the student scales them as it likes.
    start = jnp.asarray(sampler.sigma)[0].astype(latents.dtype) * latents
    drawn = sample(
        sampler, teacher, num_samples, cond=cond, guidance=guidance, x_init=start, key=key_draw, batch_size=batch_size
    )
    if cond is not None and jnp.ndim(cond) == 0:
        cond = jnp.broadcast_to(cond, (num_samples,))
    return TeacherSamples(drawn.value, cond, latents)
