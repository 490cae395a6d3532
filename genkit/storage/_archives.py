"""NumPy archives (`.npz`), written in one step and read with every member accounted for."""

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from genkit.storage._files import CorruptFileError, atomic_file


# Begins an archive's comment, before the checksum of the note.
_MARK = b"genkit:"
# A zip comment holds at most 65,535 bytes.
_MAX_NOTE = 65_535
# Deflate reaches 1,032 to 1 on constant data. Small archives may be that dense, large ones are bombs.
_FREE_BYTES = 1 << 28
_MAX_RATIO = 100
_LOCAL_HEADER = 30
_DESCRIPTOR = 24
_HAS_DESCRIPTOR = 0x08


def write_archive(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], note: str = "") -> None:
    """Write arrays as a compressed `.npz`, in one step.

    Args:
        path: the file to write or to replace.
        arrays: plain arrays by name.
        note: text to go with them, in the archive's comment; left out where it takes more than 65,535 bytes.

    Raises:
        SaveError: if the system refuses; a file that stood there before is intact.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from genkit.storage import read_archive, write_archive
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "draws.npz"
        >>> write_archive(path, {"x": np.arange(3)}, "three numbers")
        >>> read_archive(path)
        ({'x': array([0, 1, 2])}, 'three numbers')
    """
    text = note.encode()
    comment = _MARK + hashlib.sha256(text).hexdigest().encode() + b":" + text
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # Times of day would make equal arrays give different files.
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        if len(comment) <= _MAX_NOTE:
            archive.comment = comment


def read_archive(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Read the arrays of an `.npz`; never unpickles, and allocates no more than the file can answer for.

    Args:
        path: the file.
        max_bytes: most bytes the arrays may take together; default 256 MiB, or a hundred times the size of the file
            where that is more.

    Returns:
        Arrays by name, and the note that was written with them.

    Raises:
        CorruptFileError: if the file is damaged or foreign, lacks a member, or unfolds to more than `max_bytes`.
        FileNotFoundError: if there is no such file.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from genkit.storage import read_archive
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "draws.npz"
        >>> np.savez(path, x=np.arange(3))
        >>> read_archive(path)[0]["x"].tolist()
        [0, 1, 2]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at `{path}`.")
    if max_bytes is None:
        max_bytes = max(_FREE_BYTES, _MAX_RATIO * path.stat().st_size)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_complete(archive, members)
            total = sum(member.file_size for member in members)
            if total > max_bytes:
                raise ValueError(f"its arrays take {total} bytes, more than the {max_bytes} allowed (`max_bytes`)")
            arrays = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename or name in arrays:
                    raise ValueError(f"its member {member.filename!r} is no array, or is there twice")
                arrays[name] = _read_array(archive, member)
            return arrays, _note(archive.comment)
    # Everything that zipfile, zlib and NumPy raise on damaged bytes.
    except (
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        OSError,
        SyntaxError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        reason = str(error) or type(error).__name__
    except (zipfile.BadZipFile, zlib.error, IndexError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
    raise CorruptFileError(path, f"it is not a sound .npz archive of plain arrays ({reason})")


def _note(comment: bytes) -> str:
    """The note in an archive's comment; empty for archives of other programs."""
    if not comment.startswith(_MARK):
        return ""
    digest, _, text = comment[len(_MARK) :].partition(b":")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("its note does not match its checksum")
    return text.decode()


def _check_complete(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """Refuse a directory that leaves bytes of the file unexplained: a flipped bit can hide a member from it."""
    if any(member.flag_bits & 0x1 for member in members):
        raise ValueError("it is encrypted")
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        gap = member.header_offset - end
        if gap != 0:
            raise ValueError(f"{abs(gap)} bytes before its member {member.filename!r} belong to none")
        end = _end_of(archive, member)
    if end != archive.start_dir:
        raise ValueError(f"{archive.start_dir - end} bytes before its directory belong to no member")


def _end_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Position right behind a member: its local header, name, extra field, content and descriptor."""
    file = archive.fp
    assert file is not None
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise ValueError(f"its member {member.filename!r} does not begin where its directory says")
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    end = member.header_offset + _LOCAL_HEADER + name_length + extra_length + member.compress_size
    if not member.flag_bits & _HAS_DESCRIPTOR:
        return end
    # Streamed archives repeat the sizes behind the content, in 12 to 24 bytes.
    file.seek(end)
    following = file.read(_DESCRIPTOR + 4)
    starts = [position for mark in (b"PK\x03\x04", b"PK\x01\x02") if (position := following.find(mark, 12)) >= 0]
    return end + min(starts, default=0)


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, its header compared with the size of its member before anything is allocated."""
    with archive.open(member) as content:
        version = np.lib.format.read_magic(content)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(content)
        else:
            raise ValueError(f"its member {member.filename!r} has an unknown version {version}")
        if dtype.hasobject:
            raise ValueError(f"its member {member.filename!r} holds Python objects")
        needed = math.prod(shape) * dtype.itemsize
        if content.tell() + needed != member.file_size:
            raise ValueError(f"its member {member.filename!r} claims {needed} bytes of numbers and has others")
        # Read to the end, so that the member's checksum is compared.
        array = np.frombuffer(content.read(), dtype)
    if fortran:
        return array.reshape(shape[::-1]).T.copy(order="F")
    return array.reshape(shape).copy()
