"""The verb `fit`: a Python loop over compiled calls, with a log, checkpoints and a way to stop."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree
from tqdm import tqdm

from ._checks import NonFiniteError, check, check_count, check_key
from ._ema import ema_model
from ._files import SaveError
from ._fit_step import Plan, TrainState, explain, run_chunk, split, start_state
from ._host import AbstractHost
from ._log import History, append_line, summary_line
from ._objective import Recipe, trained_mask
from ._run import LOG, describe_run, find_state, save_state, start_run, stored_log, stored_state
from ._store import Stored


_SAVE_SECONDS = 20.0


class Fitted(eqx.Module):
    """What a training gave.

    Args:
        model: the model after the last step.
        ema: the model with trained leaves replaced by their moving average; `model` itself where none was kept.
        log: metrics by name, NumPy arrays with one entry per step: `loss`, and every scalar by-product of the
            objective. With several phases each name begins with `phase name/`; over repeats a metric is the mean.
        state: all that training changes, as checkpoints hold it.
    """

    model: PyTree
    ema: PyTree
    log: dict[str, np.ndarray]
    state: TrainState


class Interrupted(KeyboardInterrupt):
    """Training was interrupted between two compiled calls; `fitted` has all work done so far."""

    def __init__(self, message: str, fitted: Fitted):
        super().__init__(message)
        self.fitted = fitted


def fit(
    recipe: Recipe,
    *,
    key: Key[Array, ""],
    num_steps: int | None = None,
    run: Any = None,
    resume: bool = False,
    mesh: Mesh | None = None,
    on_step: Callable[[int, dict[str, float]], Any] | None = None,
    progress: bool | None = None,
) -> Fitted:
    r"""Train a model.

    Step $s$ of phase $p$ follows the gradient of the phase's objective on a batch; both are drawn from
    `fold_in(key, number of the update)`, so that a training that was cut anywhere and resumed ends in the very bits of
    an unbroken one. Steps run in compiled calls of `recipe.log_every`.

    Args:
        recipe: what to train, on what, and how.
        key: typed PRNG key of the whole training.
        num_steps: steps in all, those of a resumed run included; default `recipe.num_steps`.
        run: a folder to keep checkpoints, log and definition in; it must be new unless `resume` is set.
        resume: continue the run in `run` from its last checkpoint; where there is none, begin.
        mesh: devices to share the work: the batch is spread over all of them, the model is on each.
        on_step: `on_step(step, metrics)` is called for every step, after the compiled call it was part of.
        progress: whether to show a progress bar; default: when standard error is a terminal.

    Returns:
        The trained model, its moving average, its log and its state.

    Raises:
        NonFiniteError: if a loss, a gradient or an updated model is not finite, naming the step; the attribute
            `fitted` has everything up to the last good step, and so has the run folder.
        Interrupted: a `KeyboardInterrupt` with the same attribute, on Ctrl-C; a second Ctrl-C stops at once.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
        >>> draw = jax.tree_util.Partial(lambda key: jax.random.normal(key, (8,)))
        >>> recipe = gk.Recipe(lambda key: jnp.ones(()), draw, gk.Phase(loss, optax.adam(1e-2)), num_steps=20)
        >>> gk.fit(recipe, key=jax.random.key(0)).log["loss"].shape
        (20,)
    """
    check(isinstance(recipe, Recipe), "recipe", "a gk.Recipe", type(recipe).__name__)
    check_key(key)
    total = recipe.num_steps if num_steps is None else num_steps
    check_count("num_steps", total)
    check(run is not None or not resume, "resume", "False without `run`", resume)
    build_key, train_key = jax.random.split(key)
    state, masks = _start(recipe, build_key)
    folder = None if run is None else _Folder(Path(run), describe_run(recipe, key, total), recipe)
    state, history = (state, History()) if folder is None else folder.open(state, resume=resume)
    remaining = total - int(state.step)
    if remaining <= 0:
        return _fitted(state, history)
    plan = Plan(
        recipe.phases,
        masks,
        split(state.model)[1],
        None if isinstance(recipe.data, AbstractHost) else recipe.data,
        train_key,
        None if recipe.ema is None else jnp.asarray(recipe.ema, jnp.float32),
        _chunk_length(remaining, recipe.log_every),
        _auto_mesh(mesh),
    )
    feed = _feed(recipe.data, plan, int(state.step), total)
    return _loop(_Session(plan, state, history, folder, on_step), feed, total, recipe, progress)


def fitted_from(stored: Stored, recipe: Recipe, key: Key[Array, ""]) -> Fitted:
    """What a checkpoint holds; the recipe and the key of its training give the structure."""
    build_key, _ = jax.random.split(key)
    kept = []

    def arrays_only(key: Key[Array, ""]) -> PyTree:
        arrays, rest = split(_start(recipe, key)[0])
        kept.append(rest)
        return arrays

    try:
        arrays = jax.eval_shape(arrays_only, build_key)
        like = eqx.combine(arrays, kept[-1])
    except jax.errors.JAXTypeError:  # `build` looks at numbers: build it in earnest
        like, _ = _start(recipe, build_key)
    return _fitted(stored_state(stored, like), History(stored_log(stored)))


def _start(recipe: Recipe, key: Key[Array, ""]) -> tuple[TrainState, tuple[PyTree[bool], ...]]:
    model = recipe.build(key)
    masks = tuple(trained_mask(model, phase, phase.name or f"phase {i}") for i, phase in enumerate(recipe.phases))
    return start_state(model, recipe.phases, masks, recipe.ema is not None), masks


def _chunk_length(remaining: int, log_every: int) -> int:
    """Calls of equal length: at most `log_every` steps, as few masked ones as can be.

    Never one step: XLA inlines loops of one pass and might then fuse, and round, otherwise.
    """
    calls = -(-remaining // log_every)
    return max(2, -(-remaining // calls))


class _Folder:
    """The run folder of a training; created by the first save, so that a recipe that fails leaves nothing behind."""

    def __init__(self, path: Path, facts: dict[str, Any], recipe: Recipe):
        self.path, self.facts, self.recipe = path, facts, recipe
        self.writes, self.started, self.saved = jax.process_index() == 0, False, time.monotonic()
        self.saved_step = 0

    def open(self, state: TrainState, *, resume: bool) -> tuple[TrainState, History]:
        stored = find_state(self.path, self.facts, resume=resume)
        if stored is None:
            return state, History()
        self.saved_step = stored.meta["steps"]
        return stored_state(stored, state), History(stored_log(stored))

    def due(self, step: int) -> bool:
        if self.recipe.save_every is not None:
            return step - self.saved_step >= self.recipe.save_every
        return time.monotonic() - self.saved >= _SAVE_SECONDS

    def line(self, content: dict[str, Any]) -> None:
        if self.writes:
            self._start()
            append_line(self.path / LOG, content)

    def save(self, state: TrainState, history: History) -> None:
        if self.writes:
            self._start()
            save_state(self.path, state, history.arrays(), {"key": self.facts["key"]})
        self.saved, self.saved_step = time.monotonic(), int(state.step)

    def _start(self) -> None:
        if not self.started:
            start_run(self.path, self.facts, self.recipe.source)
            self.started = True


class _Session:
    """A training under way: the state that compiled calls pass on, and where its traces go."""

    def __init__(self, plan: Plan, state: TrainState, history: History, folder: _Folder | None, on_step: Any):
        self.plan, self.history, self.folder, self.on_step = plan, history, folder, on_step
        self.step, self.begun = int(state.step), time.monotonic()
        if plan.mesh is not None:
            replicate = lambda tree: _replicate(tree, plan.mesh)
            self.plan, state = replicate(plan), replicate(state)
        arrays, self.rest = split(state)
        self.arrays = arrays

    @property
    def state(self) -> TrainState:
        return eqx.combine(self.arrays, self.rest)

    def advance(self, feed: Iterator[PyTree], batches: PyTree, end: int) -> tuple[dict[str, np.ndarray], int, PyTree]:
        """Run one compiled call; meanwhile draw the next batches. Returns metrics, fault code and those batches."""
        # `arrays` is consumed by the call, so both happen in one statement: an interrupt cannot fall between them.
        self.arrays, fault, metrics = run_chunk(self.plan, self.arrays, jnp.asarray(end, jnp.int32), batches)
        following = next(feed) if self.step + self.plan.length < end else None
        fault, metrics = jax.device_get((fault, metrics))
        done = int(self.arrays.step) - self.step
        shown = {name: values[: done + 1 if fault else done] for name, values in metrics.items()}
        kept = {name: values[:done] for name, values in shown.items()}
        self.history.add(kept)
        self.report(kept, done)
        return shown, int(fault), following

    def report(self, metrics: dict[str, np.ndarray], done: int) -> None:
        first, self.step = self.step, self.step + done
        if self.folder is not None and done:
            self.folder.line(summary_line(metrics, self.step, time.monotonic() - self.begun))
        if self.on_step is not None:
            for i in range(done):
                self.on_step(first + i, {name: float(values[i]) for name, values in metrics.items()})

    def save(self) -> None:
        if self.folder is not None:
            self.folder.save(self.state, self.history)

    def rescue(self) -> None:
        """Save what there is; nothing when a compiled call that was cut off has consumed it."""
        if not any(x.is_deleted() for x in jax.tree.leaves(self.arrays)) and int(self.arrays.step) == self.step:
            self.save()

    def fitted(self) -> Fitted:
        return _fitted(self.state, self.history)


def _loop(session: _Session, feed: Iterator[PyTree], total: int, recipe: Recipe, progress: bool | None) -> Fitted:
    """Compiled calls until `total` steps are done, a fault shows or the user interrupts."""
    quiet = None if progress is None else not progress
    bar = tqdm(total=total, initial=session.step, desc=recipe.name, unit="step", disable=quiet, leave=False)
    try:
        with bar, _interrupts() as interrupted:
            batches = next(feed)
            while session.step < total:
                before = session.step
                metrics, fault, batches = session.advance(feed, batches, total)
                if fault:
                    raise _fault_error(session, fault, metrics)
                bar.set_postfix({name: f"{values[-1]:.4g}" for name, values in metrics.items()}, refresh=False)
                bar.update(session.step - before)
                if interrupted() and session.step < total:
                    raise _interrupted(session, total)
                if session.folder is not None and session.folder.due(session.step):
                    session.save()
    except SaveError:
        raise
    except BaseException:
        session.rescue()
        raise
    session.save()
    return session.fitted()


def _fault_error(session: _Session, fault: int, metrics: dict[str, np.ndarray]) -> NonFiniteError:
    values = ", ".join(f"{name} {values[-1]:.6g}" for name, values in metrics.items())
    kept = "" if session.folder is None else f" and in `{session.folder.path}`"
    error = NonFiniteError(
        f"training stopped: {explain(session.plan, fault, session.step)} ({values}). The state before that step is "
        f"kept as `.fitted` of this error{kept}. A lower learning rate, `optax.clip_by_global_norm` or data without "
        "NaN may help."
    )
    error.fitted = session.fitted()  # pyright: ignore[reportAttributeAccessIssue]
    return error


def _interrupted(session: _Session, total: int) -> Interrupted:
    kept = "" if session.folder is None else f"; resume the run in `{session.folder.path}`"
    return Interrupted(f"interrupted after {session.step} of {total} steps{kept}", session.fitted())


def _fitted(state: TrainState, history: History) -> Fitted:
    return Fitted(state.model, ema_model(state.ema, state.model), history.arrays(), state)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, read between compiled calls; the second one is a `KeyboardInterrupt`."""
    flag = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        sys.stderr.write("\nstopping after this call; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# Batches drawn in Python


def _feed(data: Any, plan: Plan, start: int, total: int) -> Iterator[PyTree]:
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


# Several devices


def _auto_mesh(mesh: Mesh | None) -> Mesh | None:
    """The same devices with automatic axes, whatever kind the caller's have: XLA places what lies between."""
    if mesh is None:
        return None
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put every JAX array of the tree on every device of the mesh, as arrays that compiled calls may consume."""
    sharding = NamedSharding(mesh, PartitionSpec())
    put = lambda x: jax.device_put(x, sharding) if isinstance(x, jax.Array) else x
    return jax.tree.map(put, tree)


def _stack(arrays: tuple[Any, ...], plan: Plan) -> Any:
    """One array of leading axes (steps, updates per step), its batch axis spread over the devices of the mesh."""
    stack, mesh = np.stack(arrays), plan.mesh
    stack = stack.reshape(plan.length, plan.updates_per_step, *stack.shape[1:])
    if mesh is None:
        return stack
    spread = stack.ndim > 2 and stack.shape[2] % mesh.size == 0
    spec = PartitionSpec(None, None, mesh.axis_names) if spread else PartitionSpec()
    return jax.make_array_from_callback(stack.shape, NamedSharding(mesh, spec), lambda index: stack[index])
