"""Hooks: functions of the model that run between compiled calls."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check, check_finite, describe, fail
from genkit.training._recipe import Phase


@dataclasses.dataclass(frozen=True)
class Hook:
    """One function of a phase, and when it runs.

    Args:
        label: name of the argument for messages.
        index: number of the phase.
        number: number of the hook among those of all phases; each draws from keys of its own.
        function: `(model, key) -> model`.
        cycles: run after every so many cycles, after the cycles of a range, or once at the end (`None`).
        adapt: `(opt_state, before, after) -> opt_state`, or `None`.
    """

    label: str
    index: int
    number: int
    function: Callable[[PyTree, Key[Array, ""]], PyTree]
    cycles: int | range | None
    adapt: Callable[[PyTree, PyTree, PyTree], PyTree] | None

    @property
    def spacing(self) -> int | None:
        """The shortest stretch of steps between two runs; None where it runs once, at the end."""
        if isinstance(self.cycles, range):
            return min(self.cycles.start, self.cycles.step)
        return self.cycles

    def is_due(self, step: int) -> bool:
        """Return True if the hook runs when `step` cycles are done."""
        if self.cycles is None:
            return False
        if isinstance(self.cycles, range):
            return step in self.cycles
        return step % self.cycles == 0

    def next_after(self, step: int) -> int | None:
        """The next number of cycles, greater than `step`, after which the hook runs."""
        if self.cycles is None:
            return None
        if isinstance(self.cycles, range):
            return next((cycle for cycle in self.cycles if cycle > step), None)
        return (step // self.cycles + 1) * self.cycles


def hooks_of(phases: Sequence[Phase]) -> tuple[Hook, ...]:
    """The hooks of all phases, in the order in which they run."""
    hooks = []
    for index, phase in enumerate(phases):
        for function, cycles in zip(phase.after, phase.after_every, strict=True):
            label = f"after of {phase.name or f'phase {index}'}"
            hooks.append(Hook(label, index, len(hooks), function, cycles, phase.adapt))
    return tuple(hooks)


def cuts(start: int, total: int, length: int, hooks: Sequence[Hook]) -> Iterator[tuple[int, int]]:
    """The compiled calls of a training: first step and number of steps of each.

    Args:
        start: steps already done.
        total: steps in all.
        length: the most steps in one call.
        hooks: calls end where one of them is due.

    Yields:
        Pairs of a first step and a number of steps in [1, length].
    """
    step = start
    while step < total:
        ends = [total, step + length]
        for hook in hooks:
            due = hook.next_after(step)
            if due is not None:
                ends.append(due)
        end = min(ends)
        yield step, end - step
        step = end


def run_hook(hook: Hook, model: PyTree, key: Key[Array, ""], step: int) -> PyTree:
    """The model that a hook returns, with the structure, shapes and dtypes of the one it was given.

    Args:
        hook: the hook.
        model: the model after `step` steps.
        key: the key of the training.
        step: steps done.

    Returns:
        The new model. Its arrays may be those of `model`.

    Raises:
        ValueError: if the hook returns a model of another structure.
        NonFiniteError: if it makes an array that was finite no longer so.
    """
    # Updates count up from 0, so that no update folds in such a large number.
    own_key = jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1 - hook.number), step)
    new = hook.function(model, own_key)
    if jax.tree.structure(new) != jax.tree.structure(model):
        hint = "It takes the model and returns one of the same structure."
        fail(hook.label, "a function that keeps the structure of the model", describe(new), hint)

    def place(path: jax.tree_util.KeyPath, was: PyTree, now: PyTree) -> PyTree:
        if not isinstance(was, jax.Array):
            return now
        name = f"array at {jax.tree_util.keystr(path)} after {hook.label}"
        same = jnp.shape(now) == was.shape and jnp.result_type(now) == was.dtype
        check(same, name, lambda: f"{was.dtype}{list(was.shape)}", now)
        if jnp.issubdtype(was.dtype, jnp.inexact) and bool(jnp.isfinite(was).all()):
            check_finite(name, now)
        if isinstance(now, jax.Array) and now.weak_type == was.weak_type:
            return now
        return jnp.asarray(now, None if was.weak_type else was.dtype)

    return jax.tree_util.tree_map_with_path(place, model, new)
