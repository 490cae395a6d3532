"""`distill`: a teacher into a generator of one or a few steps."""

import warnings
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check, check_count
from genkit.distill._losses import AbstractLoss, FDistill
from genkit.distill._objectives import cosine_adam, cycle
from genkit.distill._parts import check_parts, check_shapes, start
from genkit.distill._ratios import AbstractRatio, NoRatio
from genkit.divergence import FDivergence, ReverseKL
from genkit.sampling import Guidance
from genkit.training import Fitted, Recipe, fit


class Conditions(eqx.Module):
    """Batches of conditions, as the data of a distillation.

    Args:
        cond: `None`; one value for all; an array `(m, ...)`, of which rows are drawn uniformly; or a function
            `key -> cond`.
        batch_size: conditions per batch.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> gk.distill.Conditions(jnp.arange(10), 4)(jax.random.key(0)).shape
        (4,)
    """

    cond: PyTree
    batch_size: int = eqx.field(static=True)

    def __init__(self, cond: PyTree = None, batch_size: int = 256):
        check_count("batch_size", batch_size)
        if cond is not None and not callable(cond):
            cond = jnp.asarray(cond)
            check(cond.shape[:1] != (0,), "cond", "at least one condition", cond)
        self.cond = cond
        self.batch_size = batch_size

    def __call__(self, key: Key[Array, ""]) -> PyTree[Array]:
        """Draw a batch.

        Args:
            key: typed PRNG key.

        Returns:
            Conditions with leading axis `batch_size`, or `None`.
        """
        if self.cond is None:
            return None
        if callable(self.cond):
            return jax.vmap(self.cond)(jr.split(key, self.batch_size))
        # One value for all draws.
        if self.cond.ndim == 0:
            return jnp.broadcast_to(self.cond, (self.batch_size,))
        return self.cond[jr.randint(key, (self.batch_size,), 0, self.cond.shape[0])]


class Distilled(Fitted):
    """Result of a distillation.

    Args:
        model: the student after the last step; also as `student`.
        ema: the student with its weights averaged over steps; the student itself where no average was kept.
        log: metrics of each step, NumPy arrays `(num_steps,)`; those of the student and of the critics begin with
            `student/` and `critic/` where there are critics.
        state: the training, critics included.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> student = gk.distill.OneStep(gk.diffusion.GaussianDenoiser(jnp.ones(2), 1.0), 3.0)
        >>> made = gk.distill.distill(teacher, student, loss=gk.distill.SDS(), noise_distribution=dist.Uniform(0.5, 2.0),
        ...                           num_steps=2, batch_size=8, key=jax.random.key(0))
        >>> made.history["gap"].shape
        (2,)
    """  # noqa: E501

    @property
    def student(self) -> PyTree:
        """The student after the last step."""
        return self.model

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The log, the student's metrics by their bare names: `divergence`, `ess` and more, each `(num_steps,)`."""
        return {name.removeprefix("student/"): values for name, values in self.log.items()}

    @classmethod
    def of_training(cls, fitted: Fitted) -> "Distilled":
        """The result of training a model that has a `student`."""
        return cls.extend(fitted, model=fitted.model.student, ema=fitted.ema.student)


def recipe(
    teacher: Callable[..., Array],
    student: Callable[..., Array],
    *,
    noise_distribution: dist.Distribution,
    num_steps: int,
    divergence: FDivergence | None = None,
    ratio: AbstractRatio | None = None,
    loss: AbstractLoss | None = None,
    guidance: Guidance | None = None,
    cond: PyTree = None,
    weight: Callable[[Array], Array] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 256,
    latent_shape: tuple[int, ...] | None = None,
    fake: Callable[..., Array] | None = None,
    fake_optimizer: optax.GradientTransformation | None = None,
    fake_steps: int = 5,
    positives: Callable[..., PyTree] | None = None,
    ema: float | None = None,
    name: str = "distill",
) -> Recipe:
    """A distillation as a recipe for `gk.fit` and the command line; see `distill` for the arguments.

    Args:
        teacher: the denoiser to distill.
        student: the generator to train.
        noise_distribution: scalar numpyro distribution of the noise level.
        num_steps: updates of the student.
        divergence: any f-divergence; default `ReverseKL()`.
        ratio: how the log-ratio is known; `None` for none, which the reverse KL does not need.
        loss: a loss instead of `divergence` and `ratio`.
        guidance: guidance of the teacher.
        cond: conditions.
        weight: function of the noise level.
        optimizer: optimizer of the student.
        batch_size: draws per update.
        latent_shape: shape of the latent.
        fake: denoiser that learns the distribution of the student.
        fake_optimizer: optimizer of the critics.
        fake_steps: updates of the critics per update of the student.
        positives: draws of the guided teacher.
        ema: decay of a moving average of what is trained, or `None`.
        name: what the log calls it.

    Returns:
        A recipe whose model is a `Distillation`.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> student = gk.distill.OneStep(gk.diffusion.GaussianDenoiser(jnp.ones(2), 1.0), 3.0)
        >>> recipe = gk.distill.recipe(teacher, student, loss=gk.distill.SDS(), noise_distribution=dist.Uniform(0.5, 2.0), num_steps=5)
        >>> [phase.name for phase in recipe.phases]
        ['student']
    """  # noqa: E501
    check_count("num_steps", num_steps)
    check_count("fake_steps", fake_steps)
    both = loss is not None and (divergence is not None or ratio is not None)
    check(not both, "loss", "None where `divergence` or `ratio` is given", type(loss).__name__)
    if loss is None:
        loss = FDistill(divergence or ReverseKL(), ratio or NoRatio())
    data = Conditions(cond, batch_size)
    model, loss = start(teacher, student, loss, guidance=guidance, cond=data.cond, fake=fake, positives=positives)
    latent_shape = check_shapes(model, data, latent_shape)
    check_parts(model, loss, data, latent_shape)
    if optimizer is None:
        optimizer = default_optimizer(student, num_steps)
    phases = cycle(
        loss,
        noise_distribution=noise_distribution,
        latent_shape=latent_shape,
        optimizer=optimizer,
        fake_optimizer=fake_optimizer,
        weight=weight,
        batch_size=batch_size,
        fake_steps=fake_steps,
        critics=(model.fake is not None, model.discriminator is not None),
    )
    return Recipe(lambda key: model, data, phases, num_steps, ema=ema, name=name)


def distill(
    teacher: Callable[..., Array],
    student: Callable[..., Array],
    *,
    divergence: FDivergence | None = None,
    ratio: AbstractRatio | None = None,
    noise_distribution: dist.Distribution,
    num_steps: int,
    key: Key[Array, ""],
    guidance: Guidance | None = None,
    cond: PyTree = None,
    weight: Callable[[Array], Array] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 256,
    latent_shape: tuple[int, ...] | None = None,
    fake: Callable[..., Array] | None = None,
    fake_optimizer: optax.GradientTransformation | None = None,
    fake_steps: int = 5,
    positives: Callable[..., PyTree] | None = None,
    loss: AbstractLoss | None = None,
    ema: float | None = None,
) -> Distilled:
    r"""Distill a denoiser into a generator of one or a few steps.

    Minimizes $E_\sigma[w(\sigma) D_f(p_\sigma \| q_\sigma)]$ between the (guided) teacher p and the student q, both
    under noise of standard deviation $\sigma$, by the pathwise gradient of `FDistill` (or another loss), under each
    condition. Where the distribution of the student is not known in closed form, a fake denoiser (and a discriminator,
    for `DiscriminatorRatio`) follows it, `fake_steps` updates for each update of the student, in one compiled scan.

    Args:
        teacher: a denoiser: analytic, or a trained network.
        student: an `eqx.Module` `(z, cond=None) -> x`; with a method `denoiser()` that returns an analytic denoiser of
            its own distribution, under its condition, `ExactRatio` needs no critic.
        noise_distribution: scalar numpyro distribution of the noise level; log-uniform from a tenth of the spread of
            the data to five times it is a good one.
        num_steps: updates of the student.
        key: typed PRNG key.
        divergence: any f-divergence; default `ReverseKL()`.
        ratio: how the log-ratio is known; `None` for none, which the reverse KL does not need.
        guidance: any `gk.Guidance` of the teacher; p is the guided distribution.
        cond: one value, an array of which entries are drawn uniformly, or a function `key -> cond`.
        weight: function of the noise level; `None` is 1.
        optimizer: of the student; default Adam with a cosine from 1e-3 (2e-2 for students of at most 64 numbers).
        batch_size: draws per update.
        latent_shape: shape of the standard normal latent; default the student's own, else the shape of an example.
        fake: a denoiser that learns the distribution of the student; default a copy of a network teacher.
        fake_optimizer: of fake and discriminator alike; default Adam at 2e-3.
        fake_steps: updates of both per update of the student.
        positives: `positives(key, n)` draws of the guided teacher; default `teacher.sample`.
        loss: a loss instead of `divergence` and `ratio`: `SiD()`, `SDS()`, `dmd()`, `FDistill(...) + Adversarial()`.
        ema: decay of a moving average of what is trained, or `None`.

    Returns:
        A `Distilled`: a `Fitted` with `.student`, `.ema`, and `.history`: `divergence`, `ess` and more, each
        `(num_steps,)`.

    Raises:
        ValueError: for shapes that do not fit, a divergence without pathwise gradients, a ratio without what it needs.
        NonFiniteError: if the training leaves the finite numbers.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> class Gaussian(eqx.Module):
        ...     mean: jax.Array
        ...     log_std: jax.Array
        ...     def __call__(self, z, cond=None):
        ...         return self.mean + jnp.exp(self.log_std) * z
        ...     def denoiser(self):
        ...         return gk.diffusion.GaussianDenoiser(self.mean, jnp.exp(2 * self.log_std))
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.ones(1), 1.0)
        >>> made = gk.distill.distill(teacher, Gaussian(jnp.zeros(1), jnp.zeros(1)), ratio=gk.distill.ExactRatio(),
        ...                           divergence=gk.divergence.JensenShannon(), num_steps=300, key=jax.random.key(0),
        ...                           noise_distribution=dist.LogUniform(0.1, 5.0))
        >>> bool(abs(made.student.mean[0] - 1.0) < 0.05)
        True

    Source: Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025; Yin et al.,
    "Improved Distribution Matching Distillation for Fast Image Synthesis", NeurIPS 2024 (two time scales).
    """
    made = recipe(
        teacher,
        student,
        noise_distribution=noise_distribution,
        num_steps=num_steps,
        divergence=divergence,
        ratio=ratio,
        loss=loss,
        guidance=guidance,
        cond=cond,
        weight=weight,
        optimizer=optimizer,
        batch_size=batch_size,
        latent_shape=latent_shape,
        fake=fake,
        fake_optimizer=fake_optimizer,
        fake_steps=fake_steps,
        positives=positives,
        ema=ema,
    )
    fitted = fit(made.replace(log_every=min(num_steps, 500)), key=key)
    distilled = Distilled.of_training(fitted)
    warn_of_faults(distilled.history)
    return distilled


FAULTS = {
    "critic/saturation": "the discriminator is saturated: {:.0f} % of its logits ended beyond 10 in size, where they "
    "say nothing about ratios. Raise the smallest noise level, give DiscriminatorRatio a `smoothness`, or start the "
    "student nearer to the teacher.",
    "clipped": "{:.0f} % of the log-ratios ended beyond `max_log_ratio`: the weights are the bound's more than the "
    "divergence's. Where that bound is not narrow, student and teacher hardly overlap: raise the smallest noise level, "
    "start the student nearer to the teacher, or take a divergence of bounded weight, such as JensenShannon().",
}
# An estimate this far below zero, in standard errors of its mean and in nats, is not the noise of its draws.
_STANDARD_ERRORS = 5.0
_LEAST_DEFICIT = 1e-3


def warn_of_faults(history: dict[str, np.ndarray]) -> None:
    """Warn where most log-ratios ended as no ratios, or where the divergence ended below zero.

    Args:
        history: metrics of each step.
    """
    for name, words in FAULTS.items():
        if name in history:
            share = float(np.mean(_last_tenth(history[name])))
            if share > 0.5:
                warnings.warn(words.format(100 * share), stacklevel=3)
    # Early steps may be far off; the end is what the student is judged by.
    values = np.asarray(_last_tenth(history.get("divergence", np.zeros(1))), np.float64)
    mean = float(values.mean())
    error = float(values.std() / np.sqrt(len(values)))
    if len(values) >= 5 and mean < -max(_STANDARD_ERRORS * error, _LEAST_DEFICIT):
        warnings.warn(
            f"the divergence ended at {mean:.3g} with a standard error of {error:.2g}, and no divergence is negative: "
            "the log-ratios are not those of the teacher and the student. Look at the student's `denoiser()`, at its "
            "condition, or train the critics longer (`fake_steps`).",
            stacklevel=3,
        )


def _last_tenth(values: np.ndarray) -> np.ndarray:
    return values[-max(1, len(values) // 10) :]


def default_optimizer(student: PyTree, num_steps: int) -> optax.GradientTransformation:
    """Adam under a cosine; students of a few numbers take larger steps than networks.

    Args:
        student: the student.
        num_steps: its updates.

    Returns:
        The optimizer.
    """
    # A handful of numbers tolerates, and needs, steps that would wreck a network.
    size = sum(leaf.size for leaf in jax.tree.leaves(student) if eqx.is_inexact_array(leaf))
    if size <= 64:
        return cosine_adam(2e-2, num_steps)
    return cosine_adam(1e-3, num_steps)
