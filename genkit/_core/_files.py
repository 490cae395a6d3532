"""Files that are either wholly there or not there at all."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


class SaveError(OSError):
    """A file could not be written; whatever stood at its path before is intact."""


class CorruptFileError(ValueError):
    """A file is damaged, cut short or not one of genkit's; nothing was taken from it."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"`{os.fspath(path)}` cannot be read: {reason}")
        self.path = Path(path)
        self.reason = reason


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` in one step when the block ends well, and never appears otherwise.

    The bytes go to a temporary file in the same folder, which is synchronized to disk, renamed over `path`, and made
    permanent by synchronizing the folder. If anything fails, the temporary file is removed.

    Args:
        path: where the file shall stand; its folder must exist.

    Yields:
        The open temporary file.

    Raises:
        SaveError: if the system refuses (disk full, no permission, no such folder).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        reason = error.strerror or str(error)
        was = "the file that was there is intact" if path.exists() else "nothing was written"
        raise SaveError(error.errno or errno.EIO, f"could not write `{path}`: {reason}; {was}") from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename is durable without it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path` in one step."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of writers that were killed in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def describe_kind(path: Path) -> str:
    """What stands at `path`, in a word, for messages."""
    if not path.exists():
        return "nothing there"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"


Json = dict[str, Any]
