"""Pytrees in array files: leaves to headers and bytes, and back."""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from genkit.storage._files import CorruptFileError, Json, atomic_file
from genkit.storage._layout import (
    ARRAY_KINDS,
    DTYPES,
    FORMAT,
    MAGIC,
    MAX_HEADER,
    MAX_LEAVES,
    PRELUDE,
    SCALARS,
    Leaf,
    Stored,
    byte_count,
    header_digest,
    layout,
    open_file,
    read_header,
    read_payload,
    stored_facts,
)


# One entry of a path in a pytree, as JAX makes them.
_KeyPath = tuple[object, ...]


def save_arrays(path: str | os.PathLike[str], tree: PyTree, meta: Json | None = None) -> None:
    """Save the leaves of a pytree to one file, atomically.

    Arrays (JAX and NumPy, of any numerical dtype), typed PRNG keys, Python numbers and strings are stored; functions
    and other objects are recorded by name only, so that loading can tell when they differ.

    Args:
        path: the file to write or to replace.
        tree: any pytree.
        meta: facts of the writer, JSON, readable without building arrays.

    Raises:
        SaveError: if the system refuses; a file that stood there before is intact.
        ValueError: if the tree has more leaves than one file may hold.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from genkit.storage import load_arrays, save_arrays
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.gk"
        >>> save_arrays(path, {"w": jnp.arange(3)})
        >>> load_arrays(path, {"w": jnp.zeros(3, int)})["w"].tolist()
        [0, 1, 2]
    """
    leaves = []
    arrays = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        header, array = _encode(leaf)
        leaves.append({"path": jax.tree_util.keystr(key_path), **header})
        if array is not None:
            arrays.append(array)
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(_raw(array))
    header = {
        "format": FORMAT,
        "payload": {"bytes": sum(array.nbytes for array in arrays), "sha256": digest.hexdigest()},
        "leaves": leaves,
        "statics": _statics(tree),
        "meta": meta or {},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER or len(leaves) > MAX_LEAVES:
        raise ValueError(f"`tree` has too many leaves for one file: {len(leaves)}, a header of {len(text)} bytes.")
    with atomic_file(path) as file:
        file.write(PRELUDE.pack(MAGIC, len(text), header_digest(text)))
        file.write(text)
        for array in arrays:
            file.write(_raw(array))


def read_arrays(path: str | os.PathLike[str], *, header_only: bool = False) -> Stored:
    """Read and verify a file of `save_arrays`.

    Args:
        path: the file.
        header_only: stop after the header (verified by its own checksum): `leaves` stays empty.

    Returns:
        What the file holds.

    Raises:
        CorruptFileError: if anything at all is wrong with the file, naming the file and the reason.
        FileNotFoundError: if there is no such file.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from genkit.storage import read_arrays, save_arrays
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.gk"
        >>> save_arrays(path, {"w": jnp.arange(3)}, meta={"step": 7})
        >>> read_arrays(path).meta
        {'step': 7}
    """
    path = Path(path)
    with open_file(path) as file:
        header, length = read_header(path, file)
        facts = stored_facts(path, header)
        if header_only:
            return facts
        return dataclasses.replace(facts, leaves=_read_leaves(path, file, length, header))


def hash_tree(tree: PyTree) -> str:
    """Compute SHA-256 of all that `save_arrays` would store of a pytree.

    Args:
        tree: any pytree.

    Returns:
        The sum in hexadecimal.

    Example:
        >>> from genkit.storage import hash_tree
        >>> hash_tree(1) == hash_tree(1.0)
        False
    """
    digest = hashlib.sha256()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        header, array = _encode(leaf)
        digest.update(json.dumps([jax.tree_util.keystr(key_path), header]).encode())
        if array is not None:
            digest.update(_raw(array))
    return digest.hexdigest()


def load_arrays(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Load a file of `save_arrays` into the structure of `like`.

    Args:
        path: the file.
        like: a pytree of the structure that was saved; its arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
        `like` with the file's arrays and numbers; functions and static fields are those of `like`.

    Raises:
        CorruptFileError: if the file is damaged or foreign.
        ValueError: if `like` has another structure, shape, dtype or function, naming the first leaf that differs.

    Example:
        >>> import pathlib, tempfile
        >>> import jax, jax.numpy as jnp
        >>> from genkit.storage import load_arrays, save_arrays
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.gk"
        >>> save_arrays(path, {"w": jnp.ones(2)})
        >>> load_arrays(path, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})["w"].tolist()
        [1.0, 1.0]
    """
    return restore(read_arrays(path), like)


def restore(stored: Stored, like: PyTree, prefix: str = "") -> PyTree:
    """Put the leaves of a file into the structure of a pytree.

    Args:
        stored: a file that was read whole.
        like: a pytree of the structure that was saved.
        prefix: take the leaves whose paths begin so.

    Returns:
        `like` with the file's arrays and numbers.

    Raises:
        ValueError: if `like` has another structure, shape, dtype or function, naming the first leaf that differs.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from genkit.storage import read_arrays, restore, save_arrays
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.gk"
        >>> save_arrays(path, {"net": jnp.ones(2), "step": 3})
        >>> restore(read_arrays(path), 0, "['step']")
        3
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    wanted = set()
    for key_path, leaf in paths:
        name = prefix + jax.tree_util.keystr(key_path)
        wanted.add(name)
        found = stored.headers.get(name)
        expected = _encode_header(leaf)
        if found is None or (_describe(expected) != _describe(found) and not _stands_for(expected, found)):
            raise ValueError(
                f"`{stored.path}` does not fit: leaf `{name}` must be {_describe(expected)}; the file has "
                f"{_describe(found)}."
            )
        if found["kind"] == "opaque":
            # Functions are not stored: that of `like` has the same name.
            leaves.append(leaf)
        else:
            leaves.append(stored.leaves[name])
    extra = [name for name in stored.headers if name.startswith(prefix) and name not in wanted]
    if extra:
        found = _describe(stored.headers[extra[0]])
        raise ValueError(f"`{stored.path}` does not fit: it has a leaf `{extra[0]}` ({found}) that is not expected.")
    _check_statics(stored, _statics(like, prefix))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _check_statics(stored: Stored, expected: Json) -> None:
    """Refuse a module whose strides, flags or counts differ from those that were saved: its shapes may be equal."""
    for name, fields in expected.items():
        saved = stored.statics.get(name, {})
        for field, value in fields.items():
            other = saved.get(field, value)
            if other != value:
                raise ValueError(
                    f"`{stored.path}` does not fit: `{name}.{field}` must be {value!r}; the file has {other!r}."
                )


# Leaves to headers and bytes


def _encode(leaf: object) -> tuple[Json, np.ndarray | None]:
    """Header and bytes of a leaf; no bytes for what the header holds already."""
    header = _encode_header(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            raise ValueError("an array spread over several processes cannot be saved by one of them; gather it first.")
        leaf = leaf.addressable_data(0)
    if header["kind"] == "key":
        assert isinstance(leaf, jax.Array)
        return header, np.asarray(jax.random.key_data(leaf))
    if header["kind"] in ARRAY_KINDS:
        array = np.asarray(leaf)
        return header, array.astype(array.dtype.newbyteorder("<"), copy=False)
    return header, None


def _encode_header(leaf: object) -> Json:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return {"kind": "key", "impl": _impl(leaf.dtype), "shape": list(leaf.shape)}
        header = {"kind": "jax", "dtype": leaf.dtype.name, "shape": list(leaf.shape)}
        if leaf.weak_type and leaf.shape == ():
            header["weak"] = True
        return header
    if isinstance(leaf, (np.ndarray, np.generic)):
        if leaf.dtype.name not in DTYPES:
            raise TypeError(f"arrays of dtype {leaf.dtype} cannot be saved; only numbers and truth values can.")
        # NumPy's scalars come back as scalars, arrays without axes as arrays.
        kind = "generic"
        if isinstance(leaf, np.ndarray):
            kind = "numpy"
        return {"kind": kind, "dtype": leaf.dtype.name, "shape": list(leaf.shape)}
    for name, scalar in SCALARS.items():
        # The very type: a subclass (an enumeration, say) would come back as something else.
        if type(leaf) is scalar:
            return {"kind": "scalar", "type": name, "value": leaf}
    return {"kind": "opaque", "name": _name_of(leaf)}


def _impl(dtype: object) -> str:
    # `jax.random.key_impl` wants an array; a skeleton has only the dtype.
    return str(jax.random.key_impl(jnp.empty((0,), dtype)))  # pyright: ignore[reportArgumentType]


def _name_of(thing: object) -> str:
    """Package and qualified name; the module between them may move, and that of a definition file is private."""
    if isinstance(thing, (functools.partial, jax.tree_util.Partial)):
        thing = thing.func
    # Functions, classes and built-ins have a qualified name; instances are known by their class.
    qualified = getattr(thing, "__qualname__", None)
    if qualified is None:
        thing = type(thing)
        qualified = thing.__qualname__
    # Built-in methods have no module.
    package = str(thing.__module__ or "").partition(".")[0]
    if package.startswith("_"):
        return qualified
    return f"{package}:{qualified}"


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _statics(tree: PyTree, prefix: str = "") -> Json:
    """Static fields of plain values (strides, flags, counts) of every module in the tree, by the module's path."""
    found: Json = {}

    def visit(path: _KeyPath, node: PyTree) -> None:
        if isinstance(node, eqx.Module):
            values = _plain_statics(node)
            if values:
                found[prefix + jax.tree_util.keystr(path)] = values

        def is_inner_module(x: PyTree) -> bool:
            return x is not node and isinstance(x, eqx.Module)

        for inner, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_inner_module):
            if child is not node and isinstance(child, eqx.Module):
                visit((*path, *inner), child)

    visit((), tree)
    return found


def _plain_statics(module: eqx.Module) -> Json:
    """Static fields of one module that JSON can hold."""
    # A field without a default that `__init__` did not set is absent, so the instance's own dictionary is asked.
    own = vars(module)
    values = {}
    for field in dataclasses.fields(module):
        if field.metadata.get("static", False):
            plain = _plain(own.get(field.name, field.default))
            if plain is not None:
                values[field.name] = plain
    return values


def _plain(value: object) -> Json | list | bool | int | float | str | None:
    """The value as JSON gives it back, or None where it is not plain."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        if all(item is not None for item in items):
            return items
    return None


def _stands_for(expected: Json, found: Json) -> bool:
    """True if a stored leaf serves: JAX and NumPy arrays of equal dtype and shape stand for each other."""
    if expected["kind"] in ARRAY_KINDS and found["kind"] in ARRAY_KINDS:
        return (expected["dtype"], expected["shape"]) == (found["dtype"], found["shape"])
    return expected["kind"] == found["kind"] == "scalar" and expected["type"] == found["type"]


def _describe(header: Json | None) -> str:
    if header is None:
        return "no such leaf"
    if header["kind"] in ARRAY_KINDS:
        return f"{header['dtype']}{header['shape']}"
    if header["kind"] == "key":
        return f"key<{header['impl']}>{header['shape']}"
    if header["kind"] == "scalar":
        return f"a Python {header['type']}"
    return f"`{header['name']}`"


# Bytes to leaves


def _read_leaves(path: Path, file: BinaryIO, length: int, header: Json) -> dict[str, Leaf]:
    payload = read_payload(path, file, length, header)
    leaves: dict[str, Leaf] = {}
    offset = 0
    for entry in header["leaves"]:
        if entry["kind"] in ("scalar", "opaque"):
            leaves[entry["path"]] = entry.get("value")
            continue
        end = offset + byte_count(entry)
        try:
            leaves[entry["path"]] = _build(path, entry, payload[offset:end])
        except (TypeError, OverflowError, MemoryError) as error:
            raise CorruptFileError(path, f"`{entry['path']}` cannot be built ({error})") from None
        offset = end
    return leaves


def _build(path: Path, entry: Json, raw: memoryview) -> np.ndarray | np.generic | jax.Array:
    dtype, shape = layout(entry)
    array = np.frombuffer(raw, dtype).reshape(shape).copy()
    if entry["kind"] == "numpy":
        return array
    if entry["kind"] == "generic":
        return array[()]
    # Python numbers make weakly typed arrays, as the one that was saved was.
    if entry.get("weak"):
        value = jnp.array(array.item())
    else:
        value = jnp.array(array)
    if value.dtype != dtype:
        raise ValueError(
            f"`{path}` holds `{entry['path']}` in {dtype.name}, which JAX turns into {value.dtype.name}: enable it "
            "with `jax.config.update('jax_enable_x64', True)`."
        )
    if entry["kind"] == "key":
        return jax.random.wrap_key_data(value, impl=entry["impl"])
    return value
