"""What acts between the steps of the drawing loop: transforms and populations."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._guidance import Context, StepEvent, StepTransform
from ._runner import Runner, Tally, Unguided


if TYPE_CHECKING:
    from ._draw import Columns, Draw, State


# The keys of rows are folded with 0 and 1 for noise; hooks take the numbers from here on.
_STREAM = 2


class Stepper:
    """What a transform steps with: first-order steps of the guided or of another denoiser, evaluations counted."""

    def __init__(self, runner: Runner, ctx: Context, carry: Any) -> None:
        self._runner, self._ctx, self._carry = runner, ctx, carry
        zero = jnp.zeros(len(ctx.x), jnp.int32)
        self.tally = Tally(zero, zero)

    def denoise(self, x: Array, sigma: Any, net: Any = None) -> Array:
        """Predictions for the batch `x` at the scalar noise level `sigma`, guided, or by `net`."""
        runner = self._runner if net is None else Runner(net, Unguided(), "dynamic", False)
        carry = self._carry if net is None else jax.vmap(runner.guidance.init)(x)
        ctx, level = self._ctx, jnp.asarray(sigma, x.dtype)
        # As a corrector: a transform reads the carry of the guidance and never writes it.
        read_only = jnp.asarray(True)
        ctx = Context(x, level, ctx.sigma_start, ctx.sigma_next, ctx.step, ctx.num_steps, read_only, ctx.cond, ctx.key)
        x0, _, _, tally = runner(ctx, carry)
        self.tally = self.tally + tally
        return x0

    def __call__(self, x: Array, sigma: Any, sigma_next: Any, net: Any = None) -> Array:
        """One first-order step of the probability flow from `sigma` (positive) to `sigma_next`."""
        x0 = self.denoise(x, sigma, net)
        return x0 + jnp.asarray(sigma_next / sigma, x.dtype) * (x - x0)


def before_step(draw: "Draw", state: "State", row: "Columns") -> "State":
    """Remember the state at the start of a step for populations, and let the transforms of step starts act."""
    if state.event is not None:
        x_prev, x0, aux = state.event
        state = state._replace(event=(jnp.where(row.first, state.y, x_prev), x0, aux))
    return _transform(draw, state, row, "start", row.first, row.sigma, row.d_before)


def after_step(draw: "Draw", state: "State", row: "Columns") -> "State":
    """Let the transforms of step ends act, then the populations."""
    state = _transform(draw, state, row, "end", row.last, row.sigma_after, row.d)
    if draw.hooks.population is None:
        return state
    return lax.cond(row.last, lambda s: _select(draw, s, row), lambda s: s, state)


def _transform(draw: "Draw", state: "State", row: "Columns", when: str, due: Array, sigma: Array, d: Array) -> "State":
    """Run the transforms that act at `when`, each under a scalar `cond` that skips its evaluations."""
    for k, transform in enumerate(draw.hooks.transforms):
        if transform.at == when:
            act = lambda s, t=transform, i=k: _apply(draw, s, t, draw.context(row, s.y, sigma), i, d)
            active = jnp.asarray(transform.active(draw.context(row, state.y, sigma)))
            state = lax.cond(due & active, act, lambda s: s, state)
    return state


def _apply(draw: "Draw", state: "State", transform: StepTransform, ctx: Context, k: int, d: Array) -> "State":
    """Apply one transform."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, _STREAM + 1 + k))(ctx.key)
    ctx = Context(
        ctx.x, ctx.sigma, ctx.sigma_start, ctx.sigma_next, ctx.step, ctx.num_steps, ctx.corrector, ctx.cond, keys
    )
    step = Stepper(draw.runner, ctx, state.guidance)
    y, carry = transform(state.y, state.transforms[k], ctx, step)
    # Methods that predict from a corrected `base` start their next correction there: it must move along.
    moved = jnp.where(d == 0, 0, (y - state.y) / jnp.where(d == 0, 1, d))
    carries = (*state.transforms[:k], carry, *state.transforms[k + 1 :])
    return state._replace(y=y, base=state.base + moved, transforms=carries, tally=state.tally + step.tally)


def _select(draw: "Draw", state: "State", row: "Columns") -> "State":
    """Let each population weigh its particles, and permute everything the draws carry by the ancestors it names."""
    population = draw.hooks.population
    assert population is not None, "the loop asks only where there is one"
    size = population.num_particles
    blocks = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)
    ctx = draw.context(row, state.y, row.sigma_after)
    x_prev, x0, aux = state.event

    def one(x_prev: Array, x: Array, x0: Array, aux: Any, cond: Any, keys: Array, carry: Any) -> Any:
        key = jax.random.fold_in(keys[0], _STREAM)
        own = Context(
            x, ctx.sigma, ctx.sigma_start, ctx.sigma_next, ctx.step, ctx.num_steps, ctx.corrector,
            jax.tree.map(lambda leaf: leaf[0], cond), key,
        )  # fmt: skip
        return population.update(StepEvent(x_prev, x, x0, aux), carry, own)

    x_prev, x, x0, aux, cond, keys = blocks((x_prev, state.y, x0, aux, ctx.cond, ctx.key))
    ancestors, crowds = jax.vmap(one)(x_prev, x, x0, aux, cond, keys, state.population)
    offsets = size * jnp.arange(len(ancestors))
    ancestors = (ancestors + offsets[:, None]).reshape(-1)

    def permute(s: "State") -> "State":
        take = lambda tree: jax.tree.map(lambda leaf: leaf[ancestors], tree)
        return s._replace(
            y=take(s.y),
            base=take(s.base),
            history=s.history[:, ancestors],
            guidance=take(s.guidance),
            transforms=take(s.transforms),
        )

    moved = jnp.any(ancestors != jnp.arange(len(ancestors)))
    return lax.cond(moved, permute, lambda s: s, state)._replace(population=crowds)
