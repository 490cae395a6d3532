"""Draws as NumPy archives, for other programs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core._files import CorruptFileError, atomic_file


def save_draws(path: str | os.PathLike[str], draws: Any) -> None:
    """Save draws (or any pytree of arrays) as a compressed `.npz`, in one step.

    Args:
        path: the file to write or to replace.
        draws: a record such as `gk.Draws`, or a dict of arrays. Fields that are `None` are left out; nested names are
            joined by dots; typed keys become their data, `bfloat16` becomes `float32`.

    Raises:
        SaveError: if the system refuses; a file that stood there before is intact.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "draws.npz"
        >>> gk.io.save_draws(path, {"value": jnp.zeros((3, 2)), "info": {"steps": 7}})
        >>> sorted(gk.io.load_draws(path))
        ['info.steps', 'value']
    """
    arrays = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(draws):
        name = ".".join(_name(step) for step in key_path) or "value"
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
            arrays[name] = _portable(leaf)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def load_draws(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Load the arrays of an `.npz` file; never unpickles.

    Args:
        path: the file.

    Returns:
        Arrays by name.

    Raises:
        CorruptFileError: if the file is damaged or foreign.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "draws.npz"
        >>> gk.io.save_draws(path, {"value": np.arange(3)})
        >>> gk.io.load_draws(path)["value"].tolist()
        [0, 1, 2]
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at `{path}`.")
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds
        raise CorruptFileError(path, f"it is not a sound .npz archive of plain arrays ({error})") from None


def _name(step: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)


def _portable(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype.kind == "V" else array  # NumPy's own kinds only
