"""The verbs `load` and `save`."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from genkit.io._definition import Definition, DefinitionError, load_definition
from genkit.io._draws import load_archive, save_draws
from genkit.storage import (
    CorruptFileError,
    RunFiles,
    Stored,
    describe_kind,
    is_array_file,
    is_run,
    load_arrays,
    read_arrays,
    read_meta,
    restore,
    save_arrays,
)
from genkit.training import Fitted, Recipe, Source, restore_fitted


def load(path: str | os.PathLike[str], like: PyTree = None, *, trust_edited: bool = False) -> Any:
    """Load a definition file, a run folder, an array file or an archive of draws.

    Loading a definition file or a run folder runs Python code: load only what you trust. Array files and archives never
    execute anything and are verified, bit by bit, before anything is taken from them; nor does a run folder for which
    `like` is given.

    Args:
        path: a `.py` file, a run folder, or a file that `save` wrote.
        like: for an array file, a pytree of the structure that was saved (its arrays may be `jax.ShapeDtypeStruct`s);
            for a run folder, the model before training (or the recipe), whose structure the run's arrays are put into.
        trust_edited: run the definition file of a run folder although it was edited since the training began.

    Returns:
        The recipe, problem or sampler of a definition file; a `Fitted` for a run folder, or, given the model, the
        moving average of the trained model (the model itself where none was kept); for an array file `like` with the
        file's arrays; the `gk.Draws` or the dict that was saved to an `.npz` file.

    Raises:
        FileNotFoundError: if nothing is there.
        DefinitionError: if a definition file fails, does not bind what it must, or was edited in its run folder.
        CorruptFileError: if a file is damaged or foreign.
        ValueError: if arrays do not fit, naming the first leaf that differs.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.gk"
        >>> gk.save(path, {"w": jnp.arange(3)})
        >>> gk.load(path, like={"w": jnp.zeros(3, int)})["w"].tolist()
        [0, 1, 2]
    """
    path = Path(path)
    if path.is_dir():
        if not is_run(path):
            raise FileNotFoundError(f"`{path}` is not a run folder: it has neither meta.json nor state.gk.")
        if like is None or isinstance(like, Recipe):
            return load_run(path, like=like, trust_edited=trust_edited)
        return _load_model(path, like)
    if not path.is_file():
        raise FileNotFoundError(f"nothing to load at `{path}` ({describe_kind(path)}).")
    if path.suffix == ".py":
        return load_definition(path).value
    if path.suffix == ".npz":
        return load_archive(path)
    if not is_array_file(path):
        raise CorruptFileError(path, "it is neither a definition file (.py) nor an array file of genkit")
    if like is None:
        raise ValueError(f"`like` must be a pytree of the structure saved in `{path}`; got None.")
    return load_arrays(path, like)


def save(path: str | os.PathLike[str], object: PyTree) -> None:
    """Save a pytree to one checksummed file, in one step.

    Args:
        path: the file; one that ends in `.npz` gets the arrays of `object` (draws, or a dict of arrays) in NumPy's
            format, for other programs.
        object: any pytree.

    Raises:
        SaveError: if the system refuses; a file that stood there before is intact.

    Example:
        >>> import pathlib, tempfile
        >>> import jax
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "key.gk"
        >>> gk.save(path, {"key": jax.random.key(1), "rate": 0.5})
        >>> gk.load(path, like={"key": jax.random.key(0), "rate": 0.0})["rate"]
        0.5
    """
    if Path(path).suffix == ".npz":
        save_draws(path, object)
    else:
        save_arrays(path, object)


def load_run(path: str | os.PathLike[str], like: Recipe | None = None, *, trust_edited: bool = False) -> Fitted:
    """Load a run folder; runs its definition file.

    Args:
        path: the folder.
        like: the recipe, where the run has no definition file; then nothing is run.
        trust_edited: run the definition file although it was edited since the training began.

    Returns:
        The result of the training, up to the last checkpoint.

    Raises:
        FileNotFoundError: if there is no run, or no checkpoint in it yet.
        DefinitionError: if the run's copy of its definition file was edited.
        CorruptFileError: if a file of the run is damaged, or belongs to another run.
        ValueError: if the recipe does not fit the checkpoint, naming the first leaf that differs.

    Example:
        >>> import pathlib, tempfile
        >>> import jax, jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
        >>> draw = jax.tree_util.Partial(lambda key: jax.random.normal(key, (8,)))
        >>> recipe = gk.Recipe(lambda key: jnp.ones(()), draw, gk.Phase(loss, optax.adam(1e-2)), num_steps=3)
        >>> run = pathlib.Path(tempfile.mkdtemp()) / "run"
        >>> fitted = gk.fit(recipe, key=jax.random.key(0), run=run)
        >>> bool(gk.io.load_run(run, like=recipe).model == fitted.model)
        True
    """
    files = RunFiles(path)
    meta = read_meta(path)
    stored = _read_state(files)
    files.check_state(stored, meta)
    if like is not None:
        recipe = like
    elif files.definition.is_file():
        files.check_needs(meta)
        if files.was_edited(meta) and not trust_edited:
            raise DefinitionError(
                f"`{files.definition}` was edited since the training began, so that it may give another model. "
                "Pass `trust_edited` to run it all the same."
            )
        definition = load_definition(files.definition, ("recipe",))
        recipe = with_needs(definition, {name: files.needs / name for name in definition.needs})
    else:
        raise ValueError(f"`like` must be the recipe `{path}` was trained with: the run has no definition file.")
    key = jax.random.wrap_key_data(jax.numpy.asarray(meta["key"]["data"], np.uint32), impl=meta["key"]["impl"])
    return restore_fitted(stored, recipe, key=key)


def _load_model(path: Path, like: PyTree) -> PyTree:
    """The trained model of a run in the structure of `like`, its averaged leaves in place of the trained ones."""
    files = RunFiles(path)
    stored = _read_state(files)
    files.check_state(stored, read_meta(path))
    model = restore(stored, like, "['state'].model")
    return jax.tree_util.tree_map_with_path(functools.partial(_averaged, stored), model)


def _averaged(stored: Stored, key_path: tuple[object, ...], leaf: PyTree) -> PyTree:
    """The moving average of one leaf of a model; the leaf itself where none was kept."""
    average = stored.leaves.get("['state'].ema" + jax.tree_util.keystr(key_path))
    if average is None:
        return leaf
    # Averages of half-precision leaves are kept in single precision.
    return jax.numpy.asarray(average, leaf.dtype)


def _read_state(files: RunFiles) -> Stored:
    if not files.state.is_file():
        raise FileNotFoundError(f"`{files.folder}` holds no checkpoint yet: it has no {files.state.name}.")
    return read_arrays(files.state)


def with_needs(definition: Definition, runs: Mapping[str, str | os.PathLike[str]]) -> Recipe:
    """Give the `build` of a definition file the other models that it takes.

    Args:
        definition: the file.
        runs: the run folder for each of the file's `needs`; `build` gets the moving average of the run's model.

    Returns:
        The recipe, with a `build(key)` that takes nothing else.

    Raises:
        DefinitionError: if a run is missing, or is not needed.

    Example:
        >>> import pathlib, tempfile
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "constant.py"
        >>> _ = path.write_text('''
        ... import jax, jax.numpy as jnp, optax
        ... import genkit as gk
        ... loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
        ... draw = jax.tree_util.Partial(lambda key: jax.random.normal(key, (8,)))
        ... recipe = gk.Recipe(lambda key: jnp.ones(()), draw, gk.Phase(loss, optax.adam(1e-2)), num_steps=3)
        ... ''')
        >>> gk.io.with_needs(gk.io.load_definition(path), {}).num_steps
        3
    """
    for name, example in definition.needs.items():
        if name not in runs:
            raise DefinitionError(
                f"{definition.path} needs `{name}`, a run of {example}; give one with --with {name}=RUN."
            )
    for name in runs:
        if name not in definition.needs:
            known = ", ".join(definition.needs) or "nothing"
            raise DefinitionError(f"{definition.path} needs {known}; got `{name}` besides.")
    if not runs:
        return definition.value
    models = {name: load_run(folder).ema for name, folder in runs.items()}
    folders = tuple((name, str(folder)) for name, folder in runs.items())
    source = Source(str(definition.path), definition.text, folders)
    return definition.value.replace(build=functools.partial(definition.value.build, **models), source=source)
