"""`genkit info`: what a path holds, without running anything and without JAX."""

import ast
import hashlib
import json
from argparse import Namespace
from pathlib import Path

from genkit.cli._text import printable
from genkit.storage import (
    CorruptFileError,
    Json,
    RunFiles,
    Stored,
    describe_kind,
    inspect_arrays,
    is_array_file,
    is_run,
    read_archive,
)


def run(args: Namespace) -> int:
    """Print what `args.path` holds, after verifying every checksum there is.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    path = Path(args.path)
    if is_run(path):
        lines = _run_lines(RunFiles(path))
    elif not path.is_file():
        raise FileNotFoundError(f"`{path}` is neither a run folder nor a file ({describe_kind(path)}).")
    elif path.suffix == ".py":
        lines = _definition_lines(path)
    elif path.suffix == ".npz":
        lines = _archive_lines(path)
    elif is_array_file(path):
        lines = _array_lines(inspect_arrays(path))
    else:
        raise CorruptFileError(path, "it is none of the files that genkit writes")
    print(printable("\n".join(lines)))
    return 0


def _run_lines(files: RunFiles) -> list[str]:
    meta, stored = files.inspect()
    title = f"run {files.folder}"
    if meta["name"]:
        title += f": {meta['name']}"
    return [
        title,
        f"steps: {stored.meta['steps']} of {meta['num_steps']}",
        f"seed: {meta['seed']}",
        f"definition: {_origin(files, meta)}",
        *(f"needs {name}: {need['path']} (copy in {files.needs / name})" for name, need in meta["needs"].items()),
        f"created: {meta['created']} on {meta['device']}, Python {meta['python']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        *_array_lines(stored, "['state'].model"),
    ]


def _origin(files: RunFiles, meta: Json) -> str:
    if meta["definition"] is None or not files.definition.is_file():
        return "none: trained from Python"
    if files.was_edited(meta):
        return f"{meta['definition_path']} (the copy in the run was altered since)"
    return str(meta["definition_path"])


def _array_lines(stored: Stored, prefix: str = "") -> list[str]:
    lines = []
    for path, entry in stored.headers.items():
        if path.startswith(prefix) and "shape" in entry:
            # Typed keys have an implementation instead of a dtype.
            dtype = entry.get("dtype", f"key<{entry.get('impl')}>")
            lines.append(f"  {path[len(prefix) :] or 'value'}: {dtype}{entry['shape']}")
    return [f"arrays: {len(lines)}, checksums right", *lines]


def _archive_lines(path: Path) -> list[str]:
    # Reading compares every member's checksum.
    arrays, _ = read_archive(path)
    lines = [f"{name}: {array.dtype}{list(array.shape)}" for name, array in arrays.items()]
    facts = path.with_suffix(".json")
    if facts.is_file():
        lines.append(_facts_line(path, facts))
    return lines


def _facts_line(path: Path, facts: Path) -> str:
    """Say whether the facts beside an archive are those of its draws: a kill between the two files parts them."""
    try:
        digest = json.loads(facts.read_bytes())["draws"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"{facts.name}: not facts about draws"
    if digest == hashlib.sha256(path.read_bytes()).hexdigest():
        return f"{facts.name}: facts about these draws"
    return f"{facts.name}: facts about OTHER draws"


def _definition_lines(path: Path) -> list[str]:
    # Parsed and not run: the docstring and the names it binds are all that is needed.
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        if error.lineno is None:
            raise ValueError(f"{path} is not a Python text file ({error.msg}).") from None
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a Python text file ({error}).") from None
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    bound = [name for name in ("recipe", "problem", "sampler") if name in names]
    doc = ast.get_docstring(tree) or ""
    return [f"definition file {path}: binds {' and '.join(bound) or 'none of recipe, problem, sampler'}", doc]
