"""A denoiser under a guidance, as a denoiser: for solvers that choose their own steps, and for distillation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact, PyTree

from genkit._core._checks import describe, fail
from genkit.sampling._context import Context
from genkit.sampling._denoiser import AbstractDelegatingDenoiser
from genkit.sampling._guidance import Guidance, Sum, parts_of
from genkit.sampling._hooks import collect_hooks
from genkit.sampling._runner import Runner


class Guided(AbstractDelegatingDenoiser):
    """A denoiser under a guidance, as a denoiser again: one prediction, outside any grid of steps.

    Adaptive solvers evaluate a vector field at rejected steps too, several times per step and in any order, so that
    whatever a guidance remembers (momentum, a latch, a history) would be wrong there; nor is there a next noise level
    or a number of steps. Such guidance is refused.

    Args:
        model: the denoiser.
        guidance: a guidance that needs neither step numbers nor the next noise level, and has no carry.
        forget: take a guidance with a carry too, and evaluate it each time as in its first step: for training on
            predictions that stand alone.

    Raises:
        TypeError: if `guidance` is none.
        ValueError: if it carries state or needs a fixed grid, is a step transform or a population.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.MixtureDenoiser(
        ...     jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.01), labels=jnp.array([0, 1])
        ... )
        >>> guided = gk.sampling.Guided(denoiser, gk.guidance.cfg(2.0))
        >>> round(float(guided(jnp.zeros(1), jnp.array(1.0), 1)[0]), 2)
        1.98
    """

    model: Callable
    guidance: Guidance

    def __init__(self, model: Callable, guidance: PyTree, *, forget: bool = False):
        hooks = collect_hooks(guidance)
        main = hooks.guidance
        if main is None or hooks.transforms or hooks.population is not None:
            raise ValueError(
                "`guidance` must be one guidance without step transforms or populations here, because there are no "
                f"fixed steps for them to act at; got {describe(guidance)}. Use a table, such as "
                "`gk.diffusion.heun(grid)`."
            )
        self.model = model
        self.guidance = main
        hint = "Use it with a table, such as `gk.diffusion.heun(grid)`."
        if not forget and jax.tree.leaves(jax.eval_shape(lambda x: main.init(x), jnp.zeros(1))):
            why = (
                "stateless here: predictions are asked for in any order (an adaptive solver's rejected steps too), "
                "which would corrupt what it remembers"
            )
            fail("guidance", why, f"{type(main).__name__}, which carries state", hint)
        found = _that_need_a_grid(main)
        if found:
            why = "a function of the noise level alone here: outside a grid there are no step numbers and no next level"
            fail("guidance", why, ", ".join(found), hint)

    @property
    def denoiser(self) -> Callable:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The denoiser without its guidance."""
        return self.model

    @property
    def no_likelihood(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Why there is none."""
        return "a guided field is the score of no noisy data distribution. Pass the plain denoiser."

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        if cond is None and compares_with_absence(self.guidance):
            fail("cond", "a condition to guide towards", "None")
        x = jnp.asarray(x)
        batch = None
        if cond is not None:
            batch = jnp.asarray(cond)[None]
        ctx = Context.alone(x[None], jnp.asarray(sigma, x.dtype), cond=batch, key=jax.random.key(0)[None])
        runner = Runner(self.model, self.guidance, "dynamic", False)
        return runner(ctx, jax.vmap(self.guidance.init)(ctx.x))[0][0]


def compares_with_absence(guidance: Guidance) -> bool:
    """True if the guidance evaluates both under the condition of the draw and under none."""
    kinds = {slot.cond for slot in guidance.slots() if isinstance(slot.cond, str)}
    return {"given", "null"} <= kinds


def _that_need_a_grid(tree: PyTree) -> list[str]:
    """Names of the parts inside that use step numbers or the next noise level."""
    found: list[str] = []
    for part in parts_of(tree):
        if part.needs_grid:
            found.append(type(part).__name__)
        if isinstance(part, Sum):
            # A sum keeps the arrays of its parts, and builds the parts when asked.
            found.extend(_that_need_a_grid(part.parts))
    return found
