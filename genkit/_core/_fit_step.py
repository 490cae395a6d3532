"""The compiled part of training: one `lax.scan` over steps, each step a cycle over the phases."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, PyTree, Scalar

from ._checks import check
from ._ema import ema_start, ema_step
from ._objective import Phase


FAULTS = ("loss", "gradient", "updated model")


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
        rest: the model's constants (what is no JAX array).
        data: a callable pytree, or `None` where batches are passed in.
        key: the key of the training.
        ema: decay of the moving average, or `None`.
        length: steps per compiled call.
        mesh: devices to spread the batch over, or `None`.
    """

    phases: tuple[Phase, ...]
    masks: tuple[PyTree[bool], ...]
    rest: PyTree
    data: Any
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
    """What one phase's updates pass on; `fault` stays 0 unless the call looks for one."""

    arrays: PyTree
    opt: PyTree
    fault: Array


class Form:
    """All of a tree but its arrays: hashable, and quick to compare with itself."""

    def __init__(self, treedef: Any, rest: tuple[Any, ...], marks: list[bool]):
        self.facts = (treedef, rest, tuple(marks))
        self.hash = hash(self.facts)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Form) and self.hash == other.hash and self.facts == other.facts)

    def tree(self, arrays: tuple[Any, ...]) -> PyTree:
        """The tree with these arrays."""
        treedef, rest, marks = self.facts
        numbers = iter(arrays)
        leaves = [next(numbers) if mark else leaf for leaf, mark in zip(rest, marks, strict=True)]
        return jax.tree.unflatten(treedef, leaves)


class Leaves(NamedTuple):
    """A tree taken apart for compiled calls: flattening modules at every call would cost more than small steps do."""

    arrays: tuple[Any, ...]
    form: Form

    @classmethod
    def of(cls, tree: PyTree) -> "Leaves":
        """Take a tree apart; NumPy arrays go with the arrays."""
        leaves, treedef = jax.tree.flatten(tree)
        marks = [eqx.is_array(leaf) for leaf in leaves]
        rest = tuple(None if mark else leaf for leaf, mark in zip(leaves, marks, strict=True))
        return cls(tuple(leaf for leaf, mark in zip(leaves, marks, strict=True) if mark), Form(treedef, rest, marks))

    def tree(self) -> PyTree:
        """Put the tree together again."""
        return self.form.tree(self.arrays)


def start_state(model: PyTree, phases: tuple[Phase, ...], masks: tuple[PyTree[bool], ...], ema: bool) -> TrainState:
    """The state before the first step; its arrays are copies, because compiled calls consume (donate) them."""
    arrays, rest = split(model)
    given = Leaves.of((arrays, phases, masks, ema))
    state = _first_state(given.form, given.arrays)
    return TrainState(state.step, eqx.combine(state.model, rest), state.opt, state.ema)


@functools.partial(jax.jit, static_argnums=0)
def _first_state(form: Form, given: Any) -> TrainState:
    """The arrays of the first state: one program is quicker to compile and run than a hundred small ones."""
    arrays, phases, masks, ema = form.tree(given)
    opt = tuple(phase.optimizer.init(eqx.filter(arrays, mask)) for phase, mask in zip(phases, masks, strict=True))
    trained = jax.tree.map(lambda *marks: any(marks), *masks)
    average = ema_start(arrays, trained) if ema else None
    # What steps change must be strongly typed, to come out of a step as it went in; other numbers stay weakly typed if
    # they are, lest they promote half precision.
    strong = lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True)
    own = lambda mark, x: None if x is None else strong(x) if mark else jnp.copy(x)
    model = jax.tree.map(own, trained, arrays)
    return TrainState(jnp.zeros((), jnp.int32), model, *jax.tree.map(strong, (opt, average)))


_compiled = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)


@_compiled
def run_steps(
    plan_form: Form, state_form: Form, plan_arrays: Any, state_arrays: Any, batches: PyTree, count: Array | None
) -> tuple[Any, dict[str, Array], Array]:
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
    plan, state = plan_form.tree(plan_arrays), state_form.tree(state_arrays)
    body = lambda state, xs: _cycle(plan, state, xs, checked=False)[:2]
    if count is None:
        new, metrics = jax.lax.scan(body, state, batches, length=plan.length)
    else:
        at = lambda i: jax.tree.map(lambda x: x[i], batches)
        kinds = jax.eval_shape(body, state, at(0))[1]
        metrics = jax.tree.map(lambda kind: jnp.zeros((plan.length,), kind.dtype), kinds)

        def step(i: Array, carry: tuple[TrainState, dict]) -> tuple[TrainState, dict]:
            new, found = body(carry[0], at(i))
            return new, jax.tree.map(lambda column, x: column.at[i].set(x), carry[1], found)

        new, metrics = jax.lax.fori_loop(0, count, step, (state, metrics))
    losses = [values for name, values in metrics.items() if name.rpartition("/")[2] == "loss"]
    return tuple(jax.tree.leaves(new)), metrics, _still_finite(state, new) & _finite(losses)


@_compiled
def find_fault(
    plan_form: Form, state_form: Form, plan_arrays: Any, state_arrays: Any, batches: PyTree, count: Array
) -> tuple[Any, Array, Array]:
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
    plan, state = plan_form.tree(plan_arrays), state_form.tree(state_arrays)

    def go_on(carry: tuple[Array, TrainState, Array]) -> Array:
        done, _, fault = carry
        return (done < count) & (fault == 0)

    def step(carry: tuple[Array, TrainState, Array]) -> tuple[Array, TrainState, Array]:
        done, old, _ = carry
        new, _, fault = _cycle(plan, old, jax.tree.map(lambda x: x[done], batches), checked=True)
        return done + 1, jax.tree.map(lambda n, o: jnp.where(fault == 0, n, o), new, old), fault

    zero = jnp.zeros((), jnp.int32)
    _, state, fault = jax.lax.while_loop(go_on, step, (zero, state, zero))
    return tuple(jax.tree.leaves(state)), state.step, fault


def _cycle(plan: Plan, state: TrainState, batches: PyTree, *, checked: bool) -> tuple[TrainState, dict, Array]:
    """One step: every phase in turn, then the moving average."""
    arrays, opts, metrics = state.model, [], {}
    fault, done = jnp.zeros((), jnp.int32), 0
    for index, phase in enumerate(plan.phases):
        update = functools.partial(_update, plan, index, checked)
        number = state.step * plan.updates_per_step + done
        mine = jax.tree.map(lambda x, i=done, n=phase.repeats: x[i : i + n], batches)
        carry = _Carry(arrays, state.opt[index], fault)
        if phase.repeats == 1:
            carry, found = update(carry, (number, jax.tree.map(lambda x: x[0], mine)))
        else:
            numbers = number + jnp.arange(phase.repeats)
            carry, found = jax.lax.scan(update, carry, (numbers, mine))
            found = jax.tree.map(lambda x: jnp.mean(x, axis=0), found)
        arrays, fault = carry.arrays, carry.fault
        opts.append(carry.opt)
        prefix = f"{plan.label(index)}/" if len(plan.phases) > 1 else ""
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
    phase, (number, batch) = plan.phases[index], xs
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
    # A line search compares values under the same noise: it uses the key again, on purpose.
    again = lambda params: loss(params, jax.random.clone(loss_key))[0]
    line_search = {"value": value, "grad": grads, "value_fn": again}
    steps, opt = optimizer.update(grads, carry.opt, params, **line_search)
    arrays = eqx.combine(optax.apply_updates(params, steps), held)
    arrays = _write(arrays, aux.get("updates"), plan.label(index))
    fault = carry.fault
    if checked:
        healthy = (_finite(value), _finite(grads), _still_finite(carry.arrays, arrays))
        for kind, good in enumerate(healthy):
            fault = jnp.where((fault == 0) & ~good, 1 + len(FAULTS) * index + kind, fault)
    metrics = {"loss": value} | {k: v for k, v in aux.items() if k != "updates" and _is_scalar(v)}
    return _Carry(arrays, opt, fault), metrics


def _finite(tree: PyTree) -> Array:
    checks = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, checks, jnp.array(True))


def _still_finite(old: PyTree, new: PyTree) -> Array:
    """Whether nothing that was finite is so no more; infinities that were there before (a mask, a bound) are fine."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    kept = [(jnp.isfinite(n) | ~jnp.isfinite(o)).all() for o, n in pairs if jnp.issubdtype(o.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, kept, jnp.array(True))


def _is_scalar(value: Any) -> bool:
    return jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.number)


def _loss_and_aux(result: Any, label: str) -> tuple[Scalar, dict[str, Any]]:
    """What an objective returned, or an error that says what it should have returned."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    check(is_pair, f"objective of {label}", "a function returning `(scalar, dict)`", type(result).__name__)
    value, aux = result
    is_number = hasattr(value, "dtype") and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)
    got = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
    check(is_number, f"loss of {label}", "a floating scalar", got, "Reduce it, for example with `jnp.mean`.")
    check(isinstance(aux, dict), f"by-products of {label}", "a dict", type(aux).__name__, "Return `(value, {})`.")
    return value, aux


def _write(arrays: PyTree, updates: PyTree | None, label: str) -> PyTree:
    """The model with `updates` written where they are not `None`."""
    if updates is None:
        return arrays
    is_none = lambda x: x is None
    try:
        jax.tree.map(lambda update, array: None, updates, arrays, is_leaf=is_none)
    except (ValueError, TypeError) as error:
        hint = "`gk._core.model_updates` builds it."
        check(False, f"updates of {label}", "a tree like the model, with None elsewhere", str(error), hint)

    def pick(path: Any, update: Any, array: Any) -> Any:
        if update is None:
            return array
        kind = lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        name = f"updates of {label} at {jax.tree_util.keystr(path)}"
        check(kind(update) == kind(array), name, kind(array), kind(update))
        return jnp.asarray(update)

    return jax.tree_util.tree_map_with_path(pick, updates, arrays, is_leaf=is_none)


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Part a tree into its JAX arrays, which a compiled call may consume, and the rest."""
    return eqx.partition(tree, lambda x: isinstance(x, jax.Array))


def _spread(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """Spread the leading axis of every array of the batch over all devices of the mesh."""
    if mesh is None:
        return batch

    def one(path: Any, x: Any) -> Any:
        if jnp.ndim(x) == 0:
            return x
        name = f"batch{jax.tree_util.keystr(path)}"
        fits = x.shape[0] % mesh.size == 0
        check(fits, name, f"of a leading axis divisible by the {mesh.size} devices of `mesh`", f"shape {x.shape}")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))

    return jax.tree_util.tree_map_with_path(one, batch)


def explain(plan: Plan, fault: int, step: int) -> str:
    """The message for a fault code."""
    index, kind = divmod(fault - 1, len(FAULTS))
    where = f" of {plan.label(index)}" if len(plan.phases) > 1 or plan.phases[index].name else ""
    return f"the {FAULTS[kind]}{where} is not finite at step {step}"
