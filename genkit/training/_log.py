"""The log of a training: every step in memory, one JSON line per compiled call on disk."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from genkit.storage import Json, atomic_write


class History:
    """Metrics of every step so far, in pieces that are joined when asked for."""

    def __init__(self, columns: Mapping[str, np.ndarray] | None = None):
        self._pieces = []
        if columns:
            self._pieces.append(dict(columns))

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Append the metrics of some steps, arrays of equal length."""
        self._pieces.append(dict(metrics))

    def cut(self, steps: int) -> None:
        """Keep the first `steps` entries."""
        self._pieces = [{name: values[:steps] for name, values in self.arrays().items()}]

    def arrays(self) -> dict[str, np.ndarray]:
        """All metrics by name, one entry per step; NaN where a step did not have the metric."""
        names = dict.fromkeys(name for piece in self._pieces for name in piece)
        joined = {}
        if not names:
            return joined
        for name in names:
            joined[name] = np.concatenate([_column(piece, name) for piece in self._pieces])
        # Joined once, not at every look.
        self._pieces = [joined]
        return joined


def _column(piece: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name in piece:
        return piece[name]
    return np.full(len(next(iter(piece.values()))), np.nan, np.float32)


def append_line(path: Path, line: Json) -> None:
    """Add one JSON line to a log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def summary_line(metrics: Mapping[str, np.ndarray], step: int, seconds: float) -> Json:
    """The line for some steps: how many are done, seconds of this session, the mean of every metric."""
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in metrics.items()}
    return {"step": step, "seconds": round(seconds, 3), **means}


def cut_log(path: Path, step: int) -> None:
    """Drop the lines past `step` and a last one that was cut: they belong to work that is done again."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            past = line["step"] > step
        except (ValueError, KeyError, TypeError):
            break
        if past:
            break
        kept.append(text + "\n")
    atomic_write(path, "".join(kept))
