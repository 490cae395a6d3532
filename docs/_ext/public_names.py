"""API pages made from the public names themselves, Markdown in docstrings, and a check that no name is missing.

A page per namespace is written before Sphinx reads its sources, so a new name or a new submodule needs no edit here.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

import genkit


def namespaces() -> list[ModuleType]:
    """`genkit` and its public namespaces; the command line is documented by its own page."""
    names = sorted(info.name for info in pkgutil.iter_modules(genkit.__path__) if not info.name.startswith("_"))
    return [genkit, *(importlib.import_module(f"genkit.{name}") for name in names if name != "cli")]


def public_names(module: ModuleType) -> dict[str, object]:
    """The functions and classes of ours that `module` shows."""
    names = [name for name in dir(module) if not name.startswith("_")]  # not `vars`: some are made on demand
    shown = {name: thing for name in names if callable(thing := getattr(module, name))}
    return {name: thing for name, thing in shown.items() if getattr(thing, "__module__", "").startswith("genkit")}


def kind(thing: object) -> str:
    """The heading under which a name appears."""
    if not inspect.isclass(thing):
        return "Functions"
    if issubclass(thing, BaseException):
        return "Exceptions"
    abstract = inspect.isabstract(thing) or getattr(thing, "__abstractvars__", ())
    return "Abstractions" if abstract else "Classes"


def homes() -> dict[int, str]:
    """The one path under which each object is documented in full: the shortest."""
    paths = [
        (f"{module.__name__}.{name}", thing) for module in namespaces() for name, thing in public_names(module).items()
    ]
    return {id(thing): path for path, thing in sorted(paths, key=lambda item: (-item[0].count("."), item[0]))}


def page(module: ModuleType) -> str:
    """The Markdown source of one namespace: its docstring, a table of its names, then every name in full."""
    names, home = public_names(module), homes()
    lines = [f"# {module.__name__}", "", inspect.getdoc(module) or "", ""]
    sections = {heading: [n for n in names if kind(names[n]) == heading] for heading in HEADINGS}
    for heading, members in sections.items():
        if members:
            lines += ["", f"| {heading} | |", "| --- | --- |"]
            lines += [f"| {{py:obj}}`{n} <{home[id(names[n])]}>` | {summary(names[n])} |" for n in members]
    for heading in HEADINGS:
        members = [n for n in sections[heading] if home[id(names[n])] == f"{module.__name__}.{n}"]
        lines += ["", f"## {heading}", "", "```{eval-rst}"] if members else []
        for name in members:
            directive = "autofunction" if heading == "Functions" else "autoclass"
            lines += [f".. {directive}:: {module.__name__}.{name}"]
            lines += ["   :members:", "   :special-members: __call__"] * (directive == "autoclass")
            lines += [""]
        lines += ["```"] if members else []
    return "\n".join(lines) + "\n"


HEADINGS = ["Functions", "Classes", "Abstractions", "Exceptions"]


def summary(thing: object) -> str:
    """The first sentence of the docstring."""
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def write_pages(app: Sphinx) -> None:
    """Write `api/generated/*.md`, touching only what changed."""
    folder = Path(app.srcdir) / "api" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{module.__name__}.md": page(module) for module in namespaces()}
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def check_coverage(app: Sphinx, env: BuildEnvironment) -> None:
    """Fail the build when a public name has no entry."""
    documented = env.domaindata["py"]["objects"]
    missing = [name for name in homes().values() if name not in documented]
    if missing:
        raise ExtensionError(f"public names without documentation: {', '.join(missing)}")


# Docstrings are written in the Markdown subset that reads well in an editor: `code`, $formula$, $$formula$$.
SPAN = re.compile(
    r"(?P<display>\$\$(?P<formula>.+?)\$\$)|(?P<literal>``.+?``)|(?P<role>:\w+(?::\w+)?:`[^`]+`)|(?P<link>`[^`]+`__?)"
    r"|`(?P<code>[^`]+)`|(?<![\\\w$])\$(?P<inline>[^$\s](?:[^$]*?[^$\s])?)\$(?![\w$])|(?P<bar>\|)|(?P<tail>\b\w+_)(?!\w)",
    re.DOTALL,
)


def to_rst(span: re.Match[str], indent: str) -> str:
    """One Markdown span as reStructuredText."""
    if span["formula"]:
        body = " ".join(span["formula"].split())
        return f"\n\n{indent}.. math:: {body}\n\n{indent}"
    if span["code"]:
        return apart(span, f"``{span['code']}``")
    if span["inline"]:
        return apart(span, f":math:`{span['inline']}`")
    if span["bar"]:
        return r"\|"
    if span["tail"]:
        return span["tail"][:-1] + r"\_"
    return span[0]


def apart(span: re.Match[str], markup: str) -> str:
    """Inline markup must not touch a word: an escaped space keeps them apart and shows nothing."""
    before, after = span.string[: span.start()][-1:], span.string[span.end() :][:1]
    return (
        ("" if re.match(r"[\s'\"(\[{<\-/:]|$", before) else "\\ ")
        + markup
        + ("" if re.match(r"[\s'\")\]}>\-/:.,;!?\\]|$", after) else "\\ ")
    )


def table(paragraph: str) -> str:
    """A Markdown table as a list-table; its bars are gone, the other spans are translated later."""
    indent = re.match(r"\s*", paragraph)[0]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in paragraph.splitlines()]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [rows[0], *rows[2:]]:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return "\n".join(indent + line for line in lines)


def shorten(app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, returns: str) -> tuple:
    """Array types as they are written in the sources, not as they unfold."""
    del app, what, name, obj, options

    def short(text: str | None) -> str | None:
        if text is None:
            return None
        array, rest = (
            r"~?(?:jaxtyping\.)?(\w+)\[~?jaxlib\._jax\.Array, '([^']*)'\]",
            r"(?: \| ~?[\w.]*?(?:number|float|complex|int|bool_?)\b)*",
        )
        text = re.sub(
            array + r" \| ~?(?:jaxtyping\.)?\1\[~?(?:numpy\.)?ndarray, '\2'\]" + rest, r"\1[ArrayLike, '\2']", text
        )
        return re.sub(r"~?jaxlib\._jax\.Array", "Array", text)

    return short(signature), short(returns)


def translate(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn the Markdown of a docstring into reStructuredText, paragraph by paragraph, leaving examples alone."""
    del app, what, name, obj, options
    done = []
    for paragraph in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        if re.match(r"\s*\|.*\n\s*\|[-:|\s]+\|", paragraph):
            paragraph = table(paragraph)
        indent = re.match(r"[ \t]*", paragraph.rpartition("\n")[2])[0]
        example = ">>>" in paragraph
        done.append(paragraph if example else SPAN.sub(lambda span, i=indent: to_rst(span, i), paragraph))
    lines[:] = "\n\n".join(done).split("\n")


def setup(app: Sphinx) -> dict[str, object]:
    """Connect the three parts."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", translate, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    app.connect("env-check-consistency", check_coverage)
    return {"parallel_read_safe": True}
