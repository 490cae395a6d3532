"""Evaluations of each row decided on the host, from the grid alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from genkit._core._checks import check
from genkit._core._known import is_known
from genkit.sampling._context import Context
from genkit.sampling._guidance import Guidance
from genkit.sampling._runner import stages
from genkit.sampling._table import Table


Patterns = tuple[tuple[bool, ...] | None, ...]


def static_patterns(guidance: Guidance, table: Table, shape: tuple[int, ...], cond: PyTree) -> Patterns:
    """Work out which evaluations of the first stage each row makes.

    Args:
        guidance: its numbers must be concrete.
        table: must be concrete.
        shape: shape of one example.
        cond: conditions with leading axis `n`, or `None`; only their dtype and shape matter.

    Returns:
        For each row one bool per distinct evaluation, or `None` where the row evaluates nothing.

    Raises:
        ValueError: if the needs depend on the draw or on the carry, or if something is traced.
    """
    columns = (table.sigma, table.sigma_start, table.sigma_next, table.step, table.corrector)
    known = is_known(columns, table.evaluate, guidance)
    hint = "The table or the guidance is traced."
    check(known, "skip", "'dynamic' or 'compact' inside your own `jit`", "'static'", hint)
    groups, _ = stages(guidance)
    num_steps = jnp.asarray(np.asarray(table.step)[-1] + 1)

    def pattern(place: tuple[Array, ...], draw: tuple[PyTree, ...]) -> Array:
        x, carry, one, key = draw
        sigma, sigma_start, sigma_next, step, corrector = place
        ctx = Context(
            x,
            sigma,
            sigma_start=sigma_start,
            sigma_next=sigma_next,
            step=step,
            num_steps=num_steps,
            corrector=corrector,
            cond=one,
            key=key,
        )
        needs = guidance.needs(carry, ctx)
        made = [_any([needs.get(slot.name, False) for slot in group]) for group in groups]
        if not made:
            return jnp.zeros(0, bool)
        return jnp.stack(made)

    with jax.ensure_compile_time_eval():
        dtype = jnp.result_type(float)
        x = jnp.zeros(shape, dtype)
        one = None
        if cond is not None:
            one = jnp.zeros(cond.shape[1:], cond.dtype)
        draw = (x, guidance.init(x), one, jax.random.key(0))
        places = tuple(jnp.asarray(_as_float(np.asarray(column), dtype)) for column in columns)
        made = jax.vmap(lambda place: pattern(place, draw))(places)
        _check_independent(pattern, places, draw)
    evaluated = np.asarray(table.evaluate)
    return tuple(tuple(row.tolist()) if on else None for row, on in zip(np.asarray(made), evaluated, strict=True))


def _any(needs: Sequence[bool | Array]) -> Array:
    return jnp.any(jnp.stack([jnp.asarray(need, bool) for need in needs]))


def _as_float(column: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    if column.dtype.kind == "f":
        return column.astype(dtype)
    return column


def _check_independent(pattern, places: PyTree, draw: PyTree) -> None:
    """Refuse needs that depend on the draw.

    Mapped over a batch of draws, such needs have a batch axis, and `vmap` refuses to return them without one.
    """
    batch = jax.tree.map(lambda leaf: leaf[None], draw)
    first = jax.tree.map(lambda column: column[0], places)
    try:
        jax.vmap(pattern, in_axes=(None, 0), out_axes=None)(first, batch)
    except ValueError as error:
        raise ValueError(
            "`skip` must be 'dynamic' or 'compact' for a guidance whose needs depend on the draw or on its carry; "
            "got 'static', which asks for needs that noise level and step decide."
        ) from error
