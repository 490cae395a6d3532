"""Rules that no linter knows: ceilings and counts, abstract or final, documentation, imports, the tree."""

import abc
import ast
import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import pytest

import genkit


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "genkit"
MAX_FILE = 500
MAX_ZOO_FILE = 150
MAX_FUNCTION = 80
MAX_ARGUMENTS = 8
TOP_LEVEL = {
    ".ci", ".git", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
    "LICENSE", "README.md", "docs", "examples", "genkit", "models", "pyproject.toml", "samplers", "tests",
}  # fmt: skip
# Deserializers that run code, and ways out of the process.
BANNED_MODULES = {
    "cloudpickle", "dill", "equinox.internal", "http", "jax._src", "joblib", "marshal", "pickle", "requests", "shelve",
    "socket", "urllib",
}  # fmt: skip
BANNED_CALLS = {"__import__", "compile", "eval", "exec", "input", "breakpoint"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tracked() -> list[Path]:
    """Every file of the project that git knows or would add; outside a clone, every file."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listing.stdout.splitlines() if listing.returncode == 0 else [p.relative_to(ROOT) for p in ROOT.rglob("*")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def sources(*folders: str) -> list[Path]:
    return sorted(p for p in tracked() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in folders)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(parse(path)) if isinstance(node, Function))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every absolute module or module.name that `path` imports."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def fail_with(complaints: list[str]) -> None:
    assert not complaints, "\n" + "\n".join(complaints)


# Ceilings and counts.


def test_files_have_a_ceiling():
    sizes = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources("genkit", "models", "samplers")
    }
    limit = {path: MAX_FILE if path.is_relative_to(PACKAGE) else MAX_ZOO_FILE for path in sizes}
    fail_with([f"{p.relative_to(ROOT)}: {n} lines, at most {limit[p]}" for p, n in sizes.items() if n > limit[p]])


def length(node: Function) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    return (node.end_lineno or node.lineno) - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)


def test_functions_have_a_ceiling():
    fail_with(
        [
            f"{place(path, node)} {node.name}: {length(node)} lines, at most {MAX_FUNCTION}"
            for path in sources("genkit", "models", "samplers")
            for node in functions(path)
            if length(node) > MAX_FUNCTION
        ]
    )


def test_positional_arguments_have_a_ceiling():
    complaints = []
    for path in sources("genkit", "models", "samplers"):
        for node in functions(path):
            names = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            if len(names) > MAX_ARGUMENTS:
                complaints.append(f"{place(path, node)} {node.name}: {len(names)} positional arguments")
    for name, thing in public_objects():
        if inspect.isclass(thing) and issubclass(thing, eqx.Module):
            kinds = [p.kind for p in inspect.signature(thing).parameters.values()]
            if kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) > MAX_ARGUMENTS:
                complaints.append(f"{name}: more than {MAX_ARGUMENTS} positional fields (make some `kw_only`)")
    fail_with(complaints)


# Signs of code that was compressed to fit a limit, per 1,000 lines of code; what well-read libraries of the field have
# is well below each aim.
AIMS = {"packed assignments": 5.0, "named lambdas": 1.5, "conditional expressions": 12.0, "attribute probes": 2.0}
MAX_ANY = 0.04
# On the way to .05: raised as submodules are read again (sde, vi, inference, sampling and training are left).
MIN_COMMENTS = 0.034


def counts(paths: list[Path]) -> dict[str, int]:
    """Numbers of the constructs in `AIMS`, of arguments annotated `Any`, and of lines of code and of comment."""
    found = dict.fromkeys([*AIMS, "arguments", "arguments annotated Any", "code", "comments"], 0)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for path in paths:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        comments = sum(line.startswith("#") for line in lines)
        docs = 0
        for node in ast.walk(parse(path)):
            if isinstance(node, documented) and ast.get_docstring(node):
                docs += (ast.get_docstring(node, clean=False) or "").count("\n") + 1
            for name in kinds(node):
                found[name] += 1
        found["comments"] += comments
        found["code"] += sum(line != "" for line in lines) - comments - docs
    return found


def kinds(node: ast.AST) -> Iterator[str]:
    """Names of the counted constructs that a node is one of."""
    if isinstance(node, ast.Assign):
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield "packed assignments"
        if isinstance(node.value, ast.Lambda):
            yield "named lambdas"
    elif isinstance(node, ast.IfExp):
        yield "conditional expressions"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        yield "attribute probes"
    elif isinstance(node, ast.arg):
        yield "arguments"
        if isinstance(node.annotation, ast.Name) and node.annotation.id == "Any":
            yield "arguments annotated Any"


@pytest.mark.parametrize("aim", [*AIMS, "Any", "comments"])
def test_code_is_not_compressed(aim):
    found = counts(sources("genkit", "models", "samplers"))
    if aim == "Any":
        assert found["arguments annotated Any"] / found["arguments"] < MAX_ANY
    elif aim == "comments":
        assert found["comments"] / found["code"] >= MIN_COMMENTS
    else:
        assert 1_000 * found[aim] / found["code"] < AIMS[aim]


# Modules: abstract or final.


@functools.cache
def modules() -> list[types.ModuleType]:
    names = [info.name for info in pkgutil.walk_packages(genkit.__path__, "genkit.") if "__main__" not in info.name]
    return [genkit, *map(importlib.import_module, names)]


@functools.cache
def classes() -> list[type]:
    found = {
        thing
        for module in modules()
        for thing in vars(module).values()
        if inspect.isclass(thing) and thing.__module__.partition(".")[0] == "genkit"
    }
    return sorted(found, key=lambda c: (c.__module__, c.__qualname__))


def is_abstract(cls: type) -> bool:
    return cls.__name__.startswith("Abstract") or inspect.isabstract(cls) or bool(getattr(cls, "__abstractvars__", ()))


def title(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# Records of results that other results extend by fields of their own, and by nothing else.
EXTENDED_RECORDS = {"genkit.training._fitted.Fitted"}


def test_modules_are_abstract_or_final():
    everyone = [cls for cls in classes() if issubclass(cls, eqx.Module)]
    fail_with(
        [
            f"{title(base)} can be instantiated, yet {title(cls)} derives from it"
            for cls in everyone
            for base in cls.__mro__[1:]
            if base in everyone and not is_abstract(base) and title(base) not in EXTENDED_RECORDS
        ]
    )


def implements(cls: type, name: str) -> bool:
    value = vars(cls).get(name)
    routine = isinstance(value, (property, classmethod, staticmethod)) or callable(value)
    return routine and not getattr(value, "__isabstractmethod__", False)


def test_defaults_are_overridden_at_most_once():
    """A final class may replace a default of its abstract base; no implementation is replaced in between."""
    complaints = []
    for cls in (c for c in classes() if issubclass(c, eqx.Module)):
        for name in vars(cls):
            if name.startswith("__") and name != "__call__":
                continue
            for base in cls.__mro__[1:]:
                ours = base.__module__.partition(".")[0] == "genkit"
                replaced = ours and implements(base, name) and callable(vars(cls)[name])
                if replaced and (is_abstract(cls) or not is_abstract(base)):
                    complaints.append(f"{title(cls)}.{name} overrides the implementation in {title(base)}")
    fail_with(complaints)


def test_names_say_which_classes_are_abstract():
    roots = {"Measure", "Denoiser", "Guidance", "Schedule", "Objective", "FDivergence", "Strategy", "Population"}
    roots |= {"StepTransform", "PredictionTransform"}
    fail_with(
        [
            f"{title(cls)}: is it abstract or not? The name says otherwise."
            for cls in classes()
            if issubclass(cls, eqx.Module)
            # An abstract base may have defaults for all that it declares; then its name alone says what it is.
            if not cls.__name__.startswith("Abstract")
            if inspect.isabstract(cls) != (cls.__name__ in roots)
            if not cls.__name__.startswith("_") and issubclass(type(cls), abc.ABCMeta)
        ]
    )


def test_numbers_users_sweep_are_leaves():
    # A plain Python float is a static value under `filter_jit`: every value of it would compile again.
    complaints = []
    for cls in (c for c in classes() if issubclass(c, eqx.Module)):
        for field in getattr(cls, "__dataclass_fields__", {}).values():
            numeric = field.type in (float, complex, "float", "complex", float | None)
            if numeric and not field.metadata.get("static") and "converter" not in field.metadata:
                complaints.append(f"{title(cls)}.{field.name}: give the float field a converter to an array")
    fail_with(complaints)


# The public surface.


@functools.cache
def namespaces() -> list[types.ModuleType]:
    subpackages = [info.name for info in pkgutil.iter_modules(genkit.__path__) if not info.name.startswith("_")]
    return [genkit, *(importlib.import_module(f"genkit.{name}") for name in subpackages)]


@functools.cache
def public_objects() -> list[tuple[str, object]]:
    """Every name of `genkit` and of its namespaces that users may call, with the object behind it."""
    found = []
    for module in namespaces():
        for name in dir(module):  # not `vars`: some names are imported on demand
            thing = getattr(module, name)
            ours = getattr(thing, "__module__", "").partition(".")[0] == "genkit"
            if not name.startswith("_") and ours and (inspect.isclass(thing) or callable(thing)):
                found.append((f"{module.__name__}.{name}", thing))
    return found


def section(docstring: str, name: str) -> str | None:
    """The body of a Google-style section, or `None`."""
    found = re.search(rf"^{name}:\n((?:(?:[ \t]+.*)?\n?)*)", inspect.cleandoc(docstring), re.MULTILINE)
    return found.group(1) if found else None


def described(docstring: str) -> set[str]:
    """Names described under `Args:`; `a, b: ...` describes both."""
    body = inspect.cleandoc(section(docstring, "Args") or "")
    heads = re.findall(r"^(\*{0,2}\w+(?:(?:, | / )\*{0,2}\w+)*)(?: \([^)]*\))?:", body, re.MULTILINE)
    return {name.lstrip("*") for head in heads for name in re.split(", | / ", head)}


def signature_names(thing: object) -> set[str]:
    if inspect.isclass(thing) and not (issubclass(thing, eqx.Module) or hasattr(thing, "__dataclass_fields__")):
        return set()
    parameters = inspect.signature(thing).parameters  # pyright: ignore[reportArgumentType]
    return {name for name in parameters if name not in ("self", "cls") and not name.startswith("_")}


def returns_something(thing: object) -> bool:
    annotation = getattr(thing, "__annotations__", {}).get("return", inspect.Parameter.empty)
    return inspect.isfunction(thing) and annotation is not None


def is_used(thing: object) -> bool:
    """Whether users call it; a record that they only read shows itself in the example of what returns it."""
    if not inspect.isclass(thing):
        return True
    return any(inspect.isroutine(v) for k, v in vars(thing).items() if not k.startswith("_") or k == "__call__")


def complaints_about(name: str, thing: object) -> list[str]:
    """What the docstring of a public function or class lacks."""
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if not own:
        return [f"{name}: no docstring"]
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or is_abstract(thing)):
        return []
    lacking = []
    lineage = [vars(base).get("__doc__") for base in thing.__mro__] if inspect.isclass(thing) else [own]
    explained = set().union(*(described(text) for text in lineage if text))
    if missing := signature_names(thing) - explained:
        lacking.append(f"{name}: `Args:` does not describe {', '.join(sorted(missing))}")
    if returns_something(thing) and section(own, "Returns") is None and section(own, "Yields") is None:
        lacking.append(f"{name}: no `Returns:`")
    if is_used(thing) and ">>>" not in (section(own, "Example") or section(own, "Examples") or ""):
        lacking.append(f"{name}: no `Example:` that runs")
    return lacking


def test_public_names_are_documented():
    once = {id(thing): (name, thing) for name, thing in reversed(public_objects())}.values()
    fail_with([line for name, thing in sorted(once) for line in complaints_about(name, thing)])


def test_public_methods_are_documented():
    complaints = []
    for name, cls in public_objects():
        if inspect.isclass(cls):
            for attribute, value in vars(cls).items():
                routine = inspect.isroutine(value) or isinstance(value, property)
                if routine and not attribute.startswith("_") and not inspect.getdoc(getattr(cls, attribute)):
                    complaints.append(f"{name}.{attribute}: no docstring")
    fail_with(complaints)


def test_keys_are_keyword_only():
    complaints = []
    for name, thing in public_objects():
        if not inspect.isclass(thing):
            key = inspect.signature(thing).parameters.get("key")  # pyright: ignore[reportArgumentType]
            if key is not None and key.kind is not inspect.Parameter.KEYWORD_ONLY:
                complaints.append(f"{name}: `key` must be keyword-only")
    fail_with(complaints)


def test_public_paths_are_one_dot_deep():
    fail_with(
        [
            f"{path.relative_to(ROOT)}: name it `_{path.name}` and export from `__init__.py`"
            for path in sources("genkit")
            if not path.name.startswith("_") and path.parent != PACKAGE
        ]
    )


# What may be called and imported.


def test_nothing_runs_code_from_data():
    complaints = []
    for path in sources("genkit", "models", "samplers", "examples"):
        for node, name in imports(path):
            if within(name, BANNED_MODULES):
                complaints.append(f"{place(path, node)} imports {name}")
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                complaints.append(f"{place(path, node)} calls {node.func.id}")
            if any(k.arg == "allow_pickle" and not is_false(k.value) for k in node.keywords):
                complaints.append(f"{place(path, node)} allows pickles")
    fail_with(complaints)


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_only_the_command_line_prints():
    fail_with(
        [
            f"{place(path, node)} prints"
            for path in sources("genkit")
            if "cli" not in path.relative_to(PACKAGE).parts
            for node in ast.walk(parse(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
    )


def test_numpyro_beyond_its_distributions_stays_where_models_are_run():
    fail_with(
        [
            f"{place(path, node)} imports {name}"
            for path in sources("genkit")
            if path.relative_to(PACKAGE).parts[0] not in ("inference", "vi", "mcmc", "smc")
            for node, name in imports(path)
            if within(name, {"numpyro"}) and not within(name, {"numpyro.distributions"})
        ]
    )


def test_the_package_does_not_import_itself_as_a_whole():
    # `import genkit` inside genkit would tie every submodule to every other.
    fail_with(
        [
            f"{place(path, node)} imports {name}: import from the submodule that defines it"
            for path in sources("genkit")
            for node, name in imports(path)
            if re.fullmatch(r"genkit(\.[A-Za-z]\w*)?", name) and not is_namespace(name)
        ]
    )


def is_namespace(name: str) -> bool:
    return name != "genkit" and (PACKAGE / name.partition(".")[2] / "__init__.py").exists()


def test_submodules_do_not_import_each_others_private_modules():
    complaints = []
    for path in sources("genkit"):
        own = path.relative_to(PACKAGE).parts[0]
        for node, name in imports(path):
            parts = name.split(".")
            if parts[0] != "genkit" or len(parts) < 3 or parts[1] in (own, "_core"):
                continue
            if any(part.startswith("_") for part in parts[2:]):
                complaints.append(f"{place(path, node)} imports {name}, which is private to genkit.{parts[1]}")
    fail_with(complaints)


def test_nobody_is_sent_to_the_private_core():
    # Docstrings, messages and pages are for users; what they need is public under another name.
    complaints = []
    for path in tracked():
        where = path.relative_to(ROOT)
        if where.suffix == ".md" and where.name != "CONTRIBUTING.md" and "genkit._core" in path.read_text("utf-8"):
            complaints.append(f"{where} mentions genkit._core")
        if where.suffix == ".py" and where.parts[0] in ("genkit", "models", "samplers", "examples"):
            if "_core" in where.parts:
                continue
            for node in ast.walk(parse(path)):
                text = node.value if isinstance(node, ast.Constant) else None
                # A bare name of a module, as look-ups need it, is no text for people.
                if isinstance(text, str) and "genkit._core" in text and " " in text:
                    complaints.append(f"{place(path, node)} mentions genkit._core")
    fail_with(complaints)


def test_definition_files_stand_alone():
    own = {path.stem for path in sources("models", "samplers", "examples")}
    complaints = []
    for path in sources("models", "samplers", "examples"):
        for node, name in imports(path):
            if name.partition(".")[0] in own | {"models", "samplers", "examples"}:
                complaints.append(f"{place(path, node)} imports {name}, which is not installed")
            if any(part.startswith("_") for part in name.split(".")[1:]) and name.startswith("genkit"):
                complaints.append(f"{place(path, node)} imports {name}, which is private")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                complaints.append(f"{place(path, node)} imports a sibling")
    fail_with(complaints)


def test_annotations_are_not_postponed():
    # Postponed annotations are strings, which the run-time checks cannot see.
    fail_with(
        [
            place(path, node)
            for path in sources("genkit", "models", "samplers")
            for node, name in imports(path)
            if name == "__future__.annotations"
        ]
    )


# The tree.


def layers() -> list[set[str]]:
    """Layers of the import contract, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract["type"] == "layers"]
    return [set(re.findall(r"\w+", line)) for line in contract["layers"]]


def test_the_architecture_page_shows_the_layers_of_the_contract():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    (picture,) = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [set(re.findall(r"\w+", line)) for line in picture.splitlines()] == layers()


def test_the_top_level_is_closed():
    extra = {path.relative_to(ROOT).parts[0] for path in tracked()} - TOP_LEVEL
    assert not extra, f"not at the top level: {sorted(extra)}"


def test_no_lock_files():
    locks = re.compile(r"(uv|poetry|Pipfile|pdm|pixi)\.lock|pylock.*\.toml|package-lock\.json")
    fail_with([str(path.relative_to(ROOT)) for path in tracked() if locks.fullmatch(path.name)])


def test_no_machine_paths_and_no_registry_hosts():
    # Paths of somebody's machine, and the ways in which an index is named.
    machine = re.compile(r"(?<![\w.])/(?:root|home|Users|work|farm)/[A-Za-z0-9_.-]+|[A-Z]:\\\\?Users\\")
    registry = re.compile(r"(?:--)?(?:extra-)?index-url\s*[=\s]\s*\S|find-links\s*=|https?://\S*/simple\b")
    complaints = []
    for path in tracked():
        if path == Path(__file__).resolve() or path.suffix in (".png", ".npz", ".gz", ".woff2"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if machine.search(line) or registry.search(line):
                complaints.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    fail_with(complaints)


@pytest.mark.parametrize("folder", ["genkit", "models", "samplers", "examples"])
def test_python_files_say_what_they_are(folder):
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(folder)
        if folder != "examples" and not ast.get_docstring(parse(path)) and path.read_text().strip()
    ]
    fail_with(silent)
