"""Memory that a dense computation would take, estimated before it is begun."""

import os

from genkit._core._checks import check


def check_bytes(name: str, num_bytes: int, what: str, hint: str) -> None:
    """Refuse a computation that would take more memory than the machine has."""
    total = _total_bytes()
    if total is None or num_bytes <= total:
        return
    expected = f"few enough for the {total / 1e9:.0f} GB of memory of this machine"
    check(False, name, expected, f"{what}: about {num_bytes / 1e9:.0f} GB", hint)


def _total_bytes() -> int | None:
    """Physical memory of this machine, or `None` where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
