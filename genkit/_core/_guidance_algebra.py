"""Guidance added to guidance, and operations behind it."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._checks import describe
from ._guidance import Context, Guidance, Prediction, Slot
from ._guidance_checks import check_parts


class Sum(Guidance):
    """Several guidances, whose differences from their own plain predictions add up; made by `first + second`.

    The base is the plain prediction of the first. Parts that hold the very same array (the weights of one weak network,
    say) keep it once, so that their evaluations are merged also inside a compiled function.

    Args:
        leaves: the arrays of all parts, each once.
        places: which of them stands where.
        structure: structure of the tuple of parts.
    """

    leaves: tuple[Any, ...]
    places: tuple[int, ...] = eqx.field(static=True, repr=False)
    structure: Any = eqx.field(static=True, repr=False)

    @property
    def parts(self) -> tuple[Guidance, ...]:
        """The summands."""
        return jax.tree.unflatten(self.structure, [self.leaves[i] for i in self.places])

    def slots(self) -> tuple[Slot, ...]:
        """Those of all parts, numbered."""
        slots = []
        for i, part in enumerate(self.parts):
            for slot in part.slots():
                ask = None if slot.ask is None else _Asked(slot.ask, i, tuple(s.name for s in part.slots()))
                slots.append(dataclasses.replace(slot, name=_name(i, slot.name), ask=ask))
        return tuple(slots)

    def init(self, x: Float[Array, " *shape"]) -> Any:
        """One carry per part."""
        return tuple(part.init(x) for part in self.parts)

    def plan(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """What the parts need, and the plain predictions from which the later ones are measured."""
        needs: dict[str, bool | Bool[Array, ""]] = {}
        for i, (part, own) in enumerate(zip(self.parts, carry, strict=True)):
            needs |= {_name(i, name): need for name, need in part.plan(own, ctx).items()}
            if i > 0:
                needs[_name(i, part.slots()[0].name)] = True
        return needs

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """The first guided prediction plus what the others change."""
        total, carries, reports = None, [], {}
        for i, (part, own) in enumerate(zip(self.parts, carry, strict=True)):
            names = [slot.name for slot in part.slots()]
            mine = {name: preds[_name(i, name)] for name in names}
            x0, new, aux = part.combine(mine, ctx, own)
            total = x0 if total is None else total + (x0 - mine[names[0]].x0)
            carries.append(new)
            reports |= {key if key not in reports else f"{key}_{i}": value for key, value in aux.items()}
        assert total is not None, "a sum has parts"
        return total, tuple(carries), reports

    def check_draw(self, table: Any, model: Any, cond: Any) -> None:
        """Let the parts check what they are used with."""
        for part in self.parts:
            check_parts(part, table, model, cond)


def add(first: Guidance, second: Guidance) -> Sum:
    """The sum of two guidances, nested sums made flat."""
    parts = tuple(p for g in (first, second) for p in (g.parts if isinstance(g, Sum) else (g,)))
    leaves, structure = jax.tree.flatten(parts)
    unique: list[Any] = []
    places = []
    for leaf in leaves:
        where = next((i for i, other in enumerate(unique) if other is leaf), len(unique))
        if where == len(unique):
            unique.append(leaf)
        places.append(where)
    return Sum(tuple(unique), tuple(places), structure)


def _name(i: int, name: str) -> str:
    return f"{i}.{name}"


class _Asked(eqx.Module):
    """The question of a second-stage slot of a part."""

    ask: Callable
    part: int = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, preds: Mapping[str, Prediction], ctx: Context, carry: Any) -> tuple[Any, Any]:
        """Ask with what belongs to the part."""
        mine = {name: preds[_name(self.part, name)] for name in self.names if _name(self.part, name) in preds}
        return self.ask(mine, ctx, carry[self.part])


class AbstractPost(eqx.Module):
    """An operation on the guided prediction: the right side of `guidance >> post`, for ONE example.

    Args:
        needs_plain: whether it compares with the plain prediction, which is then evaluated.
    """

    needs_plain: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(
        self, x0: Float[Array, " *shape"], plain: Float[Array, " *shape"], ctx: Context
    ) -> Float[Array, " *shape"]:
        """Change the guided prediction.

        Args:
            x0: the guided prediction.
            plain: the plain prediction; zeros where it was not needed.
            ctx: where the draw stands.

        Returns:
            The prediction to use instead.
        """


class Posted(Guidance):
    """A guidance with an operation on its prediction; made by `guidance >> post`.

    Args:
        guidance: what makes the prediction.
        post: what changes it.
    """

    guidance: Guidance
    post: AbstractPost

    def __check_init__(self) -> None:
        """Refuse anything but a guidance."""
        if not isinstance(self.guidance, Guidance):
            raise TypeError(f"`guidance` must be a genkit guidance; got {describe(self.guidance)}.")

    def slots(self) -> tuple[Slot, ...]:
        """Those of the guidance."""
        return self.guidance.slots()

    def init(self, x: Float[Array, " *shape"]) -> Any:
        """The carry of the guidance."""
        return self.guidance.init(x)

    def plan(self, carry: Any, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """What the guidance needs, and the plain prediction where the operation compares with it."""
        needs = dict(self.guidance.plan(carry, ctx))
        return needs | {self.slots()[0].name: True} if self.post.needs_plain else needs

    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: Any
    ) -> tuple[Float[Array, " *shape"], Any, dict[str, Array]]:
        """Combine, then change."""
        x0, carry, aux = self.guidance.combine(preds, ctx, carry)
        changed = self.post(x0, preds[self.slots()[0].name].x0, ctx)
        return jnp.asarray(changed, x0.dtype), carry, aux
