"""`genkit info`: what a path holds, without running anything."""

import ast
import hashlib
from argparse import Namespace
from pathlib import Path

from .._core._files import CorruptFileError, describe_kind
from .._core._run import DEFINITION, NEEDS, is_run, read_meta, read_state
from .._core._store import Stored, is_array_file, read_arrays
from ..io import load_draws


def run(args: Namespace) -> int:
    """Print what `args.path` holds, after verifying every checksum there is.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    path = Path(args.path)
    if is_run(path):
        lines = _run_lines(path)
    elif not path.is_file():
        raise FileNotFoundError(f"`{path}` is neither a run folder nor a file ({describe_kind(path)}).")
    elif path.suffix == ".py":
        lines = _definition_lines(path)
    elif path.suffix == ".npz":
        lines = [f"{name}: {array.dtype}{list(array.shape)}" for name, array in load_draws(path).items()]
    elif is_array_file(path):
        lines = _array_lines(read_arrays(path))
    else:
        raise CorruptFileError(path, "it is none of the files that genkit writes")
    print("\n".join(lines))
    return 0


def _run_lines(run: Path) -> list[str]:
    meta, stored = read_meta(run), read_state(run)
    definition = run / DEFINITION
    if definition.is_file() and meta["definition"] is not None:
        altered = hashlib.sha256(definition.read_bytes()).hexdigest() != meta["definition"]
        origin = f"{meta['definition_path']}" + (" (the copy in the run was altered since)" if altered else "")
    else:
        origin = "none: trained from Python"
    return [
        f"run {run}" + (f": {meta['name']}" if meta["name"] else ""),
        f"steps: {stored.meta['steps']} of {meta['num_steps']}",
        f"seed: {meta['seed']}",
        f"definition: {origin}",
        *(f"needs {name}: {need['path']} (copy in {run / NEEDS / name})" for name, need in meta["needs"].items()),
        f"created: {meta['created']} on {meta['device']}, Python {meta['python']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        *_array_lines(stored, "['state'].model"),
    ]


def _array_lines(stored: Stored, prefix: str = "") -> list[str]:
    entries = [entry for path, entry in stored.headers.items() if path.startswith(prefix) and "shape" in entry]
    kind = lambda entry: entry.get("dtype", f"key<{entry.get('impl')}>")
    named = [f"  {entry['path'][len(prefix) :] or 'value'}: {kind(entry)}{entry['shape']}" for entry in entries]
    return [f"arrays: {len(entries)}, checksums right", *named]


def _definition_lines(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"{path}{line}: {getattr(error, 'msg', error)}") from None
    names = [
        target.id
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    ]
    bound = [name for name in ("recipe", "problem", "sampler") if name in names]
    doc = ast.get_docstring(tree)
    return [f"definition file {path}: binds {' and '.join(bound) or 'none of recipe, problem, sampler'}", doc or ""]
