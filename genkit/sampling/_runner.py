"""The runner: evaluates what a guidance needs, skips what it does not, and counts both."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from genkit._core._checks import check, fail
from genkit.sampling._context import Context, Prediction, Slot
from genkit.sampling._denoiser import null_like
from genkit.sampling._guidance import Guidance, same_evaluation


SKIPS = ("dynamic", "static", "compact", "phases")
Need = bool | Bool[Array, " n"]


class Tally(NamedTuple):
    """Evaluations per draw: rows really run, and those the method needs for that draw alone."""

    executed: Int[Array, " n"]
    logical: Int[Array, " n"]

    def __add__(self, other: "Tally") -> "Tally":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Tally(self.executed + other.executed, self.logical + other.logical)


class Runner(eqx.Module):
    """A denoiser under a guidance, on a batch.

    Args:
        model: the denoiser that is sampled.
        guidance: combines its evaluations.
        skip: `"dynamic"` skips a slot by a scalar `cond` where no draw needs it; `"compact"` also gathers the draws
            that need it into the smallest of five batch sizes; `"static"` takes a pattern fixed at compile time;
            `"phases"` is `"dynamic"` in a loop that has one of its own for rows that need the plain prediction alone.
        fuse: evaluate slots of one net in a single concatenated call.
    """

    model: Callable
    guidance: Guidance
    skip: str = eqx.field(static=True)
    fuse: bool = eqx.field(static=True)

    def __call__(
        self, ctx: Context, carry: PyTree, pattern: tuple[bool, ...] | None = None
    ) -> tuple[Float[Array, " n *shape"], PyTree, dict[str, Array], Tally]:
        """Evaluate and combine.

        Args:
            ctx: the batch: `x`, `cond` and `key` with leading axis `n`, the rest scalar.
            carry: carry of the guidance, leading axis `n`.
            pattern: whether each distinct evaluation of the first stage is made, where that is fixed beforehand.

        Returns:
            The guided predictions, the new carry (the old one in a corrector row), the reports, the counts.
        """
        first, second = stages(self.guidance)
        needs = self._needs(first, ctx, carry)
        if pattern is not None:
            needs = list(pattern)
        preds, tally = self._evaluate(first, needs, [None] * len(first), ctx)
        if second:
            asks = [group[0].ask for group in second if group[0].ask is not None]
            asked = [each(lambda c, p, s, ask=ask: ask(p, c, s), ctx, preds, carry) for ask in asks]
            needs = [_broadcast(jnp.asarray(need, bool), len(ctx.x)) for need, _ in asked]
            more, extra = self._evaluate(second, needs, [cond for _, cond in asked], ctx)
            preds, tally = preds | more, tally + extra
        combine = self.guidance.combine
        x0, new, aux = each(lambda c, p, s: combine(p, c, s), ctx, preds, carry)
        held = jax.tree.map(lambda old, fresh: jnp.where(ctx.corrector, old, fresh), carry, new)
        return x0.astype(ctx.x.dtype), held, aux, tally

    @property
    def only_plain(self) -> tuple[bool, ...]:
        """The pattern of rows that make the plain prediction and no other of the first stage."""
        return tuple(i == 0 for i in range(len(stages(self.guidance)[0])))

    def needs_only_plain(self, ctx: Context, carry: PyTree) -> Bool[Array, ""]:
        """Whether all draws need the plain prediction now, and none another one of the first stage."""
        plain, *others = (jnp.asarray(need) for need in self._needs(stages(self.guidance)[0], ctx, carry))
        return jnp.all(plain) & ~jnp.any(jnp.asarray([jnp.any(other) for other in others], bool))

    def _needs(self, groups: list[list[Slot]], ctx: Context, carry: PyTree) -> list[Need]:
        """What the draws need of each distinct evaluation: a Python bool where that is fixed, else one bool each."""
        fixed: dict[str, bool] = {}

        def one(c: Context, state: PyTree) -> dict[str, Array]:
            needs = self.guidance.needs(state, c)
            known = {slot.name for group in groups for slot in group}
            unknown = sorted(set(needs) - known)
            if unknown:
                what = f"`needs` of {type(self.guidance).__name__}"
                raise ValueError(
                    f"{what} must return a dict over the first-stage slots {sorted(known)}; got unknown {unknown}."
                )
            fixed.update({name: bool(need) for name, need in needs.items() if isinstance(need, (bool, np.bool_))})
            return {name: jnp.asarray(need, bool) for name, need in needs.items() if name not in fixed}

        varying = each(one, ctx, carry)
        known = {**varying, **fixed}
        return [_any([known.get(slot.name, False) for slot in group]) for group in groups]

    def _evaluate(
        self, groups: list[list[Slot]], needs: Sequence[Need], conds: list[PyTree], ctx: Context
    ) -> tuple[dict[str, Prediction], Tally]:
        """Evaluate each distinct evaluation where needed; predictions by slot name, and the counts."""
        n = len(ctx.x)
        results: dict[int, tuple[Prediction, Array]] = {}
        together = [i for i, g in enumerate(groups) if self.fuse and _fusible(g[0]) and needs[i] is not False]
        if len(together) > 1 and ctx.cond is not None:
            results |= self._fused(together, [groups[i][0] for i in together], [needs[i] for i in together], ctx)
        for i, (group, need, cond) in enumerate(zip(groups, needs, conds, strict=True)):
            if i not in results:
                results[i] = self._one(group[0], need, cond, ctx)
        preds = {slot.name: results[i][0] for i, group in enumerate(groups) for slot in group}
        zero = jnp.zeros(n, jnp.int32)
        executed = sum((results[i][1] for i in results), zero)
        logical = sum((results[i][0].present.astype(jnp.int32) for i in results), zero)
        return preds, Tally(executed, logical)

    def _one(self, slot: Slot, need: Need, asked: PyTree, ctx: Context) -> tuple[Prediction, Array]:
        """One evaluation and how many rows it ran for each draw."""
        n = len(ctx.x)
        cond = _condition(slot, ctx, asked)
        net = self.model
        if slot.net is not None:
            net = slot.net

        def run(x: Array, c: PyTree, key: Array) -> tuple[Array, Array | None]:
            return _predict(net, slot, x, c, key, ctx)

        nothing = (jnp.zeros_like(ctx.x), None)
        if slot.loss is not None:
            nothing = (jnp.zeros_like(ctx.x), jnp.zeros_like(ctx.x))
        if isinstance(need, bool):
            x0, gradient = nothing
            if need:
                x0, gradient = run(ctx.x, cond, ctx.key)
            present = jnp.full(n, need)
            return Prediction(x0, present, gradient), present.astype(jnp.int32)
        if self.skip == "compact":
            (x0, gradient), executed = _compacted(run, need, (ctx.x, cond, ctx.key), nothing)
        else:
            anyone = jnp.any(need)
            x0, gradient = lax.cond(anyone, lambda: run(ctx.x, cond, ctx.key), lambda: nothing)
            executed = jnp.full(n, anyone, jnp.int32)
        # Zero the predictions a draw did not request, so that results do not depend on its batch.
        x0, gradient = jax.tree.map(lambda leaf: jnp.where(_broadcast(need, leaf.shape), leaf, 0), (x0, gradient))
        return Prediction(x0, need, gradient), executed

    def _fused(
        self, where: list[int], slots: list[Slot], needs: Sequence[Need], ctx: Context
    ) -> dict[int, tuple[Prediction, Array]]:
        """Several evaluations of the sampled net as one concatenated call."""
        n = len(ctx.x)
        conds = []
        for slot in slots:
            cond = _condition(slot, ctx, None)
            if cond is None:
                # One call takes conditions of one kind: the absent one is told as data.
                cond = null_like(ctx.cond)
            conds.append(cond)
        data = jnp.concatenate(conds)
        x = jnp.concatenate([ctx.x] * len(slots))

        def run(x: Array, cond: PyTree) -> Array:
            return _predict(self.model, slots[0], x, cond, ctx.key, ctx)[0]

        total = _any(needs)
        if total is True:
            out = run(x, data)
            executed = jnp.ones(n, jnp.int32)
        else:
            anyone = jnp.any(jnp.asarray(total))
            out = lax.cond(anyone, run, lambda x, _: jnp.zeros_like(x), x, data)
            executed = jnp.full(n, anyone, jnp.int32)
        parts = {}
        for j, (i, need) in enumerate(zip(where, needs, strict=True)):
            present = _broadcast(jnp.asarray(need), n)
            mine = jnp.where(_broadcast(present, ctx.x.shape), out[j * n : (j + 1) * n], 0)
            parts[i] = Prediction(mine, present), executed
        return parts


def merged(slots: tuple[Slot, ...]) -> list[list[Slot]]:
    """Group slots that ask for the same evaluation."""
    names = [slot.name for slot in slots]
    check(len(set(names)) == len(names), "slots", "slots with different names", str(names))
    groups: list[list[Slot]] = []
    for slot in slots:
        group = next((g for g in groups if same_evaluation(g[0], slot)), None)
        if group is None:
            groups.append([slot])
        else:
            group.append(slot)
    return groups


def stages(guidance: Guidance) -> tuple[list[list[Slot]], list[list[Slot]]]:
    """The distinct evaluations of a guidance: those planned beforehand, and those asked for once these are known."""
    groups = merged(guidance.slots())
    return [g for g in groups if not g[0].second_stage], [g for g in groups if g[0].second_stage]


def each(fn: Callable, ctx: Context, *args: PyTree) -> PyTree:
    """Map `fn(ctx, *args)` over the draws of a batch; noise levels and step stay scalar."""

    def one(x: Array, cond: PyTree, key: Array, *rest: PyTree) -> PyTree:
        return fn(ctx.at(x=x, cond=cond, key=key), *rest)

    return jax.vmap(one)(ctx.x, ctx.cond, ctx.key, *args)


def _predict(net: Callable, slot: Slot, x: Array, cond: PyTree, key: Array, ctx: Context) -> tuple[Array, Array | None]:
    """Predictions of a batch, and the gradients of the slot's loss through them."""

    def denoise(y: Array) -> Array:
        x0 = jax.vmap(lambda one, c: net(one, ctx.sigma, c))(y, cond)
        # A network of a guidance goes by the name of its slot, without the number it has in a sum.
        name = "denoiser"
        if slot.net is not None:
            name = slot.name.rpartition(".")[2]
        if x0.shape != y.shape:
            fail(name, f"a denoiser that keeps the shape {y.shape[1:]}", f"{x0.shape[1:]}")
        return x0.astype(y.dtype)

    loss = slot.loss
    if loss is None:
        return denoise(x), None

    def total(y: Array) -> tuple[Array, Array]:
        x0 = denoise(y)
        losses = jax.vmap(lambda d, one, c, k: loss(d, ctx.at(x=one, cond=c, key=k)))(x0, y, cond, key)
        return jnp.sum(losses), x0  # draws do not interact, so the gradient of the sum is that of each

    gradient, x0 = jax.grad(total, has_aux=True)(x)
    return x0, gradient


def _condition(slot: Slot, ctx: Context, asked: PyTree) -> PyTree:
    """The conditions of a batch under which a slot is evaluated."""
    if isinstance(slot.cond, str):
        return {"given": ctx.cond, "null": None, "asked": asked}[slot.cond]
    if slot.cond is None:
        return None
    cond = jnp.asarray(slot.cond)
    return jnp.broadcast_to(cond, (len(ctx.x), *cond.shape))


def _compacted(run: Callable, need: Array, inputs: PyTree, nothing: PyTree) -> tuple[PyTree, Array]:
    """Run only the draws that need it, gathered into the smallest of five batch sizes that holds them."""
    n = len(need)
    sizes = sorted({0, -(-n // 4), -(-n // 2), -(-3 * n // 4), n})
    order = jnp.argsort(~need, stable=True)

    def branch(size: int) -> Callable:
        def some(args: PyTree) -> PyTree:
            rows = order[:size]
            part = run(*jax.tree.map(lambda leaf: leaf[rows], args))
            ran = jnp.zeros(n, jnp.int32).at[rows].set(1)
            return jax.tree.map(lambda zero, leaf: zero.at[rows].set(leaf), nothing, part), ran

        if size == 0:
            return lambda args: (nothing, jnp.zeros(n, jnp.int32))
        return some

    index = jnp.searchsorted(jnp.asarray(sizes), jnp.sum(need))
    return lax.switch(index, [branch(size) for size in sizes], inputs)


def _fusible(slot: Slot) -> bool:
    return slot.net is None and slot.loss is None and slot.ask is None


def _any(needs: Sequence[Need]) -> Need:
    """Logical or, staying a Python bool where possible."""
    if any(need is True for need in needs):
        return True
    arrays = [need for need in needs if not isinstance(need, bool)]
    total: Need = False
    for need in arrays:
        # The first array takes the place of the Python bool, which would otherwise be traced.
        if total is False:
            total = need
        else:
            total = total | need
    return total


def _broadcast(mask: Array, shape: int | tuple[int, ...]) -> Array:
    """A mask over draws (or one for all) broadcast to `shape` from the left."""
    if isinstance(shape, int):
        shape = (shape,)
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)
