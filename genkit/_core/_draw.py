"""The drawing loop: one scan over the rows of a table, with its three hooks."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from ._draw_hooks import after_step, before_step
from ._draw_phases import two_phases
from ._guidance import Context, Guidance, Hooks
from ._runner import Runner, Tally
from ._runner_static import Patterns
from ._table import HISTORY, Table


# Of the key of a draw, 0 is folded in for its start and this for the loop.
LOOP = 1


class State(NamedTuple):
    """What the scan carries; the batch axis comes first, in `history` second."""

    y: Array
    base: Array
    history: Array
    guidance: PyTree
    transforms: tuple[PyTree, ...]
    population: PyTree
    event: Any  # x_prev, x0 and reports of the step so far, where there is a population to see them
    tally: Tally


class Columns(NamedTuple):
    """The columns of a table in the dtype of the state, and what follows from them; one row inside the scan."""

    sigma: Array
    sigma_start: Array
    sigma_next: Array
    step: Array
    corrector: Array
    evaluate: Array
    slot: Array
    p: Array
    q: Array
    a: Array
    b: Array
    c: Array
    d: Array
    e: Array
    c_stage: Array
    row: Array
    first: Array  # the first row of its step
    last: Array  # the last row of its step
    sigma_after: Array  # noise level of the state after the row
    d_before: Array  # weight of `base` in the state before the row
    num_steps: Array


class Draw(eqx.Module):
    """The loop with everything that does not change from row to row.

    Args:
        runner: the guided denoiser.
        hooks: guidance, transforms, population.
        seeds: data of one key per draw `(n, ...)`, the one its start was drawn from too: as data, because a table under
            `vmap` turns branches into selections, which keys do not survive.
        impl: the kind of these keys.
        cond: conditions with leading axis `n`, or `None`.
        trajectory: also return the state before each row and at the end.
        noise: where the noise comes from, `(keys, row, stream, x) -> standard normals like x`; `independent` if `None`.
    """

    runner: Runner
    hooks: Hooks
    seeds: Array
    cond: Any
    impl: Any = eqx.field(static=True)
    trajectory: bool = eqx.field(static=True, default=False)
    noise: Callable | None = None

    def __call__(
        self, table: Table, x: Array, patterns: Patterns | None = None
    ) -> tuple[Array, Tally, dict[str, Any], Array | None]:
        """Run the table.

        Args:
            table: the sampler as data.
            x: states at the first noise level `(n, *shape)`.
            patterns: with a static plan, for each row the fixed pattern of evaluations, `None` where it makes none.

        Returns:
            The draws; the counts; the reports; the states before each row and at the end `(n, rows + 1, *shape)`, or
            `None`.
        """
        columns = columns_of(table, x.dtype)
        state = self._initial(columns, x)
        outputs = []
        if self.runner.plan == "phases" and len(self.runner.only_plain) > 1:
            state, output = two_phases(self, columns, state)
            outputs.append(output)
        else:
            for start, stop, pattern in _runs(patterns, table.num_rows):
                part = jax.tree.map(lambda leaf, i=start, j=stop: leaf[i:j], columns)
                state, output = lax.scan(lambda s, row, p=pattern: self._row(s, row, p), state, part)
                outputs.append(output)
        info, states = jax.tree.map(lambda *parts: jnp.moveaxis(jnp.concatenate(parts), 0, 1), *outputs)
        if self.hooks.population is not None:
            info |= jax.vmap(self.hooks.population.report)(state.population)
        trajectory = jnp.concatenate([x[:, None], states], axis=1) if self.trajectory else None
        return state.y, state.tally, info, trajectory

    def context(self, row: Columns, x: Array, sigma: Array) -> Context:
        """Where the batch stands: states `x` at noise level `sigma` within the step of `row`."""
        place = (row.sigma_start, row.sigma_next, row.step, row.num_steps, row.corrector)
        return Context(x, sigma, *place, self.cond, self.keys(row))

    def keys(self, row: Columns) -> Array:
        """One key per draw for this row."""
        return jax.vmap(lambda key: jax.random.fold_in(key, row.row))(self._loop_keys)

    def _initial(self, columns: Columns, x: Array) -> State:
        """The state before the first row."""
        n, population = len(x), self.hooks.population
        carries = tuple(transform.init(x) for transform in self.hooks.transforms)
        zero = jnp.zeros(n, jnp.int32)
        history = jnp.zeros((HISTORY, *x.shape), x.dtype)
        carry = jax.vmap(self._guidance.init)(x)
        state = State(x, x, history, carry, carries, None, None, Tally(zero, zero))
        if population is None:
            return state
        crowds = jax.vmap(population.init)(x.reshape(-1, population.num_particles, *x.shape[1:]))
        row = jax.tree.map(lambda leaf: leaf[0], columns)
        return state._replace(population=crowds, event=(x, x, self._blank(state, row)[2]))

    @property
    def _loop_keys(self) -> Array:
        """The keys that `start` leaves for the loop, derived where they are used: most rows draw no noise."""
        keys = jax.random.wrap_key_data(self.seeds, impl=self.impl)
        return jax.vmap(lambda key: jax.random.fold_in(key, LOOP))(keys)

    @property
    def _guidance(self) -> Guidance:
        return self.runner.guidance

    def _blank(self, state: State, row: Columns) -> Any:
        """What an evaluation returns where none is made: zero predictions, the carry, missing reports, no counts."""
        ctx = self.context(row, state.y, row.sigma)
        x0, _, aux, tally = jax.eval_shape(self.runner, ctx, state.guidance)
        missing = lambda s: jnp.full(s.shape, jnp.nan if jnp.issubdtype(s.dtype, jnp.floating) else 0, s.dtype)
        zeros = lambda s: jnp.zeros(s.shape, s.dtype)
        return zeros(x0), state.guidance, jax.tree.map(missing, aux), jax.tree.map(zeros, tally)

    def _row(self, state: State, row: Columns, pattern: tuple[bool, ...] | None) -> tuple[State, Any]:
        """One row of the table: evaluate, update, act at the ends of steps."""
        return self.begun_row(before_step(self, state, row), row, pattern)

    def begun_row(self, state: State, row: Columns, pattern: tuple[bool, ...] | None) -> tuple[State, Any]:
        """One row of the table after what acts at its start."""
        evaluate = lambda s: self.runner(self.context(row, s.y, row.sigma), s.guidance, pattern)
        if self.runner.plan == "static":
            x0, carry, aux, tally = self._blank(state, row) if pattern is None else evaluate(state)
        else:
            blank = self._blank(state, row)
            made = lax.cond(anywhere(row.evaluate), evaluate, lambda s: blank, state)
            # Vectorized over samplers, the branch is taken for all where one of them evaluates.
            x0, carry, aux, tally = jax.tree.map(lambda new, old: jnp.where(row.evaluate, new, old), made, blank)
        history = lax.dynamic_update_index_in_dim(state.history, row.p * state.y + row.q * x0, row.slot, 0)
        base = row.a * state.base + _mix(row.b, history)
        base, y = self._add_noise(base, row.d * base + _mix(row.e, history), row)
        state = state._replace(y=y, base=base, history=history, guidance=carry, tally=state.tally + tally)
        if state.event is not None:
            x_prev, seen, reports = state.event
            kept = lambda new, old: jnp.where(row.evaluate, new, old)
            state = state._replace(event=(x_prev, kept(x0, seen), jax.tree.map(kept, aux, reports)))
        state = after_step(self, state, row)
        return state, (aux, state.y if self.trajectory else None)

    def _add_noise(self, base: Array, y: Array, row: Columns) -> tuple[Array, Array]:
        """Add the noise of a row to both means.

        None is drawn where its standard deviations are zero; one branch around both spares most rows a second one.
        """
        source = independent if self.noise is None else self.noise

        def drawn(scale: Array, stream: int) -> Array:
            fresh = lambda: source(self._loop_keys, row, stream, y)
            return scale * lax.cond(anywhere(scale != 0), fresh, lambda: jnp.zeros_like(y))

        def noisy() -> tuple[Array, Array]:
            first = drawn(row.c, 0)
            return base + first, y + (row.d * first + drawn(row.c_stage, 1))

        return lax.cond(anywhere((row.c != 0) | (row.c_stage != 0)), noisy, lambda: (base, y))


@custom_vmap
def anywhere(flag: Array) -> Array:
    """A flag; where samplers are vectorized over, whether any of them raises it.

    A branch on it stays a branch then. On a flag of its own for each sampler it would become a selection, for which all
    that it reads is copied for each of them, weights of networks and keys of the noise included.
    """
    return flag


@anywhere.def_vmap
def _any_of_them(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    """The rule of `anywhere` under `vmap`."""
    del axis_size
    return (anywhere(jnp.any(flag, axis=0)) if in_batched[0] else flag), False


def independent(keys: Array, row: Columns, stream: int, x: Array) -> Array:
    """Standard normals, independent from row to row; a row has two streams, for `base` and for the state alone."""

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, row.row), stream), x.shape[1:], x.dtype)

    return jax.vmap(draw)(keys)


def columns_of(table: Table, dtype: Any) -> Columns:
    """The columns that the loop scans over, cast to the dtype of the state."""
    cast = lambda name: jnp.asarray(getattr(table, name), dtype)
    floats = {name: cast(name) for name in ("sigma", "sigma_start", "sigma_next", "p", "q", "a", "b", "c", "d", "e")}
    step, sigma = jnp.asarray(table.step), floats["sigma"]
    turn, edge = step[1:] != step[:-1], jnp.ones(1, bool)
    return Columns(
        **floats,
        c_stage=cast("c_stage"),
        step=step,
        corrector=jnp.asarray(table.corrector),
        evaluate=jnp.asarray(table.evaluate),
        slot=jnp.asarray(table.slot),
        row=jnp.arange(table.num_rows),
        first=jnp.concatenate([edge, turn]),
        last=jnp.concatenate([turn, edge]),
        sigma_after=jnp.concatenate([sigma[1:], floats["sigma_next"][-1:]]),
        d_before=jnp.concatenate([jnp.ones(1, dtype), floats["d"][:-1]]),
        num_steps=jnp.full(step.shape, step[-1] + 1),
    )


def _mix(weights: Array, history: Array) -> Array:
    """Weighted sum over the history, written out because a matrix product may run at reduced precision."""
    total = weights[0] * history[0]
    for k in range(1, HISTORY):
        total = total + weights[k] * history[k]
    return total


def _runs(patterns: Patterns | None, num_rows: int) -> list[tuple[int, int, tuple[bool, ...] | None]]:
    """Consecutive rows of equal pattern, each run compiled as a scan of its own."""
    if patterns is None:
        return [(0, num_rows, None)]
    cuts = [0, *(i for i in range(1, num_rows) if patterns[i] != patterns[i - 1]), num_rows]
    return [(i, j, patterns[i]) for i, j in itertools.pairwise(cuts)]
