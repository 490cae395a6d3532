"""A checksummed array store: one file, a bounded JSON header, raw little-endian bytes, two SHA-256 sums.

Layout: 8 magic bytes, the header's length (8 bytes, little-endian), SHA-256 of that length and the header (32 bytes),
the header, the payload. The header names the payload's length and SHA-256. Everything is verified before any array is
built, so every flipped bit, cut, trailing byte or foreign file is refused; nothing in a file is ever executed.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._files import CorruptFileError, Json, atomic_file


MAGIC = b"\x93GENKIT\x01"
_PRELUDE = struct.Struct("<8sQ32s")
_FORMAT = 1
_MAX_HEADER = 1 << 26  # 64 MiB of names and shapes: a million leaves
_MAX_DIM = 1 << 48
_PLAIN = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
_SMALL = "bfloat16 float8_e4m3fn float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz int4 uint4"
_DTYPES = {str(np.dtype(name)): np.dtype(name) for name in _PLAIN.split(" ")}
_DTYPES |= {name: np.dtype(getattr(jnp, name)) for name in _SMALL.split(" ")}
_SCALARS: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str}
_ARRAY_KINDS = ("jax", "numpy", "generic")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A verified file: its leaves by path, what the header says of each, and the writer's own facts."""

    path: Path
    leaves: dict[str, Any]
    headers: dict[str, Json]
    statics: Json
    meta: Json


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
    """
    leaves, arrays = [], []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        header, array = _encode(leaf)
        leaves.append({"path": jax.tree_util.keystr(key_path), **header})
        if array is not None:
            arrays.append(array)
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(_raw(array))
    header = {
        "format": _FORMAT,
        "payload": {"bytes": sum(array.nbytes for array in arrays), "sha256": digest.hexdigest()},
        "leaves": leaves,
        "statics": _statics(tree),
        "meta": meta or {},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > _MAX_HEADER:
        raise ValueError(f"`tree` has too many leaves for one file: its header takes {len(text)} bytes.")
    with atomic_file(path) as file:
        file.write(_PRELUDE.pack(MAGIC, len(text), _header_digest(text)))
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
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at `{path}`" + (": it is a folder" if path.is_dir() else ""))
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(path, file, size)
        headers = {}
        for entry in header["leaves"]:
            if entry["path"] in headers:
                raise CorruptFileError(path, f"its header names {entry['path']!r} twice")
            headers[entry["path"]] = entry
        leaves = {} if header_only else _read_leaves(path, file, size - start, header)
    return Stored(path, leaves, headers, header["statics"], header["meta"])


def hash_tree(tree: PyTree) -> str:
    """SHA-256 of all that `save_arrays` would store of a pytree, in hexadecimal."""
    digest = hashlib.sha256()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        header, array = _encode(leaf)
        digest.update(json.dumps([jax.tree_util.keystr(key_path), header]).encode())
        if array is not None:
            digest.update(_raw(array))
    return digest.hexdigest()


def is_array_file(path: Path) -> bool:
    """Whether the file begins like one of `save_arrays`."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


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
    """
    return restore(read_arrays(path), like)


def restore(stored: Stored, like: PyTree, prefix: str = "") -> PyTree:
    """Take the leaves whose paths begin with `prefix` and put them into the structure of `like`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves, wanted = [], set()
    for key_path, leaf in paths:
        name = prefix + jax.tree_util.keystr(key_path)
        wanted.add(name)
        have = stored.headers.get(name)
        expected, found = _describe(_encode_header(leaf)), _describe(have)
        if have is None or (expected != found and not _same(_encode_header(leaf), have)):
            raise ValueError(f"`{stored.path}` does not fit: leaf `{name}` must be {expected}; the file has {found}.")
        leaves.append(leaf if have["kind"] == "opaque" else stored.leaves[name])
    extra = [name for name in stored.headers if name.startswith(prefix) and name not in wanted]
    if extra:
        found = _describe(stored.headers[extra[0]])
        raise ValueError(f"`{stored.path}` does not fit: it has a leaf `{extra[0]}` ({found}) that is not expected.")
    for name, fields in _statics(like, prefix).items():
        for field, value in fields.items():
            other = stored.statics.get(name, {}).get(field, value)
            if other != value:
                raise ValueError(
                    f"`{stored.path}` does not fit: `{name}.{field}` must be {value!r}; the file has {other!r}."
                )
    return jax.tree_util.tree_unflatten(treedef, leaves)


# Leaves to headers and bytes


def _encode(leaf: Any) -> tuple[Json, np.ndarray | None]:
    header = _encode_header(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            raise ValueError("an array spread over several processes cannot be saved by one of them; gather it first.")
        leaf = leaf.addressable_data(0)
    if header["kind"] == "key":
        return header, np.asarray(jax.random.key_data(leaf))
    if header["kind"] in _ARRAY_KINDS:
        array = np.asarray(leaf)
        return header, array.astype(array.dtype.newbyteorder("<"), copy=False)
    return header, None


def _encode_header(leaf: Any) -> Json:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return {"kind": "key", "impl": _impl(leaf.dtype), "shape": list(leaf.shape)}
        weak = {"weak": True} if getattr(leaf, "weak_type", False) and leaf.shape == () else {}
        return {"kind": "jax", "dtype": leaf.dtype.name, "shape": list(leaf.shape), **weak}
    if isinstance(leaf, (np.ndarray, np.generic)):
        kind = "numpy" if isinstance(leaf, np.ndarray) else "generic"
        dtype = leaf.dtype.name
        if dtype not in _DTYPES:
            raise TypeError(f"arrays of dtype {leaf.dtype} cannot be saved; only numbers and truth values can.")
        return {"kind": kind, "dtype": dtype, "shape": list(leaf.shape)}
    for name, scalar in _SCALARS.items():
        if type(leaf) is scalar:
            return {"kind": "scalar", "type": name, "value": leaf}
    return {"kind": "opaque", "name": _name_of(leaf)}


def _impl(dtype: Any) -> str:
    # `jax.random.key_impl` wants an array; a skeleton has only the dtype.
    return str(jax.random.key_impl(jnp.empty((0,), dtype)))


def _name_of(thing: Any) -> str:
    """Package and qualified name; the module between them may move, and that of a definition file is private."""
    thing = getattr(thing, "func", thing)
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    package = (getattr(named, "__module__", "") or "").partition(".")[0]
    return named.__qualname__ if package.startswith("_") else f"{package}:{named.__qualname__}"


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _statics(tree: PyTree, prefix: str = "") -> Json:
    """Static fields of plain values (strides, flags, counts) of every module in the tree, by the module's path."""
    found: Json = {}

    def visit(path: tuple[Any, ...], node: Any) -> None:
        is_module = lambda x: x is not node and isinstance(x, eqx.Module)
        if isinstance(node, eqx.Module):
            values = {
                field.name: _plain(getattr(node, field.name))
                for field in dataclasses.fields(node)
                if field.metadata.get("static", False) and hasattr(node, field.name)
            }
            values = {name: value for name, value in values.items() if value is not None}
            if values:
                found[prefix + jax.tree_util.keystr(path)] = values
        for inner, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_module):
            if child is not node and isinstance(child, eqx.Module):
                visit((*path, *inner), child)

    visit((), tree)
    return found


def _plain(value: Any) -> Any:
    """The value as JSON gives it back, or None where it is not plain."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return None if any(item is None for item in items) else items
    return None


def _same(expected: Json, have: Json | None) -> bool:
    """Whether a stored leaf serves: JAX and NumPy arrays of equal dtype and shape stand for each other."""
    if have is None or expected["kind"] == "opaque" or have["kind"] == "opaque":
        return False
    if expected["kind"] in _ARRAY_KINDS and have["kind"] in _ARRAY_KINDS:
        return (expected["dtype"], expected["shape"]) == (have["dtype"], have["shape"])
    return expected["kind"] == have["kind"] == "scalar" and expected["type"] == have["type"]


def _describe(header: Json | None) -> str:
    if header is None:
        return "no such leaf"
    if header["kind"] in _ARRAY_KINDS:
        return f"{header['dtype']}{header['shape']}"
    if header["kind"] == "key":
        return f"key<{header['impl']}>{header['shape']}"
    return f"a Python {header['type']}" if header["kind"] == "scalar" else f"`{header['name']}`"


# Bytes to leaves


def _header_digest(text: bytes) -> bytes:
    return hashlib.sha256(len(text).to_bytes(8, "little") + text).digest()


def _read_header(path: Path, file: Any, size: int) -> tuple[Json, int]:
    prelude = file.read(_PRELUDE.size)
    if prelude[: len(MAGIC)] != MAGIC:
        raise CorruptFileError(path, "it is not an array file of genkit (its first bytes are others)")
    if len(prelude) < _PRELUDE.size:
        raise CorruptFileError(path, f"it ends after {size} bytes, inside its header")
    _, length, digest = _PRELUDE.unpack(prelude)
    if length > _MAX_HEADER:
        raise CorruptFileError(path, f"its header claims {length} bytes, more than the {_MAX_HEADER} allowed")
    if _PRELUDE.size + length > size:
        raise CorruptFileError(path, f"it ends after {size} bytes, inside its header")
    text = file.read(length)
    if _header_digest(text) != digest:
        raise CorruptFileError(path, "its header does not match its checksum")
    try:
        header = json.loads(text)
        _validate(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptFileError(path, f"its header is malformed ({error})") from None
    start = _PRELUDE.size + length
    claimed = header["payload"]["bytes"]
    if size - start != claimed:
        kind = "it was cut short" if size - start < claimed else "bytes were appended to it"
        raise CorruptFileError(path, f"{kind}: its header claims {claimed} bytes of arrays, it has {size - start}")
    return header, start


def _validate(header: Json) -> None:
    if header["format"] != _FORMAT:
        raise ValueError(f"format {header['format']!r} is unknown; this version reads {_FORMAT}")
    if not isinstance(header["meta"], dict) or not isinstance(header["statics"], dict):
        raise TypeError("meta and statics must be objects")
    if not all(isinstance(fields, dict) for fields in header["statics"].values()):
        raise TypeError("statics must be objects")
    total = 0
    for entry in header["leaves"]:
        if not isinstance(entry["path"], str):
            raise TypeError("a path must be a string")
        if entry["kind"] in _ARRAY_KINDS or entry["kind"] == "key":
            total += _byte_count(entry)
        elif entry["kind"] == "scalar":
            if type(entry["value"]) is not _SCALARS[entry["type"]]:
                raise TypeError(f"{entry['path']} is not a {entry['type']}")
        elif entry["kind"] != "opaque" or not isinstance(entry["name"], str):
            raise ValueError(f"{entry['path']} is of unknown kind {entry['kind']!r}")
    if total != header["payload"]["bytes"]:
        raise ValueError(f"its arrays take {total} bytes, its payload {header['payload']['bytes']}")


def _layout(entry: Json) -> tuple[np.dtype, tuple[int, ...]]:
    shape = entry["shape"]
    if not all(type(dim) is int and 0 <= dim < _MAX_DIM for dim in shape) or len(shape) > 32:
        raise ValueError(f"{entry['path']} has the absurd shape {shape}")
    if entry["kind"] == "key":
        words = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}[entry["impl"]]
        return np.dtype("uint32"), (*shape, words)
    return _DTYPES[entry["dtype"]], tuple(shape)


def _byte_count(entry: Json) -> int:
    dtype, shape = _layout(entry)
    return math.prod(shape) * dtype.itemsize


def _read_leaves(path: Path, file: Any, length: int, header: Json) -> dict[str, Any]:
    payload = bytearray(length)
    if file.readinto(payload) != length or file.read(1):
        raise CorruptFileError(path, "it changed while it was read")
    if hashlib.sha256(payload).hexdigest() != header["payload"]["sha256"]:
        raise CorruptFileError(path, "its arrays do not match their checksum")
    leaves, offset, view = {}, 0, memoryview(payload)
    for entry in header["leaves"]:
        if entry["kind"] in ("scalar", "opaque"):
            leaves[entry["path"]] = entry.get("value")
            continue
        end = offset + _byte_count(entry)
        leaves[entry["path"]] = _build(path, entry, view[offset:end])
        offset = end
    return leaves


def _build(path: Path, entry: Json, raw: memoryview) -> Any:
    dtype, shape = _layout(entry)
    array = np.frombuffer(raw, dtype).reshape(shape).copy()
    if entry["kind"] == "numpy":
        return array
    if entry["kind"] == "generic":
        return array[()]
    value = jnp.array(array.item() if entry.get("weak") else array)  # Python numbers make weakly typed arrays
    if value.dtype != dtype:
        raise ValueError(
            f"`{path}` holds `{entry['path']}` in {dtype.name}, which JAX turns into {value.dtype.name}: enable it "
            "with `jax.config.update('jax_enable_x64', True)`."
        )
    return jax.random.wrap_key_data(value, impl=entry["impl"]) if entry["kind"] == "key" else value
