"""Definition files: Python files that bind one thing under a known name, run by path and never imported."""

import dataclasses
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _core
from .._core._objective import Problem, Recipe
from .._core._run import Source


class DefinitionError(ValueError):
    """A definition file cannot be run, or does not bind what it must."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """A definition file that was run.

    Args:
        path: the file.
        text: its bytes, those that were run.
        kind: the name it binds: `recipe`, `problem` or `sampler`.
        value: what stands under that name; a recipe knows the file as its `source`.
        needs: the runs its `build` takes: name to the definition file of a suitable one.
        doc: its docstring.
    """

    path: Path
    text: bytes
    kind: str
    value: Any
    needs: dict[str, str]
    doc: str


def _is_sampler(thing: Any) -> bool:
    bases = tuple(base for name in ("AbstractSampler", "Table") if (base := getattr(_core, name, None)))
    return isinstance(thing, bases) or (callable(getattr(thing, "run", None)) and not isinstance(thing, type))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "recipe": (lambda thing: isinstance(thing, Recipe), "a gk.Recipe"),
    "problem": (lambda thing: isinstance(thing, Problem), "a gk.Problem"),
    "sampler": (_is_sampler, "a sampler for gk.sample or a method for gk.infer"),
}


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs bytes that were read once, past Python's bytecode cache: what is run is what is copied into a run folder."""

    def __init__(self, name: str, path: str, text: bytes):
        super().__init__(name, path)
        self.text = text

    def get_data(self, path: str) -> bytes:
        return self.text

    def path_stats(self, path: str) -> Any:
        raise OSError("no bytecode cache")

    def set_data(self, path: str, data: Any, **kwargs: Any) -> None:
        return None


def load_definition(path: str | os.PathLike[str], kinds: tuple[str, ...] = tuple(_KINDS)) -> Definition:
    """Run a definition file and take what it binds.

    Running a file executes it: load only files you trust.

    Args:
        path: the file, ending in `.py`.
        kinds: the names it may bind, of `recipe`, `problem` and `sampler`; it must bind exactly one of them.

    Returns:
        The definition.

    Raises:
        FileNotFoundError: if there is no such file.
        DefinitionError: if it fails, or binds none or several of the names, or something of another type.

    Example:
        >>> import pathlib, tempfile
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "coin.py"
        >>> _ = path.write_text("import genkit as gk; problem = gk.Problem(lambda: None)")
        >>> gk.io.load_definition(path).kind
        'problem'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no definition file at `{path}`" + (": it is a folder" if path.is_dir() else ""))
    if path.suffix != ".py":
        raise DefinitionError(f"`{path}` must be a Python file; its name does not end in .py.")
    text = path.read_bytes()
    names = _run(path, text)
    kind = _bound(path, names, kinds)
    value = names[kind]
    if kind == "recipe":
        value = value.replace(source=Source(str(path), text))
    return Definition(path, text, kind, value, _needs(path, names), names.get("__doc__") or "")


def _run(path: Path, text: bytes) -> dict[str, Any]:
    """The names that a file binds when it is run as a module under a private name."""
    name = f"_genkit_definition_{path.stem}_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_loader(name, _Loader(name, str(path), text))
    assert spec is not None, "a loader was given"
    assert spec.loader is not None, "a loader was given"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and type hints look their module up by name, also later: it stays there.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise DefinitionError(_failure(path, error)) from error
    except BaseException:
        del sys.modules[name]
        raise
    return vars(module)


def _failure(path: Path, error: Exception) -> str:
    """Where a definition file failed and why, in one line."""
    if isinstance(error, SyntaxError):
        line = f" in `{error.text.strip()}`" if error.text else ""
        return f"{error.filename or path}, line {error.lineno}: {error.msg}{line}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f", line {lines[-1]}" if lines else ""
    return f"{path}{where}: {type(error).__name__}: {error}"


def _bound(path: Path, names: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """The one name of `kinds` that is bound, to a value of the right type."""
    there = [kind for kind in _KINDS if kind in names]
    wanted = " or ".join(f"`{kind}` ({_KINDS[kind][1]})" for kind in kinds)
    if len([kind for kind in there if kind in kinds]) != 1:
        public = {n: v for n, v in names.items() if not n.startswith("_") and type(v).__name__ != "module"}
        found = ", ".join(f"{name} ({_article(value)})" for name, value in list(public.items())[:8])
        if len(there) > 1:
            found = " and ".join(f"`{kind}`" for kind in there)
        one = "exactly one of " if len(there) > 1 else ""
        raise DefinitionError(f"{path} must bind {one}{wanted}; found: {found or 'nothing'}.")
    kind = next(kind for kind in there if kind in kinds)
    fits, expected = _KINDS[kind]
    if not fits(names[kind]):
        raise DefinitionError(f"{path} must bind `{kind}` to {expected}; found: {_article(names[kind])}.")
    return kind


def _article(value: Any) -> str:
    name = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return name if isinstance(value, type) else f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _needs(path: Path, names: dict[str, Any]) -> dict[str, str]:
    needs = names.get("needs", {})
    texts = isinstance(needs, dict) and all(isinstance(x, str) and x for pair in needs.items() for x in pair)
    if not texts or not all(name.isidentifier() for name in needs):
        raise DefinitionError(f"{path} must bind `needs` to a dict of names and definition files; found: {needs!r}.")
    return dict(needs)
