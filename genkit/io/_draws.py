"""Draws as NumPy archives, for other programs and for `gk.load`."""

import json
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from genkit.sampling import Draws
from genkit.storage import Json, read_archive, write_archive


def save_draws(path: str | os.PathLike[str], draws: PyTree) -> None:
    """Save draws (or any pytree of arrays) as a compressed `.npz`, in one step.

    Args:
        path: the file to write or to replace.
        draws: a record such as `gk.Draws`, or a dict of arrays. Fields that are `None` are left out; nested names are
            joined by dots; typed keys become their data, `bfloat16` becomes `float32`. `gk.load` gives `gk.Draws` and
            dicts back as they were.

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
    leaves = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(draws, is_leaf=lambda leaf: leaf is None):
        steps = [_step_name(step) for step in key_path]
        if leaf is None:
            leaves.append({"path": steps, "kind": "none"})
        elif isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
            name = ".".join(steps) or "value"
            arrays[name] = _portable(leaf)
            leaves.append({"path": steps, "name": name, **_kind(leaf)})
    # How to put the arrays together again; of other types the arrays by name are all that comes back.
    note = ""
    if isinstance(draws, Draws):
        note = json.dumps({"type": "Draws", "leaves": leaves})
    elif _is_plain_dict(draws):
        note = json.dumps({"type": "dict", "leaves": leaves})
    write_archive(path, arrays, note)


def load_draws(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Mapping[str, np.ndarray]:
    """Load the arrays of an `.npz` file; never unpickles.

    Args:
        path: the file.
        max_bytes: most bytes the arrays may take together; default 256 MiB, or a hundred times the size of the file
            where that is more.

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
    return read_archive(path, max_bytes=max_bytes)[0]


def load_archive(path: str | os.PathLike[str]) -> Draws | dict[str, PyTree]:
    """Load an archive as the `gk.Draws` or the dict that was saved; foreign ones as a dict of their arrays."""
    arrays, note = read_archive(path)
    if not note:
        return dict(arrays)
    facts = json.loads(note)
    tree: dict[str, PyTree] = {}
    for leaf in facts["leaves"]:
        node = tree
        for step in leaf["path"][:-1]:
            node = node.setdefault(step, {})
        node[leaf["path"][-1]] = _restore(arrays, leaf)
    if facts["type"] == "Draws":
        return Draws(**tree)
    return tree


def _restore(arrays: Mapping[str, np.ndarray], leaf: Json) -> PyTree:
    """One leaf as it was before it was made portable."""
    if leaf["kind"] == "none":
        return None
    array = arrays[leaf["name"]]
    if leaf["kind"] == "key":
        return jax.random.wrap_key_data(jnp.asarray(array), impl=leaf["impl"])
    if leaf["kind"] == "number":
        return array.item()
    if leaf["kind"] == "jax":
        return jnp.asarray(array, leaf["dtype"])
    return array


def _is_plain_dict(tree: PyTree) -> bool:
    """True for dicts, of dicts, of leaves, all under text keys."""
    if not isinstance(tree, dict):
        return False
    for name, value in tree.items():
        is_leaf = value is None or jax.tree_util.all_leaves([value])
        if not isinstance(name, str) or not (is_leaf or (value and _is_plain_dict(value))):
            return False
    return bool(tree)


def _kind(leaf: jax.Array | np.ndarray | np.generic | int | float) -> Json:
    """Facts about a leaf that its portable array does not tell."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return {"kind": "key", "impl": str(jax.random.key_impl(leaf))}
        return {"kind": "jax", "dtype": leaf.dtype.name}
    if isinstance(leaf, (np.ndarray, np.generic)):
        return {"kind": "numpy"}
    return {"kind": "number"}


_Step = jax.tree_util.GetAttrKey | jax.tree_util.SequenceKey | jax.tree_util.DictKey | jax.tree_util.FlattenedIndexKey


def _step_name(step: _Step) -> str:
    """Text of one step of a path in a pytree."""
    if isinstance(step, jax.tree_util.GetAttrKey):
        return step.name
    if isinstance(step, jax.tree_util.SequenceKey):
        return str(step.idx)
    return str(step.key)


def _portable(leaf: jax.Array | np.ndarray | np.generic | int | float) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    # NumPy's own kinds only: other programs do not know the small floats of `ml_dtypes`.
    if array.dtype.kind == "V":
        return array.astype(np.float32)
    return array
