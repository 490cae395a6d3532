"""Sum-product elimination of discrete variables, lane by lane.

A factor is a table of log-densities. Its dimensions are variables (named by strings) and lanes (numbered): entries in
different lanes of a plate never meet in one sum, so a plate of `n` members costs `n` small sums, not one of `K ** n`
terms. Variables in the deepest plates go first; then the factors of the remaining ones are summed over the lanes.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn import logsumexp
from jaxtyping import Array, ArrayLike, Int, Key


Dim = str | int


class WidthError(ValueError):
    """The sum over some variables is too large.

    Args:
        variables: the variables that meet in one table.
        size: its number of entries.
    """

    def __init__(self, variables: Sequence[str], size: int):
        super().__init__(f"{', '.join(variables)}: {size} joint states")
        self.variables = tuple(variables)
        self.size = size


class Factor(NamedTuple):
    """A table of log-densities.

    Attributes:
        table: the log-densities, one axis for each of `dims`.
        dims: variables, then lanes.
        scale: what the log-density is multiplied by in the model's, or None.
        sites: the sites whose densities are in the table.
    """

    table: Array
    dims: tuple[Dim, ...]
    scale: ArrayLike | None
    sites: frozenset[str]

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables among the dimensions."""
        return tuple(dim for dim in self.dims if isinstance(dim, str))


class Variable(NamedTuple):
    """A discrete variable.

    Attributes:
        size: its number of states.
        lanes: the lanes that hold an independent copy of it each.
        scale: the scale of its own density, or None.
    """

    size: int
    lanes: tuple[int, ...]
    scale: ArrayLike | None = None


class Step(NamedTuple):
    """A variable that was summed out: its unnormalized log-probabilities, given those that were still there."""

    variable: str
    dims: tuple[Dim, ...]
    logits: Array


def aligned(factor: Factor, dims: Sequence[Dim]) -> Array:
    """The table with the axes of `dims`, of size one where it lacks the dimension."""
    order = [factor.dims.index(dim) for dim in dims if dim in factor.dims]
    places = tuple(slice(None) if dim in factor.dims else None for dim in dims)
    return jnp.transpose(factor.table, order)[places]


def eliminate(
    factors: Sequence[Factor],
    variables: Mapping[str, Variable],
    *,
    keep: Set[str] = frozenset(),
    max_paths: int,
    is_mode: bool = False,
) -> tuple[list[Factor], list[Step]]:
    """Sum out all variables but `keep`.

    Args:
        factors: the tables.
        variables: size and lanes of each variable.
        keep: variables that stay.
        max_paths: entries that a table may have over its variables.
        is_mode: maximize instead of summing.

    Returns:
        The factors over what is left, and the steps, from which states can be drawn in reverse order.

    Raises:
        WidthError: if a table would be larger than `max_paths`, or two variables are in plates that cross.
    """
    pending = list(factors)
    steps = []
    while True:
        present = {name for factor in pending for name in factor.variables} - keep
        if not present:
            return pending, steps
        deepest = max(len(variables[name].lanes) for name in present)
        candidates = [name for name in sorted(present) if len(variables[name].lanes) == deepest]
        # The one that makes the smallest table; ties are broken by name, so that the order is reproducible.
        name = min(candidates, key=lambda name: _size(_scope(pending, name), variables))
        scope = _scope(pending, name)
        if _size(scope, variables) > max_paths:
            raise WidthError(scope, _size(scope, variables))
        variable = variables[name]
        involved = [factor for factor in pending if name in factor.dims]
        others = [other for other in scope if other != name]
        dims = (*others, name, *variable.lanes)
        logits = jnp.zeros(())
        for factor in involved:
            reduced = over_lanes(factor, variable.lanes, variables)
            table = aligned(reduced, dims)
            logits = logits + relative(table, factor.scale, variable.scale)
        table = reduce_states(_states_last(logits, len(others), variable.lanes), -1, is_mode)
        sites = frozenset().union(*(factor.sites for factor in involved))
        pending = [factor for factor in pending if name not in factor.dims]
        pending.append(Factor(table, (*others, *variable.lanes), variable.scale, sites))
        steps.append(Step(name, dims, logits))


def _states_last(logits: Array, axis: int, lanes: Sequence[int]) -> Array:
    """The table with the states to sum over as its last axis.

    On CPU a reduction over the first axis of a table of many lanes takes five times that over the last one; without the
    barrier the compiler takes the transposition back.
    """
    logits = jnp.moveaxis(logits, axis, -1)
    if not lanes:
        return logits
    return jax.lax.optimization_barrier(logits)


def _scope(factors: Sequence[Factor], name: str) -> list[str]:
    """The variables of the table that summing out `name` makes, itself included."""
    scope = {name}
    for factor in factors:
        if name in factor.dims:
            scope |= set(factor.variables)
    return sorted(scope)


def _size(scope: Sequence[str], variables: Mapping[str, Variable]) -> int:
    return math.prod(variables[name].size for name in scope)


def over_lanes(factor: Factor, lanes: Sequence[int], variables: Mapping[str, Variable]) -> Factor:
    """Sum over the lanes in which the variable to go has no copies of its own."""
    extra = [dim for dim in factor.dims if isinstance(dim, int) and dim not in lanes]
    for name in factor.variables:
        if any(lane in extra for lane in variables[name].lanes):
            # Two plates that cross: every member of one meets every member of the other.
            raise WidthError(sorted(factor.variables), -1)
    table = jnp.sum(factor.table, tuple(factor.dims.index(dim) for dim in extra))
    return factor._replace(table=table, dims=tuple(dim for dim in factor.dims if dim not in extra))


def relative(table: Array, scale: ArrayLike | None, own: ArrayLike | None) -> Array:
    """The table under the scale left over once the sum's own scale is taken out."""
    if scale is own:
        return table
    factor = 1.0 if scale is None else scale
    if own is not None:
        factor = factor / own
    # States of probability zero stay so, whatever the scale.
    return jnp.where(jnp.isneginf(table), -jnp.inf, factor * jnp.where(jnp.isneginf(table), 0.0, table))


def draw_states(
    steps: Sequence[Step],
    assigned: Mapping[str, Int[Array, "..."]],
    variables: Mapping[str, Variable],
    *,
    key: Key[Array, ""] | None,
) -> dict[str, Int[Array, "..."]]:
    """Draw the states of variables that were summed out, the last first.

    Args:
        steps: the steps of `eliminate`.
        assigned: states of the variables that were kept, each with the axes of its lanes.
        variables: size and lanes of each variable.
        key: typed PRNG key; None takes the most probable states (of steps made with `is_mode`).

    Returns:
        The states of all variables, those assigned included.
    """
    states = dict(assigned)
    for number, step in enumerate(reversed(steps)):
        logits = step.logits
        lanes = variables[step.variable].lanes
        others = [dim for dim in step.dims if isinstance(dim, str) and dim != step.variable]
        for other in others:
            own = variables[other].lanes
            # Along the axis of `other`, which is the first one left: its state in every lane.
            places = tuple(slice(None) if lane in own else None for lane in lanes)
            order = [own.index(lane) for lane in lanes if lane in own]
            index = jnp.transpose(states[other], order)[places]
            index = index[(None,) * (logits.ndim - len(lanes))]
            logits = jnp.take_along_axis(logits, index, 0)[0]
        if key is None:
            states[step.variable] = jnp.argmax(logits, 0)
        else:
            states[step.variable] = jr.categorical(jr.fold_in(key, number), logits, 0)
    return states


def chain_product(matrices: Array, is_mode: bool) -> Array:
    """The product of log-matrices (t, s, s, ...) by halving: logarithmic depth in `t`."""
    while matrices.shape[0] > 1:
        left = matrices[0 : matrices.shape[0] - 1 : 2]
        right = matrices[1::2]
        product = reduce_states(left[:, :, :, None] + right[:, None], 2, is_mode)
        if matrices.shape[0] % 2:
            product = jnp.concatenate([product, matrices[-1:]])
        matrices = product
    return matrices[0]


def reduce_states(logits: Array, axis: int, is_mode: bool) -> Array:
    """Log of the sum over states, or the largest."""
    if is_mode:
        return jnp.max(logits, axis)
    return logsumexp(logits, axis)


def backward_messages(matrices: Array, is_mode: bool) -> Array:
    """What the steps after each one contribute, for every state of it: (t + 1, s, ...) of matrices (t, s, s, ...)."""

    def back(message: Array, matrix: Array) -> tuple[Array, Array]:
        message = reduce_states(matrix + message[None], 1, is_mode)
        return message, message

    last = jnp.zeros_like(matrices[0, 0])
    _, messages = jax.lax.scan(back, last, matrices, reverse=True)
    return jnp.concatenate([messages, last[None]])
