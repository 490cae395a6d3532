"""Weak-to-strong reflection: a step of the strong model undone by a weak one, before each step."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from genkit._core._checks import check_choice, describe
from genkit._core._fields import as_number
from genkit.guidance._window import check_window, in_window
from genkit.sampling import Context, Stepping, StepTransform, Table, check_net_labels


class Reflect(StepTransform):
    """One strong step forward and one weak step back, at the start of steps."""

    weak: Callable
    sigma_lo: Float[Array, ""] = eqx.field(converter=as_number)
    sigma_hi: Float[Array, ""] = eqx.field(converter=as_number)
    level: str = eqx.field(static=True)
    at: str = eqx.field(default="start", init=False, static=True)

    def __check_init__(self) -> None:
        """Refuse objects that cannot be called, empty intervals and unknown levels."""
        if not callable(self.weak):
            raise TypeError(
                f"`weak` must be a denoiser, a callable (x, sigma, cond=None) -> x0; got {describe(self.weak)}."
            )
        check_choice("level", self.level, ("next", "start"))
        check_window(self.sigma_lo, self.sigma_hi)

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        check_net_labels("weak", self.weak, cond)

    def active(self, ctx: Context) -> Bool[Array, ""]:
        # Nothing leads back from a step to zero noise, and what a reflection moves in the last step is not denoised.
        is_inner = (ctx.sigma_next > 0) & (ctx.step < ctx.num_steps - 1)
        return in_window(self.sigma_lo, self.sigma_hi, ctx.sigma_start) & is_inner

    def __call__(
        self, x: Float[Array, " n *shape"], carry: PyTree, ctx: Context, step: Stepping
    ) -> tuple[Float[Array, " n *shape"], PyTree]:
        after = step(x, ctx.sigma, ctx.sigma_next)
        if self.level == "next":
            return step(after, ctx.sigma_next, ctx.sigma, net=self.weak), carry
        # The code of the authors asks the weak model at the level of the target, though the state is at the next one.
        x0 = step.denoise(after, ctx.sigma, net=self.weak)
        return x0 + jnp.asarray(ctx.sigma / ctx.sigma_next, x.dtype) * (after - x0), carry


def reflect(
    weak: Callable,
    sigma_lo: Float[ArrayLike, ""] | float = 0.0,
    sigma_hi: Float[ArrayLike, ""] | float = jnp.inf,
    *,
    level: str = "next",
) -> Reflect:
    r"""Weak-to-strong reflection: before a step, one strong step down and one weak step back up.

    The sampled denoiser, under the guidance of the draw where there is one, is the strong one. To first order the state
    moves by $\sigma (\sigma - \sigma') (s_{strong} - s_{weak})$, $s$ being scores: reflecting in every step is close to
    autoguidance of scale 2, at one more evaluation. So compare at equal evaluations.

    With `weak` the sampled denoiser itself and a guidance beside it, guided steps forward and plain ones back, it is
    Z-sampling.

    Args:
        weak: a weaker denoiser of the same data and conditions.
        sigma_lo: lower end of the noise levels at the start of a step where it acts, excluded.
        sigma_hi: upper end, included. Reflection acts best near the noise end.
        level: noise level at which the weak model is evaluated on the way back: `"next"`, that of the state; or
            `"start"`, that of the target, as in the code of the authors.

    Returns:
        A step transform; pass it as `guidance`, alone or in a tuple. Two evaluations (of the strong one as many as its
        guidance takes) beside those of the step. It does not act in the last step.

    Raises:
        TypeError: if `weak` cannot be called.
        ValueError: if the interval is empty or the level unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> weak = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.array(4.0))
        >>> hooks = (gk.guidance.cfg(2.0), gk.guidance.reflect(weak, sigma_lo=1.0))

    Source: Bai et al., "Weak-to-Strong Diffusion with Reflection", 2025, algorithm 1; the first-order statement is
    derived here.
    """
    return Reflect(weak, sigma_lo, sigma_hi, level)
