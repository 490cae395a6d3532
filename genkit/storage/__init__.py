"""Files that are whole or absent: atomic writes, checksummed arrays, archives of draws, run folders."""

from typing import TYPE_CHECKING

from genkit._core._lazy import attach as _attach
from genkit.storage._archives import read_archive as read_archive, write_archive as write_archive
from genkit.storage._files import (
    CorruptFileError as CorruptFileError,
    Json as Json,
    SaveError as SaveError,
    atomic_file as atomic_file,
    atomic_write as atomic_write,
    check_writable as check_writable,
    describe_kind as describe_kind,
    lock_folder as lock_folder,
    remove_leftovers as remove_leftovers,
)
from genkit.storage._layout import Stored as Stored, inspect_arrays as inspect_arrays, is_array_file as is_array_file
from genkit.storage._runs import (
    RunFiles as RunFiles,
    fingerprint as fingerprint,
    is_run as is_run,
    read_meta as read_meta,
    same_program as same_program,
    write_meta as write_meta,
)


if TYPE_CHECKING:
    from genkit.storage._arrays import (
        hash_tree as hash_tree,
        load_arrays as load_arrays,
        read_arrays as read_arrays,
        restore as restore,
        save_arrays as save_arrays,
    )


# These work on pytrees and need JAX; everything above reads and checks files without it.
_PYTREES = ("hash_tree", "load_arrays", "read_arrays", "restore", "save_arrays")

__getattr__, __dir__ = _attach(__name__, dict.fromkeys(_PYTREES, "genkit.storage._arrays"))
