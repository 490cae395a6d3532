"""The verbs `load` and `save`."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._core._files import CorruptFileError, describe_kind
from .._core._fit import fitted_from
from .._core._fit_loop import Fitted
from .._core._objective import Recipe
from .._core._run import DEFINITION, NEEDS, is_run, read_meta, read_state
from .._core._store import is_array_file, load_arrays, save_arrays
from ._definition import Definition, DefinitionError, load_definition
from ._draws import save_draws


def load(path: str | os.PathLike[str], like: PyTree = None) -> Any:
    """Load a definition file, a run folder or an array file.

    Loading a definition file or a run folder runs Python code: load only what you trust. An array file never executes
    anything and is verified, bit by bit, before anything is taken from it.

    Args:
        path: a `.py` file, a run folder, or a file that `save` wrote.
        like: for an array file, a pytree of the structure that was saved (its arrays may be `jax.ShapeDtypeStruct`s);
            for a run of a recipe that came from no file, that recipe.

    Returns:
        The recipe, problem or sampler of a definition file; a `Fitted` for a run folder; for an array file `like` with
        the file's arrays.

    Raises:
        FileNotFoundError: if nothing is there.
        DefinitionError: if a definition file fails or does not bind what it must.
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
        return load_run(path, like=like)
    if not path.is_file():
        raise FileNotFoundError(f"nothing to load at `{path}` ({describe_kind(path)}).")
    if path.suffix == ".py":
        return load_definition(path).value
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


def load_run(path: str | os.PathLike[str], like: PyTree = None) -> Fitted:
    """Load a run folder; runs its definition file.

    Args:
        path: the folder.
        like: the recipe, where the run has no definition file.

    Returns:
        What the training gave, up to the last checkpoint.

    Raises:
        FileNotFoundError: if there is no run, or no checkpoint in it yet.
        CorruptFileError: if a file of the run is damaged.
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
    path = Path(path)
    meta, stored = read_meta(path), read_state(path)
    if isinstance(like, Recipe):
        recipe = like
    elif (path / DEFINITION).is_file():
        definition = load_definition(path / DEFINITION, ("recipe",))
        runs = {name: path / NEEDS / name for name in definition.needs}
        recipe = with_needs(definition, runs)
    else:
        raise ValueError(f"`like` must be the recipe `{path}` was trained with: the run has no definition file.")
    key = jax.random.wrap_key_data(jax.numpy.asarray(meta["key"]["data"], np.uint32), impl=meta["key"]["impl"])
    return fitted_from(stored, recipe, key)


def with_needs(definition: Definition, runs: Mapping[str, str | os.PathLike[str]]) -> Recipe:
    """The recipe of a definition file whose `build` takes other models.

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
    missing, extra = sorted(set(definition.needs) - set(runs)), sorted(set(runs) - set(definition.needs))
    if missing:
        name = missing[0]
        raise DefinitionError(
            f"{definition.path} needs `{name}`, a run of {definition.needs[name]}; give one with --with {name}=RUN."
        )
    if extra:
        known = ", ".join(definition.needs) or "nothing"
        raise DefinitionError(f"{definition.path} needs {known}; got `{extra[0]}` besides.")
    if not runs:
        return definition.value
    models = {name: load_run(folder).ema for name, folder in runs.items()}
    source = definition.value.source
    source = type(source)(source.path, source.text, tuple((name, str(folder)) for name, folder in runs.items()))
    return definition.value.replace(build=functools.partial(definition.value.build, **models), source=source)
