"""How much one compiled call does, and how batches and states reach the devices."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._checks import check
from ._fit_step import Plan
from ._host import AbstractHost


def call_length(remaining: int, log_every: int) -> int:
    """Steps per compiled call: at most `log_every`, and a divisor of `remaining` where one is near.

    A divisor saves compiling a second program for the rest.
    """
    calls = -(-remaining // log_every)
    for number in range(calls, 2 * calls):
        if remaining % number == 0:
            return remaining // number
    return min(log_every, remaining)


def feed(data: Any, plan: Plan, start: int, total: int) -> Iterator[PyTree]:
    """The stacked batches of each compiled call; None for ever where data are drawn inside it."""
    if not isinstance(data, AbstractHost):
        while True:
            yield None
    per_step = plan.updates_per_step
    batches = data.batches(start * per_step)
    first = None
    for step in range(start, total, plan.length):
        count = min(plan.length, total - step) * per_step
        drawn = []
        for i in range(count):
            batch = next(batches, None)
            hint = "Let the iterator go on for ever, or lower `num_steps`."
            number = step * per_step + i
            check(batch is not None, "data", f"{total * per_step} batches", f"{number}, then its end", hint)
            first = batch if first is None else first
            _check_alike(first, batch, number)
            drawn.append(batch)
        # The last call may be masked beyond `total`; what stands there is computed on and thrown away.
        drawn += drawn[-1:] * (plan.length * per_step - count)
        yield jax.tree.map(lambda *xs: _stack(xs, plan), *drawn)


def _check_alike(first: PyTree, batch: PyTree, number: int) -> None:
    kinds = lambda tree: [(np.asarray(x).dtype, np.shape(x)) for x in jax.tree.leaves(tree)]
    same = jax.tree.structure(first) == jax.tree.structure(batch) and kinds(first) == kinds(batch)
    got = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in kinds(batch))
    want = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in kinds(first))
    check(same, f"batch {number} of `data`", f"like the first one ({want})", got)


def auto_mesh(mesh: Mesh | None) -> Mesh | None:
    """The same devices with automatic axes, whatever kind the caller's have: XLA places what lies between."""
    if mesh is None:
        return None
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put every JAX array of the tree on every device of the mesh; each process brings the same values."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree)


def local(tree: PyTree) -> PyTree:
    """The copy that one device of this process has of every array: what comes after training needs no mesh."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def snapshot(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy that outlives the compiled calls, in the host's memory where there is one apart from the device's."""
    (device, *_) = arrays[0].addressable_data(0).devices()
    if device.platform == "cpu":
        return _copy(arrays)
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to load no CPU backend
        return _copy(arrays)
    return jax.device_put(local(arrays), host)


def bring_back(kept: tuple[Any, ...], like: tuple[Any, ...]) -> tuple[Any, ...]:
    """A snapshot, copied to where the arrays of `like` are."""
    sharding = like[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return _copy(replicate(kept, sharding.mesh))
    return jax.device_put(kept, sharding, may_alias=False)


def _stack(arrays: tuple[Any, ...], plan: Plan) -> Any:
    """One array of leading axes (steps, updates per step), its batch axis spread over the devices of the mesh."""
    stack, mesh = np.stack(arrays), plan.mesh
    stack = stack.reshape(plan.length, plan.updates_per_step, *stack.shape[1:])
    if mesh is None:
        return stack
    spread = stack.ndim > 2 and stack.shape[2] % mesh.size == 0
    spec = PartitionSpec(None, None, mesh.axis_names) if spread else PartitionSpec()
    return jax.make_array_from_callback(stack.shape, NamedSharding(mesh, spec), lambda index: stack[index])
