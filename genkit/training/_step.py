"""The compiled part of training: one `lax.scan` over steps, each step a cycle over the phases."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Int, Key, PyTree, Scalar

from genkit._core._checks import fail
from genkit.training._ema import ema_start, ema_step
from genkit.training._recipe import Phase


FAULTS = ("loss", "gradient", "updated model")
_REDUCE = "Reduce it, for example with `jnp.mean`."


class TrainState(eqx.Module):
    """Everything that training changes.

    Args:
        step: steps done so far.
        model: the model.
        opt: one optimizer state per phase.
        ema: averages of the trained leaves, `None` elsewhere; `None` as a whole where no average is kept.
    """

    step: Int[Array, ""]
    model: PyTree
    opt: tuple[PyTree, ...]
    ema: PyTree | None


class Plan(eqx.Module):
    """Everything that training reads: passed to the compiled call, never closed over.

    Args:
        phases: the phases of one cycle.
        masks: per phase, which leaves of the model it trains.
        rest: the model's constants (everything that is no JAX array).
        data: a callable pytree, or `None` where batches are passed in.
        key: the key of the training.
        ema: decay of the moving average, or `None`.
        length: steps per compiled call.
        mesh: devices to spread the batch over, or `None`.
    """

    phases: tuple[Phase, ...]
    masks: tuple[PyTree[bool], ...]
    rest: PyTree
    data: Callable[..., PyTree] | None
    key: Key[Array, ""]
    ema: Array | None
    length: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    @property
    def updates_per_step(self) -> int:
        """Updates (and batches) in one cycle."""
        return sum(phase.repeats for phase in self.phases)

    def label(self, index: int) -> str:
        """What the log calls a phase."""
        return self.phases[index].name or f"phase{index}"


class _Carry(NamedTuple):
    """The values that one phase's updates pass on; `fault` stays 0 unless the call looks for one."""

    arrays: PyTree
    opt: PyTree
    fault: Array


class Form:
    """A tree without its arrays: a static argument of compiled calls.

    JAX hashes and compares static arguments at every call. The hash is computed once, and a form is equal to itself
    without a look at its parts: small steps would feel the difference (.5 against .7 ms).
    """

    def __init__(self, arrays: Hashable, rest: Hashable, leaves: tuple[Hashable, ...]):
        self.arrays = arrays
        self.rest = rest
        self.leaves = leaves
        self._hash = hash((arrays, rest, leaves))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Form) or self._hash != other._hash:
            return False
        return (self.arrays, self.rest, self.leaves) == (other.arrays, other.rest, other.leaves)


def as_jax(tree: PyTree) -> PyTree:
    """The tree with JAX arrays in place of NumPy arrays, such as the columns of a table; the rest stays as it is."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if eqx.is_array(leaf) else leaf, tree)


def apart(tree: PyTree) -> tuple[tuple[Array, ...], Form]:
    """The arrays of a tree, and the rest of it.

    Compiled calls take the arrays as a flat tuple: flattening modules at every call would cost more than small steps.

    Args:
        tree: any tree whose arrays are JAX arrays; see `as_jax`.

    Returns:
        The arrays and the form of the tree, which `together` joins.
    """
    arrays, rest = eqx.partition(tree, eqx.is_array)
    array_leaves, arrays_def = jax.tree.flatten(arrays)
    rest_leaves, rest_def = jax.tree.flatten(rest)
    return tuple(array_leaves), Form(arrays_def, rest_def, tuple(rest_leaves))


def together(arrays: Sequence[Array], form: Form) -> PyTree:
    """The tree of some arrays and a form; the inverse of `apart`."""
    return eqx.combine(jax.tree.unflatten(form.arrays, arrays), jax.tree.unflatten(form.rest, form.leaves))


def start_state(model: PyTree, phases: tuple[Phase, ...], masks: tuple[PyTree[bool], ...], ema: bool) -> TrainState:
    """The state before the first step; its arrays are copies, because compiled calls consume (donate) them."""
    arrays, rest = split(model)
    bare = tuple(phase.without_hooks() for phase in phases)
    given, form = apart(as_jax((arrays, bare, masks, ema)))
    state = _first_state(form, given)
    return TrainState(state.step, eqx.combine(state.model, rest), state.opt, state.ema)


@functools.partial(jax.jit, static_argnums=0)
def _first_state(form: Form, given: tuple[Array, ...]) -> TrainState:
    """The arrays of the first state: one program is quicker to compile and run than a hundred small ones."""
    arrays, phases, masks, ema = together(given, form)
    opt = tuple(phase.optimizer.init(eqx.filter(arrays, mask)) for phase, mask in zip(phases, masks, strict=True))
    trained = jax.tree.map(lambda *marks: any(marks), *masks)
    average = None
    if ema:
        average = ema_start(arrays, trained)
    # What steps change must be strongly typed, to come out of a step as it went in; other numbers stay weakly typed if
    # they are, lest they promote half precision.
    changing, constant = eqx.partition(arrays, trained)
    model = eqx.combine(jax.tree.map(_strong_copy, changing), jax.tree.map(jnp.copy, constant))
    opt, average = jax.tree.map(_strong_copy, (opt, average))
    return TrainState(jnp.zeros((), jnp.int32), model, opt, average)


def _strong_copy(x: Array) -> Array:
    return jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True)


_compiled = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)


@_compiled
def run_steps(
    plan_form: Form,
    state_form: Form,
    plan_arrays: tuple[Array, ...],
    state_arrays: tuple[Array, ...],
    batches: PyTree,
    count: Int[ArrayLike, ""] | None,
) -> tuple[tuple[Array, ...], dict[str, Array], Array]:
    """Run `plan.length` steps, or `count` of them.

    Nothing in a step looks for NaN: a look at every gradient would cost several percent. NaN and infinity stay in what
    they enter, so the call looks once, at its end; `find_fault` then finds the step.

    Args:
        plan_form: what training reads, apart from its arrays.
        state_form: where to start, apart from its arrays.
        plan_arrays: the arrays of the plan.
        state_arrays: the arrays of the state, consumed.
        batches: for host data, arrays with leading axes `(plan.length, updates per step)`; else `None`.
        count: `None`, or how many steps to run: a loop of its own kind, for the rest that no call of full length fits.

    Returns:
        The arrays of the new state; metrics of shape `(plan.length,)`, zero past `count`; whether all is finite still.
    """
    plan = together(plan_arrays, plan_form)
    state = together(state_arrays, state_form)

    def body(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        new, metrics, _ = _cycle(plan, state, batch, checked=False)
        return new, metrics

    if count is None:
        new, metrics = jax.lax.scan(body, state, batches, length=plan.length)
    else:
        _, kinds = jax.eval_shape(body, state, _entry(batches, 0))
        columns = jax.tree.map(lambda kind: jnp.zeros((plan.length,), kind.dtype), kinds)

        def step(i: Array, carry: tuple[TrainState, dict]) -> tuple[TrainState, dict]:
            old, columns = carry
            new, found = body(old, _entry(batches, i))
            return new, jax.tree.map(lambda column, x: column.at[i].set(x), columns, found)

        new, metrics = jax.lax.fori_loop(0, count, step, (state, columns))
    losses = [values for name, values in metrics.items() if name.rpartition("/")[2] == "loss"]
    return tuple(jax.tree.leaves(new)), metrics, _still_finite(state, new) & _finite(losses)


@_compiled
def find_fault(
    plan_form: Form,
    state_form: Form,
    plan_arrays: tuple[Array, ...],
    state_arrays: tuple[Array, ...],
    batches: PyTree,
    count: Int[ArrayLike, ""],
) -> tuple[tuple[Array, ...], Array, Array]:
    """Run up to `count` steps again, looking at each, and stop where something is not finite.

    Args:
        plan_form: what training reads, apart from its arrays.
        state_form: where to start, apart from its arrays.
        plan_arrays: the arrays of the plan.
        state_arrays: the arrays of the state, consumed.
        batches: as for `run_steps`.
        count: scalar, steps to run.

    Returns:
        The arrays of the state before the first faulty step (after `count` steps if there is none), the number of that
        step, and a code for `explain`, 0 if there is none.
    """
    plan = together(plan_arrays, plan_form)
    state = together(state_arrays, state_form)

    def go_on(carry: tuple[Array, TrainState, Array]) -> Array:
        done, _, fault = carry
        return (done < count) & (fault == 0)

    def step(carry: tuple[Array, TrainState, Array]) -> tuple[Array, TrainState, Array]:
        done, old, _ = carry
        new, _, fault = _cycle(plan, old, _entry(batches, done), checked=True)
        return done + 1, jax.tree.map(lambda n, o: jnp.where(fault == 0, n, o), new, old), fault

    zero = jnp.zeros((), jnp.int32)
    # The state before the fault is kept: the faulty step's is thrown away by `where`.
    _, state, fault = jax.lax.while_loop(go_on, step, (zero, state, zero))
    return tuple(jax.tree.leaves(state)), state.step, fault


def _entry(batches: PyTree, index: int | slice | Array) -> PyTree:
    return jax.tree.map(lambda x: x[index], batches)


def _cycle(plan: Plan, state: TrainState, batches: PyTree, *, checked: bool) -> tuple[TrainState, dict, Array]:
    """One step: every phase in turn, then the moving average."""
    arrays = state.model
    opts = []
    metrics = {}
    fault = jnp.zeros((), jnp.int32)
    # Updates of a cycle are counted over all phases: each has batch and key of its own.
    done = 0
    for index, phase in enumerate(plan.phases):
        update = functools.partial(_update, plan, index, checked)
        number = state.step * plan.updates_per_step + done
        mine = _entry(batches, slice(done, done + phase.repeats))
        carry = _Carry(arrays, state.opt[index], fault)
        # A scan of one pass costs a loop and saves nothing.
        if phase.repeats == 1:
            carry, found = update(carry, (number, _entry(mine, 0)))
        else:
            numbers = number + jnp.arange(phase.repeats)
            carry, found = jax.lax.scan(update, carry, (numbers, mine))
            found = jax.tree.map(lambda x: jnp.mean(x, axis=0), found)
        arrays = carry.arrays
        fault = carry.fault
        opts.append(carry.opt)
        prefix = ""
        if len(plan.phases) > 1:
            prefix = f"{plan.label(index)}/"
        metrics |= {prefix + name: value for name, value in found.items()}
        done += phase.repeats
    ema = state.ema
    if plan.ema is not None:
        averaged = jax.tree.map(lambda m, x: None if m is None else x, ema, arrays, is_leaf=lambda m: m is None)
        ema = ema_step(ema, averaged, plan.ema, state.step)
    return TrainState(state.step + 1, arrays, tuple(opts), ema), metrics, fault


def _update(
    plan: Plan, index: int, checked: bool, carry: _Carry, xs: tuple[Array, PyTree]
) -> tuple[_Carry, dict[str, Array]]:
    """One optimizer step of one phase."""
    phase = plan.phases[index]
    number, batch = xs
    # The number of the update, not a carried chain of keys: a resumed run draws what an unbroken one would have drawn.
    data_key, loss_key = jax.random.split(jax.random.fold_in(plan.key, number))
    if plan.data is not None:
        batch = plan.data(data_key)
    batch = _spread(batch, plan.mesh)
    params, held = eqx.partition(carry.arrays, plan.masks[index])

    def loss(params: PyTree, key: Key[Array, ""]) -> tuple[Scalar, dict[str, Any]]:
        model = eqx.combine(params, held, plan.rest)
        return _loss_and_aux(phase.objective(model, batch, key=key), plan.label(index))

    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, loss_key)
    optimizer = optax.with_extra_args_support(phase.optimizer)

    def value_again(params: PyTree) -> Scalar:
        # A line search compares values under the same noise: it uses the key again, on purpose.
        return loss(params, jax.random.clone(loss_key))[0]

    steps, opt = optimizer.update(grads, carry.opt, params, value=value, grad=grads, value_fn=value_again)
    arrays = eqx.combine(optax.apply_updates(params, steps), held)
    arrays = _write(arrays, aux.get("updates"), plan.label(index))
    fault = carry.fault
    if checked:
        is_finite = (_finite(value), _finite(grads), _still_finite(carry.arrays, arrays))
        for kind, good in enumerate(is_finite):
            # The first fault counts; 0 is none.
            fault = jnp.where((fault == 0) & ~good, 1 + len(FAULTS) * index + kind, fault)
    metrics = {"loss": value} | {k: v for k, v in aux.items() if k != "updates" and _is_scalar(v)}
    return _Carry(arrays, opt, fault), metrics


def _finite(tree: PyTree) -> Array:
    """True if all floating entries are finite."""
    finite = jnp.array(True)
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            finite &= jnp.isfinite(x).all()
    return finite


def _still_finite(old: PyTree, new: PyTree) -> Array:
    """True if every entry that was finite before still is; entries already infinite (masks, bounds) are ignored."""
    kept = jnp.array(True)
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(before.dtype, jnp.inexact):
            kept &= (jnp.isfinite(after) | ~jnp.isfinite(before)).all()
    return kept


def _is_scalar(value: PyTree) -> bool:
    return jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.number)


def _loss_and_aux(result: object, label: str) -> tuple[Scalar, dict[str, Any]]:
    """The two results of an objective, or an error that says what it should have returned."""
    if not (isinstance(result, tuple) and len(result) == 2):
        fail(f"objective of {label}", "a function returning `(scalar, dict)`", type(result).__name__)
    value, aux = result
    if not isinstance(value, jax.Array):
        fail(f"loss of {label}", "a floating scalar", type(value).__name__, _REDUCE)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        fail(f"loss of {label}", "a floating scalar", f"{value.dtype}{list(value.shape)}", _REDUCE)
    if not isinstance(aux, dict):
        fail(f"by-products of {label}", "a dict", type(aux).__name__, "Return `(value, {})`.")
    return value, aux


def _write(arrays: PyTree, updates: PyTree | None, label: str) -> PyTree:
    """The model with `updates` written where they are not `None`."""
    if updates is None:
        return arrays
    try:
        jax.tree.map(lambda update, array: None, updates, arrays, is_leaf=_is_none)
    except (ValueError, TypeError) as error:
        hint = "`gk.training.model_updates` builds it."
        fail(f"updates of {label}", "a tree like the model, with None elsewhere", str(error), hint)

    def pick(path: jax.tree_util.KeyPath, update: PyTree, array: PyTree) -> PyTree:
        if update is None:
            return array
        if _kind(update) != _kind(array):
            name = f"updates of {label} at {jax.tree_util.keystr(path)}"
            fail(name, _kind(array), _kind(update))
        return jnp.asarray(update)

    return jax.tree_util.tree_map_with_path(pick, updates, arrays, is_leaf=_is_none)


def _is_none(node: PyTree) -> bool:
    return node is None


def _kind(x: PyTree) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Part a tree into its JAX arrays, which a compiled call may consume, and the rest."""
    return eqx.partition(tree, lambda x: isinstance(x, jax.Array))


def _spread(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """Spread the leading axis of every array of the batch over all devices of the mesh."""
    if mesh is None:
        return batch

    def one(path: jax.tree_util.KeyPath, x: Array) -> Array:
        if jnp.ndim(x) == 0:
            return x
        if x.shape[0] % mesh.size:
            what = f"of a leading axis divisible by the {mesh.size} devices of `mesh`"
            fail(f"batch{jax.tree_util.keystr(path)}", what, f"shape {x.shape}")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))

    return jax.tree_util.tree_map_with_path(one, batch)


def explain(plan: Plan, fault: int, step: int) -> str:
    """The message for a fault code."""
    index, kind = divmod(fault - 1, len(FAULTS))
    where = ""
    if len(plan.phases) > 1 or plan.phases[index].name:
        where = f" of {plan.label(index)}"
    return f"the {FAULTS[kind]}{where} is not finite at step {step}"
