"""Run folders as files: their names, their facts, and what binds them together. Reading them needs no JAX.

definition.py   the definition file, word for word (absent for a recipe that came from no file)
meta.json       versions, seed, steps, hash of the data, hashes of the needed runs; checksummed
state.gk        the checkpoint: model, optimizer states, moving average, log of every step
log.jsonl       one line per compiled call
needs/NAME/     the needed runs, copied
"""

import ast
import dataclasses
import hashlib
import json
import os
from pathlib import Path

from genkit.storage._files import CorruptFileError, Json, atomic_write, describe_kind
from genkit.storage._layout import Stored, inspect_arrays


META_FORMAT = 2
# Facts that differ between trainings. The definition file may gain comments on resuming, so its hash is not one.
_IDENTITY = ("key", "data")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """Paths of the files in a run folder.

    Args:
        folder: the run folder.

    Example:
        >>> from genkit.storage import RunFiles
        >>> RunFiles("runs/digits").state.name
        'state.gk'
    """

    folder: str | os.PathLike[str]

    @property
    def definition(self) -> Path:
        """Copy of the definition file."""
        return Path(self.folder) / "definition.py"

    @property
    def meta(self) -> Path:
        """Facts about the run."""
        return Path(self.folder) / "meta.json"

    @property
    def state(self) -> Path:
        """Last checkpoint."""
        return Path(self.folder) / "state.gk"

    @property
    def log(self) -> Path:
        """One JSON line per compiled call."""
        return Path(self.folder) / "log.jsonl"

    @property
    def needs(self) -> Path:
        """Folder of the copies of needed runs."""
        return Path(self.folder) / "needs"

    def was_edited(self, meta: Json) -> bool:
        """Tell whether the copy of the definition file differs from the one the run was started with."""
        if meta["definition"] is None or not self.definition.is_file():
            return False
        return hashlib.sha256(self.definition.read_bytes()).hexdigest() != meta["definition"]

    def check_needs(self, meta: Json) -> None:
        """Refuse copies of needed runs whose checkpoints are not those that the run was trained with."""
        for name, need in meta["needs"].items():
            state = RunFiles(self.needs / name).state
            if not state.is_file():
                raise CorruptFileError(state, "it is missing, and the run needs it")
            if hashlib.sha256(state.read_bytes()).hexdigest() != need["sha256"]:
                raise CorruptFileError(state, "it is not the checkpoint that the run was trained with")

    def check_state(self, stored: Stored, meta: Json) -> None:
        """Refuse a checkpoint that belongs to another run."""
        key = stored.meta.get("key", meta["key"])
        run = stored.meta.get("run", fingerprint(meta))
        if key != meta["key"] or run != fingerprint(meta):
            raise CorruptFileError(self.state, f"it belongs to another run than `{self.meta}`")

    def inspect(self) -> tuple[Json, Stored]:
        """Read the facts of the run and verify its checkpoint, without building arrays."""
        meta = read_meta(self.folder)
        if not self.state.is_file():
            raise FileNotFoundError(f"`{self.folder}` holds no checkpoint yet: it has no {self.state.name}.")
        stored = inspect_arrays(self.state)
        self.check_state(stored, meta)
        return meta, stored


def is_run(path: str | os.PathLike[str]) -> bool:
    """Tell whether a training has written to a folder.

    Args:
        path: any path.

    Returns:
        True if it holds the facts or the checkpoint of a run.

    Example:
        >>> from genkit.storage import is_run
        >>> is_run("no/such/folder")
        False
    """
    files = RunFiles(path)
    return files.meta.is_file() or files.state.is_file()


def read_meta(run: str | os.PathLike[str]) -> Json:
    """Read the facts of a run folder and verify their checksum.

    Args:
        run: the folder.

    Returns:
        The facts.

    Raises:
        FileNotFoundError: if it is no run folder.
        CorruptFileError: if the facts were damaged or edited.

    Example:
        >>> import tempfile
        >>> from genkit.storage import read_meta, write_meta
        >>> run = tempfile.mkdtemp()
        >>> write_meta(run, {"seed": 3})
        >>> read_meta(run)["seed"]
        3
    """
    path = RunFiles(run).meta
    if not path.is_file():
        raise FileNotFoundError(f"`{run}` is not a run folder: it has no {path.name} ({describe_kind(run)}).")
    text = path.read_bytes()
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise CorruptFileError(path, f"it is not JSON ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != META_FORMAT:
        raise CorruptFileError(path, f"it does not say `format: {META_FORMAT}`")
    # Compared as text: a bit that JSON does not mind is a damaged bit all the same.
    if text != _dump(_signed(meta)):
        raise CorruptFileError(path, "it does not match its checksum")
    return meta


def write_meta(run: str | os.PathLike[str], meta: Json) -> None:
    """Write the facts of a run folder with their checksum.

    Args:
        run: the folder, which must exist.
        meta: the facts, JSON.

    Raises:
        SaveError: if the system refuses.

    Example:
        >>> import pathlib, tempfile
        >>> from genkit.storage import write_meta
        >>> run = pathlib.Path(tempfile.mkdtemp())
        >>> write_meta(run, {"seed": 3})
        >>> "sha256" in (run / "meta.json").read_text()
        True
    """
    atomic_write(RunFiles(run).meta, _dump(_signed(meta)))


def _signed(meta: Json) -> Json:
    """The facts with their format and the checksum of everything else."""
    facts = {name: value for name, value in meta.items() if name not in ("format", "sha256")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"format": META_FORMAT, **facts, "sha256": digest}


def _dump(meta: Json) -> bytes:
    return (json.dumps(meta, indent=2) + "\n").encode()


def fingerprint(meta: Json) -> str:
    """Compute a hash that tells trainings apart: of their key, data and needed runs.

    Args:
        meta: the facts of a run.

    Returns:
        SHA-256 in hexadecimal.

    Example:
        >>> from genkit.storage import fingerprint
        >>> fingerprint({"key": 0, "needs": {}}) == fingerprint({"key": 1, "needs": {}})
        False
    """
    facts = [meta.get(name) for name in _IDENTITY]
    needs = {name: need["sha256"] for name, need in meta["needs"].items()}
    return hashlib.sha256(json.dumps([facts, needs], sort_keys=True).encode()).hexdigest()


def same_program(first: bytes, second: bytes) -> bool:
    r"""Tell whether two Python files are equal but for comments and layout.

    Args:
        first: the bytes of one file.
        second: the bytes of the other.

    Returns:
        True if they parse to the same syntax tree; files that do not parse are compared byte by byte.

    Example:
        >>> from genkit.storage import same_program
        >>> same_program(b"x = 1", b"# one\nx  =  1")
        True
    """
    if first == second:
        return True
    try:
        return ast.dump(ast.parse(first)) == ast.dump(ast.parse(second))
    except (SyntaxError, ValueError):
        return False
