"""Records that pass between the drawing loop and what steers it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree

from genkit._core._checks import check_choice


class Slot(eqx.Module):
    """One evaluation of a denoiser that a guidance may need.

    Slots that differ in their name alone are evaluated once, also when they belong to different parts of a composed
    guidance.

    Args:
        name: the name under which the prediction is handed to `combine`; unique within one guidance.
        cond: `"given"` for the condition of the draw, `"null"` for none, `"asked"` for the one that `ask` returns, or a
            condition (a scalar or an array, the same for all draws).
        net: another denoiser to evaluate, `None` for the one that is sampled.
        loss: a callable `(x0, ctx) -> scalar`; the prediction then carries the gradient of `loss(D(x), ctx)` with
            respect to the noisy example, through the denoiser.
        ask: a callable `(preds, ctx, carry) -> (need, cond)` for a second stage: whether and under which condition to
            evaluate, once the other slots are known. Its slot is left out of `needs`.

    Example:
        >>> import genkit as gk
        >>> gk.sampling.Slot("uncond", cond="null").second_stage
        False
    """

    name: str = eqx.field(static=True)
    cond: str | ArrayLike | None = "given"
    net: Callable | None = None
    loss: Callable | None = None
    ask: Callable | None = None

    def __check_init__(self) -> None:
        """Refuse conditions that are words but not known ones."""
        if isinstance(self.cond, str):
            check_choice("cond", self.cond, ("given", "null", "asked"))

    @property
    def second_stage(self) -> bool:
        """Whether the evaluation depends on those of the first stage."""
        return self.ask is not None


class Prediction(NamedTuple):
    """Result of one slot: the prediction, whether it was evaluated, and its gradient if the slot has a loss."""

    x0: Float[Array, " *shape"]
    present: Bool[Array, ""]
    gradient: Float[Array, " *shape"] | None = None


class Context(eqx.Module):
    """Place of a draw in its trajectory when the denoiser is about to be evaluated, for one example.

    Args:
        x: the noisy example at which the denoiser is evaluated.
        sigma: its noise level.
        sigma_start: noise level at the start of the step.
        sigma_next: noise level at the end of the step.
        step: index of the step.
        num_steps: number of steps.
        corrector: whether this is a later evaluation within the step; the carry is read but not written then.
        cond: condition of the draw.
        key: typed PRNG key of this evaluation and draw.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> ctx = gk.sampling.Context.alone(jnp.zeros(2), jnp.asarray(1.0), key=jax.random.key(0))
        >>> float(ctx.at(sigma=jnp.asarray(0.5)).sigma)
        0.5
    """

    x: Float[Array, " *shape"]
    sigma: Float[Array, ""]
    sigma_start: Float[Array, ""] = eqx.field(kw_only=True)
    sigma_next: Float[Array, ""] = eqx.field(kw_only=True)
    step: Int[Array, ""] = eqx.field(kw_only=True)
    num_steps: Int[Array, ""] = eqx.field(kw_only=True)
    corrector: Bool[Array, ""] = eqx.field(kw_only=True)
    cond: PyTree[ArrayLike] = eqx.field(kw_only=True)
    key: Key[Array, "..."] = eqx.field(kw_only=True)

    @classmethod
    def alone(
        cls, x: Float[Array, " *shape"], sigma: Float[Array, ""], *, cond: PyTree = None, key: Key[Array, "..."]
    ) -> "Context":
        """Context of a single prediction, outside any grid of steps.

        Args:
            x: the noisy example.
            sigma: its noise level, which stands for both ends of the step too.
            cond: condition.
            key: typed PRNG key.

        Returns:
            The context of step 0 of 1.
        """
        return cls(
            x,
            sigma,
            sigma_start=sigma,
            sigma_next=sigma,
            step=jnp.zeros((), jnp.int32),
            num_steps=jnp.ones((), jnp.int32),
            corrector=jnp.asarray(False),
            cond=cond,
            key=key,
        )

    def at(self, **changes: PyTree) -> "Context":
        """Copy with other values of the named fields.

        Args:
            **changes: fields by name.

        Returns:
            A new context.
        """
        return dataclasses.replace(self, **changes)
