"""Definition files: Python files that bind one thing under a known name, run by path and never imported."""

import dataclasses
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Key

from genkit.inference import Posterior, Problem
from genkit.sampling import AbstractSampler, Table
from genkit.training import Recipe, Source


class DefinitionError(ValueError):
    """A definition file cannot be run, or does not bind what it must."""


@runtime_checkable
class Method(Protocol):
    """Anything that `gk.infer` can run on a problem.

    Example:
        >>> import genkit as gk
        >>> isinstance(gk.mcmc.NUTS(10, 10), gk.io.Method), isinstance("nuts", gk.io.Method)
        (True, False)
    """

    def run(self, problem: Problem, *, key: Key[Array, ""]) -> Posterior:
        """Condition the problem on its data.

        Args:
            problem: model and data.
            key: typed PRNG key.

        Returns:
            The posterior.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Definition:
    """A definition file that was run.

    Args:
        path: the file.
        text: its bytes, those that were run.
        kind: the name it binds: `recipe`, `problem` or `sampler`.
        value: the object under that name; a recipe knows the file as its `source`.
        needs: the runs its `build` takes: name to the definition file of a suitable one.
        doc: its docstring.
    """

    path: Path
    text: bytes
    kind: str
    value: Any
    needs: dict[str, str]
    doc: str


def _is_recipe(thing: object) -> bool:
    return isinstance(thing, Recipe)


def _is_problem(thing: object) -> bool:
    return isinstance(thing, Problem)


def _is_sampler(thing: object) -> bool:
    if isinstance(thing, (AbstractSampler, Table)):
        return True
    # A class has `run` too, and cannot run.
    return isinstance(thing, Method) and not isinstance(thing, type)


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "recipe": (_is_recipe, "a gk.Recipe"),
    "problem": (_is_problem, "a gk.Problem"),
    "sampler": (_is_sampler, "a sampler for gk.sample or a method for gk.infer"),
}


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs bytes that were read once, past Python's bytecode cache: what is run is what is copied into a run folder."""

    def __init__(self, name: str, path: str, text: bytes):
        super().__init__(name, path)
        self.text = text

    def get_data(self, path: str) -> bytes:
        return self.text

    def path_stats(self, path: str) -> dict[str, float]:
        raise OSError("no bytecode cache")

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        return None


def load_definition(path: str | os.PathLike[str], kinds: tuple[str, ...] = tuple(_KINDS)) -> Definition:
    """Run a definition file and take the object it binds.

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
        folder = ": it is a folder" if path.is_dir() else ""
        raise FileNotFoundError(f"no definition file at `{path}`{folder}")
    if path.suffix != ".py":
        raise DefinitionError(f"`{path}` must be a Python file; its name does not end in .py.")
    # Read once: what is run is what a run folder gets a copy of.
    text = path.read_bytes()
    names = _run(path, text)
    kind = _bound(path, names, kinds)
    value = names[kind]
    if kind == "recipe":
        value = value.replace(source=Source(str(path), text))
    return Definition(path, text, kind, value, _needs(path, names), str(names.get("__doc__") or ""))


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
    # `sys.exit` in a definition would end the process without a word; a Ctrl-C must still end it.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise DefinitionError(_failure(path, error)) from error
    except BaseException:
        del sys.modules[name]
        raise
    return vars(module)


def _failure(path: Path, error: BaseException) -> str:
    """Where a definition file failed and why, in one line."""
    if isinstance(error, (SyntaxError, UnicodeDecodeError)) or "null bytes" in str(error):
        return _syntax_failure(path, error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else f"{path}"
    if isinstance(error, SystemExit):
        return f"{where}: it calls sys.exit({error.code!r}), which would end the program; a definition only defines."
    return f"{where}: {type(error).__name__}: {error}"


def _syntax_failure(path: Path, error: BaseException) -> str:
    """Failure of the parser; bytes that are no text have no line to point at."""
    if not isinstance(error, SyntaxError) or error.lineno is None or "null bytes" in str(error):
        return f"{path} is not a Python text file ({error})."
    line = f" in `{error.text.strip()}`" if error.text else ""
    return f"{error.filename or path}, line {error.lineno}: {error.msg}{line}"


def _bound(path: Path, names: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """The one name of `kinds` that is bound, to a value of the right type."""
    found = [kind for kind in _KINDS if kind in names]
    suitable = [kind for kind in found if kind in kinds]
    if len(suitable) != 1:
        raise DefinitionError(_not_one(path, names, kinds, found))
    kind = suitable[0]
    fits, expected = _KINDS[kind]
    if not fits(names[kind]):
        raise DefinitionError(f"{path} must bind `{kind}` to {expected}; found: {_article(names[kind])}.")
    return kind


def _not_one(path: Path, names: dict[str, Any], kinds: tuple[str, ...], found: list[str]) -> str:
    """Error text for a file that binds none or several of the names."""
    wanted = " or ".join(f"`{kind}` ({_KINDS[kind][1]})" for kind in kinds)
    if len(found) > 1:
        several = " and ".join(f"`{kind}`" for kind in found)
        return f"{path} must bind exactly one of {wanted}; found: {several}."
    # What the file does bind tells most mistakes: a wrong name, or nothing at all.
    public = [
        f"{name} ({_article(value)})"
        for name, value in names.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    return f"{path} must bind {wanted}; found: {', '.join(public[:8]) or 'nothing'}."


def _article(value: object) -> str:
    """Type of a value with its article, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if name[:1].lower() in "aeiou":
        return f"an {name}"
    return f"a {name}"


def _needs(path: Path, names: dict[str, Any]) -> dict[str, str]:
    needs = names.get("needs", {})
    # Names become keyword arguments of `build`.
    texts = isinstance(needs, dict) and all(isinstance(x, str) and x for pair in needs.items() for x in pair)
    if not texts or not all(name.isidentifier() for name in needs):
        raise DefinitionError(f"{path} must bind `needs` to a dict of names and definition files; found: {needs!r}.")
    return dict(needs)
