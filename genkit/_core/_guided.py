"""A denoiser under a guidance, as a denoiser: for solvers that choose their own steps, and for distillation."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from ._checks import check, describe
from ._denoiser import Denoiser
from ._guidance import Context, Guidance, collect_hooks
from ._guidance_algebra import Sum
from ._runner import Runner


class Guided(Denoiser):
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
        >>> from genkit._core import Guided
        >>> law = gk.diffusion.MixtureDenoiser(
        ...     jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.01), labels=jnp.array([0, 1])
        ... )
        >>> guided = Guided(law, gk.guidance.cfg(2.0))
        >>> round(float(guided(jnp.zeros(1), jnp.array(1.0), 1)[0]), 2)
        1.98
    """

    model: Callable
    guidance: Guidance

    def __init__(self, model: Callable, guidance: Any, *, forget: bool = False):
        hooks = collect_hooks(guidance)
        alone = hooks.guidance is not None and not hooks.transforms and hooks.population is None
        if hooks.guidance is None or not alone:
            raise ValueError(
                "`guidance` must be one guidance without step transforms or populations here, because there are no "
                f"fixed steps for them to act at; got {describe(guidance)}. Use a table, such as "
                "`gk.diffusion.heun(grid)`."
            )
        self.model, self.guidance = model, hooks.guidance
        hint = "Use it with a table, such as `gk.diffusion.heun(grid)`."
        carry = jax.tree.leaves(jax.eval_shape(self.guidance.init, jnp.zeros(1)))
        why = "stateless here: predictions are asked for in any order (an adaptive solver's rejected steps too), which "
        why += "would corrupt what it remembers"
        check(forget or not carry, "guidance", why, f"{type(self.guidance).__name__}, which carries state", hint)
        found = _that_need_a_grid(self.guidance)
        why = "a function of the noise level alone here: outside a grid there are no step numbers and no next level"
        check(not found, "guidance", why, ", ".join(found), hint)

    @property
    def no_likelihood(self) -> str:
        """Why there is none."""
        return "a guided field is the score of no noisy data law. Pass the plain denoiser."

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the model knows it."""
        return getattr(self.model, "shape", None)

    @property
    def num_labels(self) -> int | None:
        """Number of classes, where the model knows it."""
        return getattr(self.model, "num_labels", None)

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """Least and largest noise level that the model knows, where it has limits."""
        return getattr(self.model, "noise_range", None)

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
    ) -> Inexact[Array, " *shape"]:
        """The guided prediction; see `Denoiser`."""
        kinds = {slot.cond for slot in self.guidance.slots() if isinstance(slot.cond, str)}
        check(cond is not None or not {"given", "null"} <= kinds, "cond", "a condition to guide towards", "None")
        x = jnp.asarray(x)
        level = jnp.asarray(sigma, x.dtype)
        none, keys = jnp.zeros((), jnp.int32), jax.random.key(0)[None]
        batch = None if cond is None else jnp.asarray(cond)[None]
        ctx = Context(x[None], level, level, level, none, none + 1, jnp.asarray(False), batch, keys)
        runner = Runner(self.model, self.guidance, "dynamic", False)
        return runner(ctx, jax.vmap(self.guidance.init)(ctx.x))[0][0]


def _that_need_a_grid(tree: Any) -> list[str]:
    """Names of the modules inside that say `needs_grid`."""
    found: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, eqx.Module) and getattr(node, "needs_grid", False):
            found.append(type(node).__name__)
        if isinstance(node, Sum):
            found.extend(_that_need_a_grid(node.parts))
        return False

    jax.tree.leaves(tree, is_leaf=visit)
    return found
