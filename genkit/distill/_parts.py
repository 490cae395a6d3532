"""The parts of a distillation before training, and what is refused about them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from genkit._core._checks import check, describe
from genkit.guidance import Guided

from ._losses import AbstractLoss, Regression
from ._model import Distillation, has_density
from ._ratios import DiscriminatorRatio, EmpiricalRatio, ExactRatio


def start(
    teacher: Any, student: Any, loss: AbstractLoss, *, guidance: Any, fake: Any, positives: Any
) -> tuple[Distillation, AbstractLoss]:
    """The parts before training, and the loss with its network moved among them."""
    check(callable(teacher), "teacher", "a denoiser (x, sigma, cond=None) -> x0", describe(teacher))
    check(callable(student), "student", "a generator (z, cond=None) -> x", describe(student))
    if guidance is not None:
        Guided(teacher, guidance, forget=True)  # refuses what changes no single prediction
    needs_own, needs_critic = loss.needs()
    net = None
    for part in getattr(loss, "parts", (loss,)):
        found = getattr(getattr(part, "ratio", None), "net", None)
        net = net if found is None else found
    if needs_critic:
        hint = "Add `FDistill(..., DiscriminatorRatio(net))`, which trains one."
        check(net is not None, "loss", "with a DiscriminatorRatio where a discriminator is needed", "none", hint)
        is_ratio = lambda node: isinstance(node, DiscriminatorRatio)
        bare = lambda node: DiscriminatorRatio(None, node.smoothness) if is_ratio(node) else node
        loss = jax.tree.map(bare, loss, is_leaf=is_ratio)
    if needs_own and fake is None and not hasattr(student, "denoiser"):
        trainable = any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(teacher))
        hint = "Pass `fake=`, say `gk.diffusion.Preconditioned(gk.nn.MLP(shape, key=key))`."
        network = trainable and not hasattr(teacher, "log_density")
        check(network, "fake", "given, because an analytic teacher cannot learn the law of the student", "None", hint)
        fake = teacher
    fake = fake if needs_own else None
    return Distillation(student, teacher, fake, net, guidance, positives), loss


def check_shapes(model: Distillation, data: Callable, latent_shape: Any) -> tuple[int, ...]:
    """The shape of the latent; refuse a student whose draws are not of the teacher's shape."""
    cond = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], data(jr.key(0))))
    latent = latent_shape if latent_shape is not None else model.latent_shape or model.shape
    hint = "The teacher does not know its shape."
    check(latent is not None, "latent_shape", "given", "None", hint)
    latent = tuple(latent or ())
    z = jax.ShapeDtypeStruct(latent, jnp.result_type(float))
    x = eqx.filter_eval_shape(lambda s, z, c: s(z, c), model.student, z, cond)
    check(hasattr(x, "shape"), "student", "a generator that returns an array", describe(x))
    if model.shape is not None:
        what = f"a generator of examples of the teacher's shape {tuple(model.shape)}"
        check(x.shape == tuple(model.shape), "student", what, f"shape {x.shape} from a latent of shape {latent}")
    level = jax.ShapeDtypeStruct((), x.dtype)
    y = eqx.filter_eval_shape(lambda t, y, s, c: t(y, s, c), model.target, x, level, cond)
    check(y.shape == x.shape, "teacher", f"a denoiser that keeps the student's shape {x.shape}", f"shape {y.shape}")
    return latent


def check_parts(model: Distillation, loss: AbstractLoss, cond: Any) -> None:
    """Refuse ratios that lack what they are made of."""
    for part in getattr(loss, "parts", (loss,)):
        if isinstance(part, Regression):
            known = getattr(model.positives, "latents", None) is not None
            hint = "Make it with gk.distill.teacher_pool(teacher, gk.diffusion.heun(grid), num, key=key)."
            check(known, "positives", "a pool with latents for Regression", describe(model.positives), hint)
        ratio = getattr(part, "ratio", None)
        if isinstance(ratio, (ExactRatio, EmpiricalRatio)):
            name = type(ratio).__name__
            hint = "Use DiscriminatorRatio(net) or ScoreRatio(sigma_max)."
            check(
                hasattr(model.teacher, "log_density"),
                "teacher",
                f"analytic for {name}",
                "one without log_density",
                hint,
            )
            if model.guidance is not None:
                kind = type(model.guidance).__name__
                hint = "Use DiscriminatorRatio(net) with `positives`, or ScoreRatio(sigma_max)."
                asked = f"None or a weighted sum of predictions, such as `gk.guidance.cfg(scale)`, for {name}"
                check(has_density(model.guidance), "guidance", asked, kind, hint)
        if isinstance(ratio, ExactRatio):
            hint = "Give it a method `denoiser()` that returns an analytic denoiser, or use another ratio."
            check(hasattr(model.student, "denoiser"), "student", "of a law in closed form", "no `denoiser()`", hint)
        if isinstance(ratio, EmpiricalRatio):
            single = cond is None or (not callable(cond) and jnp.ndim(cond) == 0)
            check(single, "cond", "None or one value for EmpiricalRatio", describe(cond))
    if model.discriminator is not None and model.positives is None:
        hint = "Draw them with gk.sample and pass `positives=gk.distill.Positives(draws, cond)`."
        check(
            model.guidance is None,
            "positives",
            "given with `guidance`: draws of the same, guided, teacher",
            "None",
            hint,
        )
        can = hasattr(model.teacher, "sample")
        check(can, "positives", "given, because the teacher has no `sample`", "None", hint)
