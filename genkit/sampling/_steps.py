"""Transforms and populations at work: what happens between the steps of the drawing loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, PyTree

from genkit.sampling._context import Context
from genkit.sampling._guidance import Unguided
from genkit.sampling._hooks import StepEvent, StepTransform
from genkit.sampling._runner import Runner, Tally
from genkit.sampling._state import Batch, Columns, State


# The keys of rows are folded with 0 and 1 for noise; hooks take the numbers from here on.
_STREAM = 2


class Stepper:
    """First-order steps of the guided or of another denoiser, for a transform; evaluations are counted."""

    def __init__(self, runner: Runner, ctx: Context, carry: PyTree) -> None:
        self._runner = runner
        self._ctx = ctx
        self._carry = carry
        zero = jnp.zeros(len(ctx.x), jnp.int32)
        self.tally = Tally(zero, zero)

    def denoise(self, x: Array, sigma: ArrayLike, net: Callable | None = None) -> Array:
        """Predictions for the batch `x` at the scalar noise level `sigma`, guided, or by `net`."""
        runner = self._runner
        carry = self._carry
        if net is not None:
            runner = Runner(net, Unguided(), "dynamic", False)
            carry = jax.vmap(runner.guidance.init)(x)
        # As a corrector: a transform reads the carry of the guidance and never writes it.
        ctx = self._ctx.at(x=x, sigma=jnp.asarray(sigma, x.dtype), corrector=jnp.asarray(True))
        x0, _, _, tally = runner(ctx, carry)
        self.tally = self.tally + tally
        return x0

    def __call__(self, x: Array, sigma: ArrayLike, sigma_next: ArrayLike, net: Callable | None = None) -> Array:
        """One first-order step of the probability flow from `sigma` (positive) to `sigma_next`."""
        x0 = self.denoise(x, sigma, net)
        return x0 + jnp.asarray(sigma_next / sigma, x.dtype) * (x - x0)


def before_step(batch: Batch, state: State, row: Columns) -> State:
    """Remember the state at the start of a step for populations, and let the transforms of step starts act."""
    if state.event is not None:
        x_prev, x0, reports = state.event
        state = state._replace(event=(jnp.where(row.first, state.y, x_prev), x0, reports))
    return _transform(batch, state, row, "start")


def after_step(batch: Batch, state: State, row: Columns) -> State:
    """Let the transforms of step ends act, then the populations."""
    state = _transform(batch, state, row, "end")
    if batch.hooks.population is None:
        return state
    return lax.cond(row.last, lambda s: _select(batch, s, row), lambda s: s, state)


def _transform(batch: Batch, state: State, row: Columns, when: str) -> State:
    """Run the transforms that act at `when`, each under a scalar `cond` that skips its evaluations."""
    due, sigma, weight_of_base = row.last, row.sigma_after, row.d
    if when == "start":
        due, sigma, weight_of_base = row.first, row.sigma, row.d_before
    for index, transform in enumerate(batch.hooks.transforms):
        if transform.at != when:
            continue

        def act(s: State, transform: StepTransform = transform, index: int = index) -> State:
            return _apply(batch, s, transform, batch.context(row, s.y, sigma), index, weight_of_base)

        active = jnp.asarray(transform.active(batch.context(row, state.y, sigma)))
        state = lax.cond(due & active, act, lambda s: s, state)
    return state


def _apply(
    batch: Batch, state: State, transform: StepTransform, ctx: Context, index: int, weight_of_base: Array
) -> State:
    """Apply one transform."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, _STREAM + 1 + index))(ctx.key)
    step = Stepper(batch.runner, ctx.at(key=keys), state.guidance)
    y, carry = transform(state.y, state.transforms[index], ctx.at(key=keys), step)
    # Methods that predict from a corrected `base` start their next correction there: it must move along. Where the
    # state does not depend on the base, both branches of the quotient must stay finite.
    depends = weight_of_base != 0
    moved = jnp.where(depends, (y - state.y) / jnp.where(depends, weight_of_base, 1), 0)
    carries = (*state.transforms[:index], carry, *state.transforms[index + 1 :])
    return state._replace(y=y, base=state.base + moved, transforms=carries, tally=state.tally + step.tally)


def _select(batch: Batch, state: State, row: Columns) -> State:
    """Let each population weigh its particles, and permute everything the draws carry by the ancestors it names."""
    population = batch.hooks.population
    assert population is not None, "the loop asks only where there is one"
    size = population.num_particles
    ctx = batch.context(row, state.y, row.sigma_after)

    def in_blocks(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)

    def update(event: StepEvent, cond: PyTree, keys: Array, carry: PyTree) -> tuple[Array, PyTree]:
        # A population has the condition and the key of its first particle.
        key = jax.random.fold_in(keys[0], _STREAM)
        own = ctx.at(x=event.x, cond=jax.tree.map(lambda leaf: leaf[0], cond), key=key)
        return population.update(event, carry, own)

    x_prev, x0, reports = state.event
    event, cond, keys = in_blocks((StepEvent(x_prev, state.y, x0, reports), ctx.cond, ctx.key))
    ancestors, carries = jax.vmap(update)(event, cond, keys, state.population)
    offsets = size * jnp.arange(len(ancestors))
    ancestors = (ancestors + offsets[:, None]).reshape(-1)

    def permute(s: State) -> State:
        y, base, guidance, transforms = jax.tree.map(
            lambda leaf: leaf[ancestors], (s.y, s.base, s.guidance, s.transforms)
        )
        history = s.history[:, ancestors]
        return s._replace(y=y, base=base, history=history, guidance=guidance, transforms=transforms)

    # Gathering the history costs more than looking whether anybody moved.
    moved = jnp.any(ancestors != jnp.arange(len(ancestors)))
    return lax.cond(moved, permute, lambda s: s, state)._replace(population=carries)
