"""The verb `fit`: a Python loop over compiled calls, with a log, checkpoints and a way to stop."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check, check_count, check_key
from genkit.storage import Stored
from genkit.training._calls import Calls
from genkit.training._feed import auto_mesh, call_length
from genkit.training._fitted import Fitted
from genkit.training._hooks import cuts, hooks_of
from genkit.training._host import AbstractData
from genkit.training._journal import Folder, Journal, Reached
from genkit.training._log import History
from genkit.training._loop import Session, loop
from genkit.training._recipe import Recipe, trained_mask
from genkit.training._run_folder import describe_run, stored_final, stored_log, stored_state
from genkit.training._step import Plan, TrainState, split, start_state


def fit(
    recipe: Recipe,
    *,
    key: Key[Array, ""],
    num_steps: int | None = None,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    mesh: Mesh | None = None,
    on_step: Callable[[int, dict[str, float]], object] | None = None,
    progress: bool | None = None,
) -> Fitted:
    r"""Train a model.

    Step $s$ of phase $p$ follows the gradient of the phase's objective on a batch; both are drawn from
    `fold_in(key, number of the update)`, so that a training that was cut anywhere and resumed ends in the very bits of
    an unbroken one. Steps run in compiled calls of `recipe.log_every`.

    Args:
        recipe: the model to train, its data, and how.
        key: typed PRNG key of the whole training.
        num_steps: steps in all, those of a resumed run included; default `recipe.num_steps`.
        run: a folder to keep checkpoints, log and definition in; it must be new unless `resume` is set.
        resume: continue the run in `run` from its last checkpoint; where there is none, begin.
        mesh: devices to share the work: the batch is spread over all of them, the model is on each.
        on_step: `on_step(step, metrics)` is called for every step, after the compiled call it was part of. Where it
            raises `StopIteration`, training ends with that call: the result, and the run folder, are as if interrupted
            there, without an error.
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
    folder = None
    if run is not None:
        folder = Folder(Path(run), describe_run(recipe, key, total), recipe)
    with contextlib.ExitStack() as held:
        reached = Reached(state, History())
        if folder is not None:
            held.enter_context(folder.locked())
            reached = folder.open(state, resume=resume)
        hooks = hooks_of(recipe.phases)
        remaining = total - int(reached.state.step)
        is_final = reached.final is not None or all(hook.cycles is not None for hook in hooks)
        if remaining <= 0 and is_final and not reached.pending:
            return Fitted.of(reached.state, reached.history, reached.final)
        # Calls that end at every hook, and are of one length between them, need one program.
        stretch = min([max(1, remaining), *(hook.spacing for hook in hooks if hook.spacing is not None)])
        length = call_length(stretch, recipe.log_every)
        plan = _plan(recipe, masks, split(state.model)[1], train_key, length, mesh)

        def cut(step: int) -> Iterator[tuple[int, int]]:
            return cuts(step, total, length, hooks)

        calls = Calls(plan, reached.state, recipe.data, total, cut)
        journal = Journal(reached.history, folder, on_step)
        return loop(Session(calls, journal, hooks, reached), recipe.name, progress)


def _plan(
    recipe: Recipe,
    masks: tuple[PyTree[bool], ...],
    rest: PyTree,
    key: Key[Array, ""],
    length: int,
    mesh: Mesh | None,
) -> Plan:
    phases = tuple(phase.without_hooks() for phase in recipe.phases)
    data = recipe.data
    if isinstance(data, AbstractData):
        data = None
    ema = None
    if recipe.ema is not None:
        ema = jnp.asarray(recipe.ema, jnp.float32)
    return Plan(phases, masks, rest, data, key, ema, length, auto_mesh(mesh))


def restore_fitted(stored: Stored, recipe: Recipe, *, key: Key[Array, ""]) -> Fitted:
    """Build the result of a training from its checkpoint; `gk.load` does this for a run folder.

    Args:
        stored: the checkpoint, read with `gk.storage.read_arrays`.
        recipe: the recipe of the training, which gives the structure.
        key: the key of the training.

    Returns:
        The result up to the checkpoint.

    Raises:
        ValueError: if the recipe does not fit the checkpoint, naming the first leaf that differs.

    Example:
        >>> import pathlib, tempfile
        >>> import jax, jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
        >>> draw = jax.tree_util.Partial(lambda key: jax.random.normal(key, (8,)))
        >>> recipe = gk.Recipe(lambda key: jnp.ones(()), draw, gk.Phase(loss, optax.adam(1e-2)), num_steps=3)
        >>> run = pathlib.Path(tempfile.mkdtemp()) / "run"
        >>> _ = gk.fit(recipe, key=jax.random.key(0), run=run)
        >>> stored = gk.storage.read_arrays(run / "state.gk")
        >>> int(gk.training.restore_fitted(stored, recipe, key=jax.random.key(0)).state.step)
        3
    """
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
    return Fitted.of(stored_state(stored, like), History(stored_log(stored)), stored_final(stored, like))


def _start(recipe: Recipe, key: Key[Array, ""]) -> tuple[TrainState, tuple[PyTree[bool], ...]]:
    model = recipe.build(key)
    masks = tuple(trained_mask(model, phase, phase.name or f"phase {i}") for i, phase in enumerate(recipe.phases))
    return start_state(model, recipe.phases, masks, recipe.ema is not None), masks
