"""Files that are either wholly there or not there at all."""

import contextlib
import errno
import json
import os
import platform
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


if os.name == "posix":
    import fcntl
else:
    fcntl = None  # other systems have no advisory locks in the standard library


Json = dict[str, Any]

_LOCK = ".lock"


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
    permanent by synchronizing the folder. If anything fails, the temporary file is removed. A symbolic link is
    followed, and the permissions of a file that is replaced are kept.

    Args:
        path: where the file shall stand; its folder must exist.

    Yields:
        The open temporary file.

    Raises:
        SaveError: if the system refuses (disk full, no permission, no such folder), or if `path` is a folder, a device
            or a pipe.

    Example:
        >>> import pathlib, tempfile
        >>> from genkit.storage import atomic_file
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_file(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_text()
        'whole'
    """
    path = Path(path)
    # Renaming over a link would replace the link and leave the file behind it as it was.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        mode = _mode_of(target)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        reason = error.strerror or str(error)
        outcome = "the file that was there is intact" if target.is_file() else "nothing was written"
        raise SaveError(error.errno or errno.EIO, f"could not write `{path}`: {reason}; {outcome}") from error


def _mode_of(path: Path) -> int | None:
    """Permissions of the file at `path`; None where there is none yet."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {describe_kind(path)}")
    return stat.S_IMODE(mode)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename is durable without it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write bytes or text to a file in one step.

    Args:
        path: where the file shall stand; its folder must exist.
        content: what it holds; text is encoded as UTF-8.

    Raises:
        SaveError: as `atomic_file`.

    Example:
        >>> import pathlib, tempfile
        >>> from genkit.storage import atomic_write
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
        >>> atomic_write(path, "whole")
        >>> path.read_text()
        'whole'
    """
    if isinstance(content, str):
        content = content.encode()
    with atomic_file(path) as file:
        file.write(content)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of writers that were killed.

    Args:
        folder: where they stand; nobody else may be writing there.

    Example:
        >>> import pathlib, tempfile
        >>> from genkit.storage import remove_leftovers
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / ".meta.json.0f.tmp").touch()
        >>> remove_leftovers(folder)
        >>> list(folder.iterdir())
        []
    """
    for leftover in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def describe_kind(path: str | os.PathLike[str]) -> str:
    """Describe what stands at a path, for messages.

    Args:
        path: any path.

    Returns:
        "nothing there", "a folder", "a file" or "neither a file nor a folder".

    Example:
        >>> from genkit.storage import describe_kind
        >>> describe_kind("no/such/path")
        'nothing there'
    """
    path = Path(path)
    if not path.exists():
        return "nothing there"
    if path.is_dir():
        return "a folder"
    if path.is_file():
        return "a file"
    return "neither a file nor a folder"


def check_writable(folder: str | os.PathLike[str], name: str = "folder") -> None:
    """Refuse a folder in which no file could be made, before any work is done for it. Creates nothing.

    Args:
        folder: a folder, which need not exist yet.
        name: what the message calls it.

    Raises:
        ValueError: if it is no folder, or the system would refuse to write there.

    Example:
        >>> import tempfile
        >>> from genkit.storage import check_writable
        >>> check_writable(tempfile.mkdtemp())
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{name}` must be a folder; got `{folder}`, which is {describe_kind(folder)}.")
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"`{name}` must be a folder that can be written; got `{folder}`, and `{parent}` refuses.")


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for one writer: a second one is told who has it.

    The lock is advisory and ends with the process, however it ends. Folders that were made for the lock and stayed
    empty are removed again.

    Args:
        folder: the folder; made where there is none.

    Yields:
        Nothing.

    Raises:
        ValueError: if another writer has the folder.

    Example:
        >>> import pathlib, tempfile
        >>> from genkit.storage import lock_folder
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "run"
        >>> with lock_folder(folder):
        ...     sorted(path.name for path in folder.iterdir())
        ['.lock']
        >>> folder.exists()
        False
    """
    folder = Path(folder)
    made = _make_folders(folder)
    descriptor = _open_locked(folder)
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
            yield
        finally:
            # Unlinked while it is still held: who opens the path later makes a file of their own.
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
    finally:
        os.close(descriptor)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were made, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(error.errno or errno.EIO, f"could not make `{folder}`: {error.strerror}") from error
    return missing


def _open_locked(folder: Path) -> int:
    """Open and lock the lock file of a folder; returns its descriptor."""
    while True:
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise SaveError(error.errno or errno.EIO, f"could not write to `{folder}`: {error.strerror}") from error
        try:
            _acquire(descriptor, folder)
        except BaseException:
            os.close(descriptor)
            raise
        if fcntl is None or os.fstat(descriptor).st_nlink > 0:
            return descriptor
        # The former holder removed the file between our opening and our locking it: open the new one.
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # File systems without locks (some network mounts) answer with another error: go on as before.
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return
        raise ValueError(f"`{folder}` is being written by {_holder(descriptor)}; take another folder.") from None


def _holder(descriptor: int) -> str:
    """Process and host that hold a lock, as they wrote them down."""
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(facts['pid'])} on {str(facts['host'])!r}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
