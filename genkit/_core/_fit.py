"""The verb `fit`: a Python loop over compiled calls, with a log, checkpoints and a way to stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from ._checks import check, check_count, check_key
from ._fit_feed import auto_mesh, call_length
from ._fit_loop import Fitted, Folder, Session, loop
from ._fit_step import Plan, TrainState, split, start_state
from ._host import AbstractHost
from ._log import History
from ._objective import Recipe, trained_mask
from ._run import describe_run, stored_log, stored_state
from ._store import Stored


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
    folder = None if run is None else Folder(Path(run), describe_run(recipe, key, total), recipe)
    state, history = (state, History()) if folder is None else folder.open(state, resume=resume)
    remaining = total - int(state.step)
    if remaining <= 0:
        return Fitted.of(state, history)
    plan = Plan(
        recipe.phases,
        masks,
        split(state.model)[1],
        None if isinstance(recipe.data, AbstractHost) else recipe.data,
        train_key,
        None if recipe.ema is None else jnp.asarray(recipe.ema, jnp.float32),
        call_length(remaining, recipe.log_every),
        auto_mesh(mesh),
    )
    return loop(Session(plan, state, history, recipe.data, total, folder, on_step), recipe.name, progress)


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
    return Fitted.of(stored_state(stored, like), History(stored_log(stored)))


def _start(recipe: Recipe, key: Key[Array, ""]) -> tuple[TrainState, tuple[PyTree[bool], ...]]:
    model = recipe.build(key)
    masks = tuple(trained_mask(model, phase, phase.name or f"phase {i}") for i, phase in enumerate(recipe.phases))
    return start_state(model, recipe.phases, masks, recipe.ema is not None), masks
