r"""Guidance: which evaluations a draw needs, and how they combine.

Three small ones, from the plain to the composed:

1. `Unguided` below has one slot, which it needs always and returns as it is.
2. Classifier-free guidance has two slots, `Slot("cond")` and `Slot("uncond", cond="null")`, and combines them to
   `uncond + scale * (cond - uncond)`. At scale 1 its `needs` says that the second is not needed, and the drawing loop
   does not evaluate it.
3. `cfg(3) + autoguide(weak, 2)` is a `Sum`: the slots of both, of which equal ones are evaluated once; each part
   combines its own, and the differences from the plain prediction add up. `cfg(3) >> NormCap()` is a `Transformed`.
"""

import abc
import dataclasses
from collections.abc import Callable, Hashable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from genkit._core._checks import describe
from genkit.sampling._context import Context, Prediction, Slot
from genkit.sampling._part import AbstractPart
from genkit.sampling._table import Table


Needs = Mapping[str, bool | Bool[Array, ""]]
Combined = tuple[Float[Array, " *shape"], PyTree, dict[str, Array]]


class Guidance(AbstractPart):
    """Steers a denoiser: says which evaluations it needs and combines them, for ONE example, in data space.

    The drawing loop calls `needs` for every draw of a batch, evaluates a slot where some draw needs it (and truly skips
    it where none does), then calls `combine` for every draw. The carry lives inside the compiled loop and is written
    once per step; corrector rows read it.

    Example:
        >>> import equinox as eqx
        >>> import genkit as gk
        >>> class Shrink(gk.Guidance):
        ...     def slots(self):
        ...         return (gk.sampling.Slot("main"),)
        ...     def combine(self, preds, ctx, carry):
        ...         return 0.9 * preds["main"].x0, carry, {}
        >>> Shrink().slots()[0].name
        'main'
    """

    @abc.abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """List the evaluations that the guidance may need; their number and names are fixed.

        The first is the plain prediction: what is left when the guidance is switched off.
        """

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        """Make the carry before the first step: any tree of arrays; by default there is none.

        Args:
            x: the initial noisy example.
        """
        return None

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        """Say what is needed now, before anything is evaluated; by default every slot of the first stage.

        Args:
            carry: the carry.
            ctx: where the draw stands.

        Returns:
            For each first-stage slot by name whether it is needed: a Python bool where that never changes, else a
            boolean scalar. Slots not named are not needed.
        """
        return {slot.name: True for slot in self.slots() if not slot.second_stage}

    @abc.abstractmethod
    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        """Combine the predictions into the guided one.

        Args:
            preds: one `Prediction` per slot; one that is not `present` is all zeros unless another draw of the batch
                needed it, so never use it.
            ctx: where the draw stands.
            carry: the carry.

        Returns:
            The guided `x0`, the new carry, and a dict of arrays to report: `Draws.info` holds them per draw and row.
        """

    def __add__(self, other: "Guidance") -> "Sum":
        """Sum of what both guidances add to their plain predictions; equal evaluations are made once."""
        if not isinstance(other, Guidance):
            return NotImplemented
        return add(self, other)

    def __rshift__(self, transform: "PredictionTransform") -> "Transformed":
        """Apply an operation to the guided prediction."""
        if not isinstance(transform, PredictionTransform):
            return NotImplemented
        return Transformed(self, transform)


class Unguided(Guidance):
    """The plain prediction, as a guidance: one evaluation, always needed."""

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("given"),)

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        return preds["given"].x0, carry, {}


class PredictionTransform(AbstractPart):
    """An operation on the guided prediction: the right side of `guidance >> transform`, for ONE example.

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


class Transformed(Guidance):
    """A guidance with an operation on its prediction; made by `guidance >> transform`.

    Args:
        guidance: makes the prediction.
        post: changes it.

    Example:
        >>> import genkit as gk
        >>> capped = gk.guidance.cfg(4.0) >> gk.guidance.NormCap()
        >>> type(capped).__name__, len(capped.slots())
        ('Transformed', 2)
    """

    guidance: Guidance
    post: PredictionTransform

    def __check_init__(self) -> None:
        """Refuse anything but a guidance."""
        if not isinstance(self.guidance, Guidance):
            raise TypeError(f"`guidance` must be a genkit guidance; got {describe(self.guidance)}.")

    def slots(self) -> tuple[Slot, ...]:
        return self.guidance.slots()

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        return self.guidance.init(x)

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        needs = dict(self.guidance.needs(carry, ctx))
        if self.post.needs_plain:
            needs[self.slots()[0].name] = True
        return needs

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        x0, carry, reports = self.guidance.combine(preds, ctx, carry)
        changed = self.post(x0, preds[self.slots()[0].name].x0, ctx)
        # A scale in float64 must not widen the state that the loop carries.
        return jnp.asarray(changed, x0.dtype), carry, reports


class Sum(Guidance):
    """Several guidances, whose differences from their own plain predictions add up; made by `first + second`.

    The base is the plain prediction of the first. Parts that hold the very same array (the weights of one weak network,
    say) keep it once, so that their evaluations are merged also inside a compiled function.

    Args:
        leaves: the arrays of all parts, each once.
        places: which of them stands where.
        structure: structure of the tuple of parts.
    """

    leaves: tuple[PyTree, ...]
    places: tuple[int, ...] = eqx.field(static=True, repr=False)
    structure: Hashable = eqx.field(static=True, repr=False)

    @property
    def parts(self) -> tuple[Guidance, ...]:
        """The summands."""
        return jax.tree.unflatten(self.structure, [self.leaves[i] for i in self.places])

    def slots(self) -> tuple[Slot, ...]:
        slots = []
        for i, part in enumerate(self.parts):
            own = part.slots()
            names = tuple(slot.name for slot in own)
            for slot in own:
                ask = slot.ask
                if ask is not None:
                    ask = _QuestionOfPart(ask, i, names)
                slots.append(dataclasses.replace(slot, name=_numbered(i, slot.name), ask=ask))
        return tuple(slots)

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        return tuple(part.init(x) for part in self.parts)

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        needs: dict[str, bool | Bool[Array, ""]] = {}
        for i, (part, own) in enumerate(zip(self.parts, carry, strict=True)):
            needs |= {_numbered(i, name): need for name, need in part.needs(own, ctx).items()}
            if i > 0:
                # Later parts are measured from their plain predictions.
                needs[_numbered(i, part.slots()[0].name)] = True
        return needs

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        total = None
        carries = []
        reports: dict[str, Array] = {}
        for i, (part, own) in enumerate(zip(self.parts, carry, strict=True)):
            names = [slot.name for slot in part.slots()]
            mine = {name: preds[_numbered(i, name)] for name in names}
            x0, new, report = part.combine(mine, ctx, own)
            if total is None:
                total = x0
            else:
                total = total + (x0 - mine[names[0]].x0)
            carries.append(new)
            # Two parts may report under one name: the later ones are numbered.
            reports |= {(f"{key}_{i}" if key in reports else key): value for key, value in report.items()}
        assert total is not None, "a sum has parts"
        return total, tuple(carries), reports

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        # The parts are no children of this node: it keeps their arrays, and builds them when asked.
        for part in self.parts:
            check_parts(part, table, model, cond)


def add(first: Guidance, second: Guidance) -> Sum:
    """The sum of two guidances, nested sums made flat."""
    parts = (*_summands(first), *_summands(second))
    leaves, structure = jax.tree.flatten(parts)
    unique: list[PyTree] = []
    places = []
    for leaf in leaves:
        # By identity: equal values in two arrays may come to differ, the same array cannot.
        where = next((i for i, other in enumerate(unique) if other is leaf), len(unique))
        if where == len(unique):
            unique.append(leaf)
        places.append(where)
    return Sum(tuple(unique), tuple(places), structure)


def check_parts(tree: PyTree, table: Table, model: Callable, cond: PyTree) -> None:
    """Let every part inside `tree` check what it is used with."""
    for part in parts_of(tree):
        part.check_draw(table, model, cond)


def parts_of(tree: PyTree) -> list[AbstractPart]:
    """Every part inside `tree`, itself included, outer ones first."""
    found: list[AbstractPart] = []

    def visit(node: PyTree) -> bool:
        if isinstance(node, AbstractPart):
            found.append(node)
        return False  # go on into the node

    jax.tree.leaves(tree, is_leaf=visit)
    return found


def _summands(guidance: Guidance) -> tuple[Guidance, ...]:
    if isinstance(guidance, Sum):
        return guidance.parts
    return (guidance,)


def _numbered(i: int, name: str) -> str:
    return f"{i}.{name}"


class _QuestionOfPart(eqx.Module):
    """The question of a second-stage slot, asked with what belongs to its part of a sum."""

    ask: Callable
    part: int = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> tuple[Array, PyTree]:
        numbered = {name: _numbered(self.part, name) for name in self.names}
        mine = {name: preds[number] for name, number in numbered.items() if number in preds}
        return self.ask(mine, ctx, carry[self.part])


def same_evaluation(first: Slot, second: Slot) -> bool:
    """True if two slots are equal but for the name; arrays must be the very same objects."""
    left, left_tree = jax.tree.flatten((first.cond, first.net, first.loss, first.ask))
    right, right_tree = jax.tree.flatten((second.cond, second.net, second.loss, second.ask))
    if left_tree != right_tree:
        return False
    return all(a is b or (isinstance(a, str) and a == b) for a, b in zip(left, right, strict=True))
