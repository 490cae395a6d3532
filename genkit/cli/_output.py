"""Where results go: looked at before any work is done, and never lost."""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from genkit.storage import SaveError, check_writable


def check_output(folder: Path) -> None:
    """Refuse an output folder that could not be written, before the work whose results it shall hold.

    Args:
        folder: a folder, which need not exist.

    Raises:
        ValueError: if it is no folder, or the system refuses.
    """
    check_writable(folder, "out")


def write_results(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write results; where that fails, write them beside the system's temporary files and tell where.

    Args:
        folder: where they shall go; made where there is none.
        write: writes them into a folder that exists.

    Returns:
        The folder that holds them.

    Raises:
        SaveError: if neither could be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        return folder
    except OSError as error:
        failure = error
    # The disk may have become full, or read-only, while the work was done.
    rescued = Path(tempfile.mkdtemp(prefix="genkit-"))
    try:
        write(rescued)
    except OSError:
        # A full disk leaves nothing behind.
        for path in rescued.iterdir():
            path.unlink()
        with contextlib.suppress(OSError):
            rescued.rmdir()
        raise failure from None
    sys.stderr.write(f"genkit: {SaveError(str(failure))}\ngenkit: the results are in {rescued} instead\n")
    return rescued
