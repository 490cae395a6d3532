"""Another guidance that is on or off from step to step: what it needs, sees and remembers."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from genkit._core._checks import describe
from genkit.guidance._types import Combined, Needs
from genkit.sampling import Context, Guidance, Prediction


def check_guidance(guidance: PyTree) -> None:
    """Refuse anything but a guidance."""
    if not isinstance(guidance, Guidance):
        raise TypeError(f"`guidance` must be a genkit guidance; got {describe(guidance)}.")


def needs_where_on(on: Bool[Array, ""], guidance: Guidance, carry: PyTree, ctx: Context) -> Needs:
    """The needs of the guidance where it is on, the plain prediction alone where it is off."""
    plain = guidance.slots()[0].name
    needs = {name: on & need for name, need in guidance.needs(carry, ctx).items()}
    return needs | {plain: needs.get(plain, False) | ~on}


def plain_where_off(on: Bool[Array, ""], preds: Mapping[str, Prediction], plain: Prediction) -> dict[str, Prediction]:
    """The predictions where the guidance is on, the plain one in every slot where it is off.

    What was not evaluated is zero, and a guidance may divide by it: the result would be dropped, but its gradient would
    be NaN.
    """
    held = {}
    for name, pred in preds.items():
        gradient = pred.gradient
        if gradient is not None:
            gradient = jnp.where(on, gradient, 0)
        held[name] = Prediction(jnp.where(on, pred.x0, plain.x0), pred.present | ~on, gradient)
    return held


def select(on: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """The new tree where `on` is true, else the old one."""
    return jax.tree.map(lambda old, new: jnp.where(on, new, old), old, new)


def combine_where_on(
    on: Bool[Array, ""], guidance: Guidance, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree
) -> Combined:
    """The guided prediction where the guidance is on; the plain one, and the old carry, where it is off."""
    plain = preds[guidance.slots()[0].name]
    x0, new, reports = guidance.combine(plain_where_off(on, preds, plain), ctx, carry)
    return jnp.where(on, x0, plain.x0), select(on, new, carry), reports
