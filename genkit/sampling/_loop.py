"""The drawing loop: one scan over the rows of a table, with its three hooks."""

import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from genkit.sampling._guidance import Guidance
from genkit.sampling._phases import two_phases
from genkit.sampling._runner import Tally
from genkit.sampling._state import Batch, Columns, State, columns_of
from genkit.sampling._static_patterns import Patterns
from genkit.sampling._steps import after_step, before_step
from genkit.sampling._table import HISTORY, Table


class Draw(eqx.Module):
    """The loop over the rows of a table, for one batch.

    Args:
        batch: the draws.
        trajectory: also return the state before each row and at the end.
        noise: where the noise comes from, `(keys, row, stream, x) -> standard normals like x`; `independent` if `None`.
    """

    batch: Batch
    trajectory: bool = eqx.field(static=True, default=False)
    noise: Callable | None = None

    def __call__(
        self, table: Table, x: Array, patterns: Patterns | None = None
    ) -> tuple[Array, Tally, dict[str, PyTree], Array | None]:
        """Run the table.

        Args:
            table: the sampler as data.
            x: states at the first noise level `(n, *shape)`.
            patterns: for each row the fixed pattern of evaluations, `None` where it makes none; `None` where patterns
                are decided at run time.

        Returns:
            The draws; the counts; the reports; the states before each row and at the end `(n, rows + 1, *shape)`, or
            `None`.
        """
        columns = columns_of(table, x.dtype)
        state = self._initial(columns, x)
        runner = self.batch.runner
        outputs = []
        if runner.skip == "phases" and len(runner.only_plain) > 1:
            state, output = two_phases(self.batch, self._advance, columns, state)
            outputs.append(output)
        else:
            for start, stop, pattern in _runs(patterns, table.num_rows):
                part = jax.tree.map(lambda leaf, i=start, j=stop: leaf[i:j], columns)
                state, output = lax.scan(lambda s, row, p=pattern: self._row(s, row, p), state, part)
                outputs.append(output)
        info, states = jax.tree.map(lambda *parts: jnp.moveaxis(jnp.concatenate(parts), 0, 1), *outputs)
        population = self.batch.hooks.population
        if population is not None:
            info |= jax.vmap(population.report)(state.population)
        trajectory = None
        if self.trajectory:
            trajectory = jnp.concatenate([x[:, None], states], axis=1)
        return state.y, state.tally, info, trajectory

    @property
    def _guidance(self) -> Guidance:
        return self.batch.runner.guidance

    def _initial(self, columns: Columns, x: Array) -> State:
        """The state before the first row."""
        hooks = self.batch.hooks
        zero = jnp.zeros(len(x), jnp.int32)
        state = State(
            y=x,
            base=x,
            history=jnp.zeros((HISTORY, *x.shape), x.dtype),
            guidance=jax.vmap(self._guidance.init)(x),
            transforms=tuple(transform.init(x) for transform in hooks.transforms),
            population=None,
            event=None,
            tally=Tally(zero, zero),
        )
        if hooks.population is None:
            return state
        carries = jax.vmap(hooks.population.init)(x.reshape(-1, hooks.population.num_particles, *x.shape[1:]))
        row = jax.tree.map(lambda leaf: leaf[0], columns)
        return state._replace(population=carries, event=(x, x, self._blank(state, row)[2]))

    def _blank(self, state: State, row: Columns) -> PyTree:
        """Result of a row without evaluation: zero predictions, the carry, missing reports, no counts."""
        ctx = self.batch.context(row, state.y, row.sigma)
        # A function made here: JAX would compare the runner itself, and with it a denoiser such as `Partial`, by value.
        runner = self.batch.runner
        x0, _, reports, tally = jax.eval_shape(lambda ctx, memory: runner(ctx, memory), ctx, state.guidance)

        def missing(shape: jax.ShapeDtypeStruct) -> Array:
            if jnp.issubdtype(shape.dtype, jnp.floating):
                return jnp.full(shape.shape, jnp.nan, shape.dtype)
            return jnp.zeros(shape.shape, shape.dtype)

        def zeros(shape: jax.ShapeDtypeStruct) -> Array:
            return jnp.zeros(shape.shape, shape.dtype)

        return zeros(x0), state.guidance, jax.tree.map(missing, reports), jax.tree.map(zeros, tally)

    def _row(self, state: State, row: Columns, pattern: tuple[bool, ...] | None) -> tuple[State, PyTree]:
        """One row of the table: evaluate, update, act at the ends of steps."""
        return self._advance(before_step(self.batch, state, row), row, pattern)

    def _advance(self, state: State, row: Columns, pattern: tuple[bool, ...] | None) -> tuple[State, PyTree]:
        """One row of the table after what acts at its start."""
        x0, carry, reports, tally = self._evaluate(state, row, pattern)
        history = lax.dynamic_update_index_in_dim(state.history, row.p * state.y + row.q * x0, row.slot, 0)
        base = row.a * state.base + _mix(row.b, history)
        base, y = self._add_noise(base, row.d * base + _mix(row.e, history), row)
        state = state._replace(y=y, base=base, history=history, guidance=carry, tally=state.tally + tally)
        if state.event is not None:
            x_prev, *seen = state.event
            latest = jax.tree.map(lambda new, old: jnp.where(row.evaluate, new, old), [x0, reports], seen)
            state = state._replace(event=(x_prev, *latest))
        state = after_step(self.batch, state, row)
        output = None
        if self.trajectory:
            output = state.y
        return state, (reports, output)

    def _evaluate(self, state: State, row: Columns, pattern: tuple[bool, ...] | None) -> PyTree:
        """Guided prediction, carry, reports and counts of a row, or the blank ones where it makes no evaluation."""
        runner = self.batch.runner

        def evaluate(s: State) -> PyTree:
            return runner(self.batch.context(row, s.y, row.sigma), s.guidance, pattern)

        if runner.skip == "static":
            if pattern is None:
                return self._blank(state, row)
            return evaluate(state)
        blank = self._blank(state, row)
        made = lax.cond(anywhere(row.evaluate), evaluate, lambda s: blank, state)
        # Vectorized over samplers, the branch is taken for all where one of them evaluates.
        return jax.tree.map(lambda new, old: jnp.where(row.evaluate, new, old), made, blank)

    def _add_noise(self, base: Array, y: Array, row: Columns) -> tuple[Array, Array]:
        """Add the noise of a row to both means.

        None is drawn where its standard deviations are zero; one branch around both spares most rows a second one.
        """
        source = self.noise
        if source is None:
            source = independent

        def drawn(scale: Array, stream: int) -> Array:
            def fresh() -> Array:
                return source(self.batch.loop_keys, row, stream, y)

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
    if in_batched[0]:
        flag = jnp.any(flag, axis=0)
    return anywhere(flag), False


def independent(keys: Array, row: Columns, stream: int, x: Array) -> Array:
    """Standard normals, independent from row to row; a row has two streams, for `base` and for the state alone."""

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, row.row), stream), x.shape[1:], x.dtype)

    return jax.vmap(draw)(keys)


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
