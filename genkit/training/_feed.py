"""The length of compiled calls, and the way of batches and states to the devices."""

from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, PyTree

from genkit._core._checks import fail
from genkit.training._host import AbstractData
from genkit.training._step import Plan


def call_length(remaining: int, log_every: int) -> int:
    """Steps per compiled call: at most `log_every`, and a divisor of `remaining` where one is near.

    A divisor saves compiling a second program for the rest.
    """
    calls = -(-remaining // log_every)
    for number in range(calls, 2 * calls):
        if remaining % number == 0:
            return remaining // number
    return min(log_every, remaining)


def feed(
    data: AbstractData | Callable[..., PyTree], plan: Plan, calls: Iterator[tuple[int, int]], total: int
) -> Iterator[PyTree]:
    """The stacked batches of each compiled call, for pairs of a first step and a number of steps; else None."""
    if not isinstance(data, AbstractData):
        yield from (None for _ in calls)
        return
    per_step = plan.updates_per_step
    batches = None
    first = None
    for step, steps in calls:
        if batches is None:
            batches = data.batches(step * per_step)
        drawn = []
        for i in range(steps * per_step):
            number = step * per_step + i
            batch = next(batches, None)
            if batch is None:
                hint = "Let the iterator go on for ever, or lower `num_steps`."
                fail("data", f"{total * per_step} batches", f"{number}, then its end", hint)
            if first is None:
                first = batch
            _check_alike(first, batch, number)
            drawn.append(batch)
        # A call may run fewer steps than it is compiled for: it never looks at the batches beyond them.
        drawn += drawn[-1:] * (plan.length * per_step - len(drawn))
        yield jax.tree.map(lambda *xs: _stack(xs, plan), *drawn)


def _check_alike(first: PyTree, batch: PyTree, number: int) -> None:
    if jax.tree.structure(first) == jax.tree.structure(batch) and _kinds(first) == _kinds(batch):
        return
    want = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in _kinds(first))
    got = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in _kinds(batch))
    fail(f"batch {number} of `data`", f"like the first one ({want})", got)


def _kinds(batch: PyTree) -> list[tuple[np.dtype, tuple[int, ...]]]:
    return [(np.asarray(x).dtype, np.shape(x)) for x in jax.tree.leaves(batch)]


def auto_mesh(mesh: Mesh | None) -> Mesh | None:
    """The same devices with automatic axes, whatever kind the caller's have: XLA places what lies between."""
    if mesh is None:
        return None
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put every JAX array of the tree on every device of the mesh; each process brings the same values."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(x: PyTree) -> PyTree:
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
    arrays, rest = eqx.partition(tree, lambda x: isinstance(x, jax.Array))
    return eqx.combine(jax.tree.map(lambda x: x.addressable_data(0), arrays), rest)


@jax.jit
def copy_arrays(tree: PyTree) -> PyTree:
    """A copy of a tree of arrays."""
    return jax.tree.map(jnp.copy, tree)


def snapshot(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """A copy that outlives the compiled calls, in the host's memory where there is one apart from the device's."""
    (device, *_) = arrays[0].addressable_data(0).devices()
    if device.platform == "cpu":
        return copy_arrays(arrays)
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to load no CPU backend
        return copy_arrays(arrays)
    return jax.device_put(local(arrays), host)


def bring_back(kept: tuple[Array, ...], like: tuple[Array, ...]) -> tuple[Array, ...]:
    """A snapshot, copied to where the arrays of `like` are."""
    sharding = like[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return copy_arrays(replicate(kept, sharding.mesh))
    return jax.device_put(kept, sharding, may_alias=False)


def _stack(arrays: tuple[ArrayLike, ...], plan: Plan) -> Array | np.ndarray:
    """One array of leading axes (steps, updates per step), its batch axis spread over the devices of the mesh."""
    stack = np.stack(arrays)
    stack = stack.reshape(plan.length, plan.updates_per_step, *stack.shape[1:])
    mesh = plan.mesh
    if mesh is None:
        return stack
    spec = PartitionSpec()
    if stack.ndim > 2 and stack.shape[2] % mesh.size == 0:
        spec = PartitionSpec(None, None, mesh.axis_names)
    # Each process hands its devices their part of the same array.
    return jax.make_array_from_callback(stack.shape, NamedSharding(mesh, spec), lambda index: stack[index])
