"""The static plan: which evaluations each row makes, decided on the host from the grid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ._checks import check, is_concrete
from ._guidance import Context, Guidance
from ._runner import stages
from ._table import Table


Patterns = tuple[tuple[bool, ...] | None, ...]


def static_patterns(guidance: Guidance, table: Table, shape: tuple[int, ...], cond: Any) -> Patterns:
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
    known = all(map(is_concrete, jax.tree.leaves((columns, table.evaluate, guidance))))
    hint = "The table or the guidance is traced."
    check(known, "plan", "'dynamic' or 'compact' inside your own `jit`", "'static'", hint)
    groups, _ = stages(guidance)

    def plan(place: tuple[Array, ...], draw: tuple[PyTree, ...]) -> Array:
        x, carry, cond, key = draw
        sigma, sigma_start, sigma_next, step, corrector = place
        num_steps = jnp.asarray(np.asarray(table.step)[-1] + 1)
        ctx = Context(x, sigma, sigma_start, sigma_next, step, num_steps, corrector, cond, key)
        needs = guidance.plan(carry, ctx)
        made = [any_of([needs.get(slot.name, False) for slot in group]) for group in groups]
        return jnp.stack(made) if made else jnp.zeros(0, bool)

    any_of = lambda needs: jnp.any(jnp.stack([jnp.asarray(need, bool) for need in needs]))
    with jax.ensure_compile_time_eval():
        dtype = jnp.result_type(float)
        x = jnp.zeros(shape, dtype)
        one = None if cond is None else jnp.zeros(cond.shape[1:], cond.dtype)
        draw = (x, guidance.init(x), one, jax.random.key(0))
        places = tuple(jnp.asarray(np.asarray(c, dtype if np.asarray(c).dtype.kind == "f" else None)) for c in columns)
        if _depends(plan, tuple(column[0] for column in places), draw):
            raise ValueError(
                "`plan` must be 'dynamic' or 'compact' for a guidance whose needs depend on the draw or on its carry; "
                "got 'static', which asks for needs that noise level and step decide."
            )
        made = np.asarray(jax.vmap(lambda place: plan(place, draw))(places))
    evaluated = np.asarray(table.evaluate)
    return tuple(tuple(row.tolist()) if on else None for row, on in zip(made, evaluated, strict=True))


def _depends(fn: Any, place: PyTree, draw: PyTree) -> bool:
    """Whether a value of `fn(place, draw)` depends on `draw`, by following its program from there."""
    jaxpr = jax.make_jaxpr(fn)(place, draw).jaxpr
    reached = set(jaxpr.invars[len(jax.tree.leaves(place)) :])
    for equation in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return any(not hasattr(v, "val") and v in reached for v in jaxpr.outvars)
