"""Assembly of a distillation before training, and the checks of its parts."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree

from genkit._core._checks import check, describe, fail
from genkit.distill._losses import AbstractLoss, PairRegression
from genkit.distill._model import Distillation, TeacherSamples, has_density
from genkit.distill._ratios import DiscriminatorRatio, EmpiricalRatio, ExactRatio
from genkit.distill._students import KnowsItself, ignores_condition, own_denoiser
from genkit.distill._teachers import Drawable, has_log_density, is_network, under_guidance
from genkit.sampling import Guidance


_MOST_CONDITIONS = 64


def start(
    teacher: Callable[..., Array],
    student: Callable[..., Array],
    loss: AbstractLoss,
    *,
    guidance: Guidance | None,
    cond: PyTree,
    fake: Callable[..., Array] | None,
    positives: Callable[..., PyTree] | None,
) -> tuple[Distillation, AbstractLoss]:
    """The model before training, and the loss with its network moved into the model.

    Args:
        teacher: as for `distill`.
        student: as for `distill`.
        loss: the loss of the student.
        guidance: as for `distill`.
        cond: as for `distill`.
        fake: as for `distill`.
        positives: as for `distill`.

    Returns:
        The model and the loss.
    """
    check(callable(teacher), "teacher", "a denoiser (x, sigma, cond=None) -> x0", teacher)
    check(callable(student), "student", "a generator (z, cond=None) -> x", student)
    # Refuses what changes no single prediction.
    under_guidance(teacher, guidance)
    needs_own, needs_critic = loss.needs()
    net = None
    for ratio in loss.ratios():
        if isinstance(ratio, DiscriminatorRatio) and ratio.net is not None:
            net = ratio.net
    if needs_critic:
        hint = "Add `FDistill(..., DiscriminatorRatio(net))`, which trains one."
        check(net is not None, "loss", "with a DiscriminatorRatio where a discriminator is needed", "none", hint)
    # A network teacher is the best start there is for the student's denoiser; an analytic one cannot learn.
    if needs_own and fake is None and not isinstance(student, KnowsItself):
        hint = "Pass `fake=`, say `gk.diffusion.Preconditioned(gk.nn.MLP(shape, key=key))`."
        what = "given, because an analytic teacher cannot learn the distribution of the student"
        check(is_network(teacher), "fake", what, "None", hint)
        fake = teacher
    if not needs_own:
        fake = None
    return Distillation(student, teacher, fake, net, guidance, positives), _completed(loss, cond)


def _completed(loss: AbstractLoss, cond: PyTree) -> AbstractLoss:
    """The loss whose ratios know the conditions, and leave their networks to the model."""

    def complete(node: PyTree) -> PyTree:
        if isinstance(node, DiscriminatorRatio):
            return DiscriminatorRatio(None, node.smoothness)
        if isinstance(node, EmpiricalRatio) and node.conditions is None:
            return EmpiricalRatio(node.num_samples, _different(cond))
        return node

    return jax.tree.map(complete, loss, is_leaf=lambda node: isinstance(node, (DiscriminatorRatio, EmpiricalRatio)))


def _different(cond: PyTree) -> Array | None:
    """The different entries of an array of conditions; None where they are drawn, or too many to draw for each."""
    if cond is None or callable(cond):
        return None
    # On the host, once: the number of different conditions is a shape.
    entries = np.unique(np.atleast_1d(np.asarray(cond)), axis=0)
    if len(entries) > _MOST_CONDITIONS:
        return None
    return jnp.asarray(entries)


def check_shapes(
    model: Distillation, data: Callable[..., PyTree], latent_shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The shape of the latent; refuse a student whose draws are not of the teacher's shape.

    Args:
        model: the model before training.
        data: `data(key)` returns a batch of conditions, or `None`.
        latent_shape: as for `distill`.

    Returns:
        The shape of the latent.
    """
    cond = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], data(jr.key(0))))
    # The student's own latent comes first: that of several steps has an axis for them.
    latent = latent_shape
    if latent is None:
        latent = model.latent_shape or model.shape
    if latent is None:
        fail("latent_shape", "given", "None", "The teacher does not know its shape.")
    latent = tuple(latent)
    z = jax.ShapeDtypeStruct(latent, jnp.result_type(float))
    x = eqx.filter_eval_shape(lambda s, z, c: s(z, c), model.student, z, cond)
    check(isinstance(x, jax.ShapeDtypeStruct), "student", "a generator that returns an array", x)
    if model.shape is not None and x.shape != tuple(model.shape):
        what = f"a generator of examples of the teacher's shape {tuple(model.shape)}"
        fail("student", what, f"shape {x.shape} from a latent of shape {latent}")
    level = jax.ShapeDtypeStruct((), x.dtype)
    y = eqx.filter_eval_shape(lambda t, y, s, c: t(y, s, c), model.target, x, level, cond)
    if y.shape != x.shape:
        fail("teacher", f"a denoiser that keeps the student's shape {x.shape}", f"shape {y.shape}")
    return latent


def check_parts(
    model: Distillation, loss: AbstractLoss, data: Callable[..., PyTree], latent_shape: tuple[int, ...]
) -> None:
    """Refuse losses that lack what they are made of.

    Args:
        model: the model before training.
        loss: the loss of the student.
        data: `data(key)` returns a batch of conditions, or `None`.
        latent_shape: shape of the latent.
    """
    if any(isinstance(term, PairRegression) for term in loss.terms):
        _check_pairs(model.positives)
    uses_own = loss.needs()[0] and model.fake is None
    for ratio in loss.ratios():
        if isinstance(ratio, (ExactRatio, EmpiricalRatio)):
            _check_analytic(model, type(ratio).__name__)
        if isinstance(ratio, ExactRatio):
            hint = "Give it a method `denoiser()` that returns an analytic denoiser, or use another ratio."
            is_known = isinstance(model.student, KnowsItself)
            check(is_known, "student", "of a distribution in closed form", "no `denoiser()`", hint)
            uses_own = True
    if uses_own:
        _check_own(model, data, latent_shape)
    if model.discriminator is not None and model.positives is None:
        hint = "Draw them with gk.sample and pass `positives=gk.distill.TeacherSamples(draws, cond)`."
        what = "given with `guidance`: draws of the same, guided, teacher"
        check(model.guidance is None, "positives", what, "None", hint)
        can_draw = isinstance(model.teacher, Drawable)
        check(can_draw, "positives", "given, because the teacher has no `sample`", "None", hint)


def _check_pairs(positives: PyTree) -> None:
    hint = "Make it with gk.distill.teacher_pool(teacher, gk.diffusion.heun(grid), num, key=key)."
    has_latents = isinstance(positives, TeacherSamples) and positives.latents is not None
    # A pool of the user's own may serve as well.
    has_latents = has_latents or getattr(positives, "latents", None) is not None
    check(has_latents, "positives", "a pool with latents for PairRegression", positives, hint)


def _check_analytic(model: Distillation, name: str) -> None:
    hint = "Use DiscriminatorRatio(net) or ScoreRatio(sigma_max)."
    is_analytic = has_log_density(model.teacher)
    check(is_analytic, "teacher", lambda: f"analytic for {name}", "one without log_density", hint)
    if model.guidance is not None and not has_density(model.guidance):
        what = f"None or a weighted sum of predictions, such as `gk.guidance.cfg(scale)`, for {name}"
        hint = "Use DiscriminatorRatio(net) with `positives`, or ScoreRatio(sigma_max)."
        fail("guidance", what, type(model.guidance).__name__, hint)


def _check_own(model: Distillation, data: Callable[..., PyTree], latent_shape: tuple[int, ...]) -> None:
    """Refuse a student's denoiser that cannot be called with the conditions, or that knows less than the student."""
    cond = data(jr.key(0))
    student = model.student
    if not isinstance(student, KnowsItself):
        return
    one = jax.tree.map(lambda leaf: leaf[0], cond)
    z = jnp.zeros(latent_shape)
    x = eqx.filter_eval_shape(lambda s: s(z, one), student)
    hint = "It takes (x, sigma, cond), as the student takes (z, cond)."
    try:
        eqx.filter_eval_shape(lambda s, x: own_denoiser(s)(x, jnp.ones((), x.dtype), one), student, x)
    except (TypeError, ValueError) as error:
        fail("student.denoiser()", "a denoiser under the conditions of the student", f"an error: {error}", hint)
    if cond is None or not ignores_condition(student.denoiser()):
        return
    # A student of one distribution may stand beside a teacher of several; one that draws by its condition may not
    # say that it has no condition, or every ratio would be wrong.
    normal = jr.normal(jr.key(0), latent_shape)
    drawn = eqx.filter_jit(lambda s, c: jax.vmap(lambda one: s(normal, one))(c))(student, cond)
    spread = float(jnp.max(jnp.abs(drawn - drawn[:1])))
    is_same = spread <= 1e-4 * (1 + float(jnp.max(jnp.abs(drawn))))
    what = "a denoiser that takes the condition, because the student's draws depend on it"
    check(is_same, "student.denoiser()", what, describe(type(student.denoiser()).__name__), "Give it labels.")
