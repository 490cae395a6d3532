"""The layout of an array file, read and verified with NumPy alone.

One file holds 8 magic bytes, the header's length (8 bytes, little-endian), SHA-256 of that length and the header (32
bytes), the header, the payload. The header is bounded JSON and names the payload's length and SHA-256. Everything is
verified before any array is built, so every flipped bit, cut, trailing byte or foreign file is refused; nothing in a
file is ever executed.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from genkit.storage._files import CorruptFileError, Json


MAGIC = b"\x93GENKIT\x01"
PRELUDE = struct.Struct("<8sQ32s")
FORMAT = 1
# Networks have thousands of leaves, each about 100 bytes of header. Without bounds a file of 50 MB could name so many
# empty arrays that making them takes minutes.
MAX_HEADER = 1 << 25
MAX_LEAVES = 100_000
_MAX_DIM = 1 << 48
_MAX_DIMS = 32
_NUMPY_DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
_SMALL_DTYPES = "bfloat16 float8_e4m3fn float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz int4 uint4"
DTYPES = {str(np.dtype(name)): np.dtype(name) for name in _NUMPY_DTYPES.split(" ")}
DTYPES |= {name: np.dtype(vars(ml_dtypes)[name]) for name in _SMALL_DTYPES.split(" ")}
SCALARS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
ARRAY_KINDS = ("jax", "numpy", "generic")
_KEY_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}

Leaf = ArrayLike | None


@dataclasses.dataclass(frozen=True)
class Stored:
    """A verified file.

    Args:
        path: the file.
        leaves: its leaves by path; empty where only facts were asked for.
        headers: what the file says of each leaf.
        statics: static fields of the modules in the saved tree, by the module's path.
        meta: the writer's own facts.
    """

    path: Path
    leaves: dict[str, Leaf]
    headers: dict[str, Json]
    statics: Json
    meta: Json


def is_array_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file begins like one of `save_arrays`.

    Args:
        path: an existing file.

    Returns:
        True if its first bytes are those of an array file.

    Example:
        >>> import pathlib, tempfile
        >>> from genkit.storage import is_array_file
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
        >>> _ = path.write_text("something else")
        >>> is_array_file(path)
        False
    """
    with Path(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def inspect_arrays(path: str | os.PathLike[str]) -> Stored:
    """Verify every checksum of an array file without building its arrays; needs no JAX.

    Args:
        path: the file.

    Returns:
        What the header says; `leaves` stays empty.

    Raises:
        CorruptFileError: if anything at all is wrong with the file.
        FileNotFoundError: if there is no such file.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from genkit.storage import inspect_arrays, save_arrays
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.gk"
        >>> save_arrays(path, {"w": np.zeros((2, 3))})
        >>> inspect_arrays(path).headers["['w']"]["shape"]
        [2, 3]
    """
    path = Path(path)
    with open_file(path) as file:
        header, length = read_header(path, file)
        read_payload(path, file, length, header)
    return stored_facts(path, header)


def stored_facts(path: Path, header: Json) -> Stored:
    """The facts of a header, without its arrays."""
    headers = {entry["path"]: entry for entry in header["leaves"]}
    return Stored(path, {}, headers, header["statics"], header["meta"])


def open_file(path: Path) -> BinaryIO:
    """Open an existing file for reading."""
    if not path.is_file():
        folder = ": it is a folder" if path.is_dir() else ""
        raise FileNotFoundError(f"no file at `{path}`{folder}")
    return path.open("rb")


def header_digest(text: bytes) -> bytes:
    """Checksum of a header and its length."""
    return hashlib.sha256(len(text).to_bytes(8, "little") + text).digest()


def read_header(path: Path, file: BinaryIO) -> tuple[Json, int]:
    """Read and verify the header at the start of an open file; returns it and the length of the payload behind it."""
    size = os.fstat(file.fileno()).st_size
    prelude = file.read(PRELUDE.size)
    if prelude[: len(MAGIC)] != MAGIC:
        raise CorruptFileError(path, "it is not an array file of genkit (its first bytes are others)")
    if len(prelude) < PRELUDE.size:
        raise CorruptFileError(path, f"it ends after {size} bytes, inside its header")
    _, length, digest = PRELUDE.unpack(prelude)
    # Looked at before anything is read: a forged length must not allocate memory.
    if length > MAX_HEADER:
        raise CorruptFileError(path, f"its header claims {length} bytes, more than the {MAX_HEADER} allowed")
    if PRELUDE.size + length > size:
        raise CorruptFileError(path, f"it ends after {size} bytes, inside its header")
    text = file.read(length)
    if header_digest(text) != digest:
        raise CorruptFileError(path, "its header does not match its checksum")
    try:
        header = json.loads(text)
        _validate(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptFileError(path, f"its header is malformed ({error})") from None
    payload = size - PRELUDE.size - length
    claimed = header["payload"]["bytes"]
    if payload != claimed:
        kind = "bytes were appended to it"
        if payload < claimed:
            kind = "it was cut short"
        raise CorruptFileError(path, f"{kind}: its header claims {claimed} bytes of arrays, it has {payload}")
    return header, payload


def _validate(header: Json) -> None:
    """Refuse a header whose checksum is right and whose content is not; messages are completed by the caller."""
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']!r} is unknown; this version reads {FORMAT}")
    if not isinstance(header["meta"], dict) or not isinstance(header["statics"], dict):
        raise TypeError("meta and statics must be objects")
    if not all(isinstance(fields, dict) for fields in header["statics"].values()):
        raise TypeError("statics must be objects")
    if len(header["leaves"]) > MAX_LEAVES:
        raise ValueError(f"it names {len(header['leaves'])} leaves, more than the {MAX_LEAVES} allowed")
    total = 0
    seen = set()
    for entry in header["leaves"]:
        if not isinstance(entry["path"], str):
            raise TypeError("a path must be a string")
        if entry["path"] in seen:
            raise ValueError(f"it names {entry['path']!r} twice")
        seen.add(entry["path"])
        total += _validate_leaf(entry)
    if total != header["payload"]["bytes"]:
        raise ValueError(f"its arrays take {total} bytes, its payload {header['payload']['bytes']}")


def _validate_leaf(entry: Json) -> int:
    """Refuse a malformed entry; returns the bytes it takes in the payload."""
    if entry["kind"] in ARRAY_KINDS or entry["kind"] == "key":
        # Only arrays without axes can be weakly typed, as Python numbers are.
        if entry.get("weak") and entry["shape"]:
            raise ValueError(f"{entry['path']} is weakly typed and has axes")
        return byte_count(entry)
    if entry["kind"] == "scalar":
        if type(entry["value"]) is not SCALARS[entry["type"]]:
            raise TypeError(f"{entry['path']} is not a {entry['type']}")
        return 0
    if entry["kind"] != "opaque" or not isinstance(entry["name"], str):
        raise ValueError(f"{entry['path']} is of unknown kind {entry['kind']!r}")
    return 0


def layout(entry: Json) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape of one array in the payload; keys are their words."""
    shape = entry["shape"]
    plain = all(type(dim) is int and 0 <= dim < _MAX_DIM for dim in shape)
    # NumPy multiplies all axes that are not zero, also beside an axis of zero.
    if not plain or len(shape) > _MAX_DIMS or math.prod(dim for dim in shape if dim) >= _MAX_DIM:
        raise ValueError(f"{entry['path']} has the absurd shape {shape}")
    if entry["kind"] == "key":
        return np.dtype("uint32"), (*shape, _KEY_WORDS[entry["impl"]])
    return DTYPES[entry["dtype"]], tuple(shape)


def byte_count(entry: Json) -> int:
    """Bytes of one array in the payload."""
    dtype, shape = layout(entry)
    return math.prod(shape) * dtype.itemsize


def read_payload(path: Path, file: BinaryIO, length: int, header: Json) -> memoryview:
    """Read and verify the bytes of all arrays."""
    payload = bytearray(length)
    view = memoryview(payload)
    # Regular files fill the buffer in one call up to 2 GiB; larger ones take several.
    filled = 0
    while filled < length:
        count = file.readinto(view[filled:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            break
        filled += count
    if filled != length or file.read(1):
        raise CorruptFileError(path, "it changed while it was read")
    if hashlib.sha256(payload).hexdigest() != header["payload"]["sha256"]:
        raise CorruptFileError(path, "its arrays do not match their checksum")
    return view
