"""How the lanes of a plate flow through a computation.

Each draw inside a plate holds one entry per member along one axis. Through elementwise operations, reductions over
other axes and the like, entry `n` of the result depends on entry `n` of the draw alone; reversing, averaging, sorting
or convolving along the axis mixes the members. For every intermediate array this module finds the axis along which the
members of each draw still lie apart, or `MIXED`.

The rules are conservative: an operation they do not know mixes everything it reads.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var


MIXED = -1

# The draws an array depends on: for each the axis of its members, or `MIXED`.
Reads = Mapping[str, int]

_ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bessel_i0e",
        "bessel_i1e",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "igamma",
        "igammac",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "polygamma",
        "pow",
        "reduce_precision",
        "regularized_incomplete_beta",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
        "zeta",
    ]
)
_REDUCTIONS = frozenset(
    [
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
    ]
)
_CUMULATIVE = frozenset(
    [
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "cumlogsumexp",
    ]
)
_CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "checkpoint",
        "remat",
    ]
)


def merge(parts: Sequence[Reads]) -> dict[str, int]:
    """The reads of an array made of several: a draw whose members lie along two axes is mixed."""
    merged: dict[str, int] = {}
    for part in parts:
        for name, axis in part.items():
            if merged.setdefault(name, axis) != axis:
                merged[name] = MIXED
    return merged


def trace_reads(jaxpr: Jaxpr, inputs: Sequence[Reads]) -> list[dict[str, int]]:
    """The reads of every output of a jaxpr, given those of its inputs."""
    known: dict = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda var: {} if isinstance(var, Literal) else known.get(var, {})
    for eqn in jaxpr.eqns:
        reads = [read(var) for var in eqn.invars]
        if any(reads):
            known.update(zip(eqn.outvars, _outputs(eqn, reads), strict=True))
    return [dict(read(var)) for var in jaxpr.outvars]


def _outputs(eqn: JaxprEqn, reads: Sequence[Reads]) -> list[dict[str, int]]:
    """The reads of the outputs of one equation."""
    name = eqn.primitive.name
    if name in _CALLS:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            inner = inner.jaxpr
        if inner is not None and len(inner.invars) == len(reads):
            return trace_reads(inner, reads)
    if name in _ELEMENTWISE:
        return [merge(reads)] * len(eqn.outvars)
    if name == "scan":
        return _scan(eqn, reads)
    rule = _RULES.get(name)
    moved = []
    for position, part in enumerate(reads):
        out = {}
        for draw, axis in part.items():
            out[draw] = MIXED if rule is None or axis == MIXED else rule(eqn, position, axis)
        moved.append(out)
    return [merge(moved)] * len(eqn.outvars)


def _scan(eqn: JaxprEqn, reads: Sequence[Reads]) -> list[dict[str, int]]:
    """A loop: what a carry reads grows until nothing is added; stacked arrays have the steps in front."""
    num_consts = eqn.params["num_consts"]
    num_carry = eqn.params["num_carry"]
    body = eqn.params["jaxpr"].jaxpr
    consts = reads[:num_consts]
    carry = list(reads[num_consts : num_consts + num_carry])
    # Members along the axis of steps meet one after the other.
    sliced = [
        {draw: MIXED if axis in (MIXED, 0) else axis - 1 for draw, axis in part.items()}
        for part in reads[num_consts + num_carry :]
    ]
    while True:
        outs = trace_reads(body, [*consts, *carry, *sliced])
        grown = [merge([before, after]) for before, after in zip(carry, outs[:num_carry], strict=True)]
        if grown == [dict(part) for part in carry]:
            break
        carry = grown
    stacked = [{draw: MIXED if axis == MIXED else axis + 1 for draw, axis in part.items()} for part in outs[num_carry:]]
    return [*grown, *stacked]


def _shape(var: Var | Literal) -> tuple[int, ...]:
    # Typed loosely by JAX: abstract values of arrays have a shape, and rules ask arrays only.
    return tuple(var.aval.shape)  # pyright: ignore[reportAttributeAccessIssue]


def _without(axes: Sequence[int], axis: int) -> int:
    """The place of an axis after others are removed."""
    if axis in axes:
        return MIXED
    return axis - sum(other < axis for other in axes)


def _reduce(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    return _without(eqn.params["axes"], axis)


def _squeeze(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    return _without(eqn.params["dimensions"], axis)


def _cumulative(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    return MIXED if eqn.params["axis"] == axis else axis


def _along_dimension(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    return MIXED if eqn.params["dimension"] == axis else axis


def _reverse(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    return MIXED if axis in eqn.params["dimensions"] else axis


def _broadcast(eqn: JaxprEqn, position: int, axis: int) -> int:
    if position > 0:
        return MIXED
    target = eqn.params["broadcast_dimensions"][axis]
    same_size = _shape(eqn.outvars[0])[target] == _shape(eqn.invars[0])[axis]
    return target if same_size else MIXED


def _reshape(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    if eqn.params.get("dimensions") is not None:
        return MIXED
    before = _shape(eqn.invars[0])
    after = _shape(eqn.outvars[0])
    # The axis survives if as many entries lie in front of it as before.
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[:place]) == math.prod(before[:axis]):
            return place
    return MIXED


def _transpose(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    return eqn.params["permutation"].index(axis)


def _slice(eqn: JaxprEqn, position: int, axis: int) -> int:
    del position
    strides = eqn.params["strides"]
    whole = eqn.params["start_indices"][axis] == 0
    whole = whole and eqn.params["limit_indices"][axis] == _shape(eqn.invars[0])[axis]
    return axis if whole and (strides is None or strides[axis] == 1) else MIXED


def _pad(eqn: JaxprEqn, position: int, axis: int) -> int:
    if position > 0 or tuple(eqn.params["padding_config"][axis]) != (0, 0, 0):
        return MIXED
    return axis


def _gather(eqn: JaxprEqn, position: int, axis: int) -> int:
    """A table looked up by the draws (`means[z]`), or one row of a table per member (`take_along_axis`)."""
    numbers = eqn.params["dimension_numbers"]
    places = [place for place in range(len(_shape(eqn.outvars[0]))) if place not in numbers.offset_dims]
    if position == 0:
        if axis not in numbers.operand_batching_dims:
            return MIXED
        axis = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
    if axis == len(_shape(eqn.invars[1])) - 1:
        return MIXED
    return places[axis]


def _dot(eqn: JaxprEqn, position: int, axis: int) -> int:
    (left_contract, right_contract), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    contract = (left_contract, right_contract)[position]
    batch = (left_batch, right_batch)[position]
    if axis in contract:
        return MIXED
    if axis in batch:
        return batch.index(axis)
    free = len(batch) + _without((*contract, *batch), axis)
    if position == 1:
        free += len(_shape(eqn.invars[0])) - len(left_contract) - len(left_batch)
    return free


_RULES: dict[str, Callable[[JaxprEqn, int, int], int]] = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_CUMULATIVE, _cumulative),
    "broadcast_in_dim": _broadcast,
    "concatenate": _along_dimension,
    "dot_general": _dot,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "sort": _along_dimension,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
