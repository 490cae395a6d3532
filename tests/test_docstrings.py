"""Every example in a docstring of genkit runs, as a user would paste it.

The examples are read from the sources, so none hides behind a wrapper; each must import what it uses.
"""

import ast
import doctest
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import genkit


PACKAGE = Path(genkit.__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[doctest.DocTest]:
    """One test per docstring with a prompt in it, named by file and definition."""
    parser, found = doctest.DocTestParser(), []

    def visit(node: ast.AST, name: str, path: Path) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and ">>>" in text:
                found.append(parser.get_doctest(text, {}, name, str(path), getattr(node, "lineno", 1)))
        for child in ast.iter_child_nodes(node):
            visit(child, f"{name}.{child.name}" if hasattr(child, "name") else name, path)

    for path in sorted(PACKAGE.rglob("*.py")):
        if "_zoo" not in path.parts:
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            visit(ast.parse(path.read_text(encoding="utf-8")), name.removesuffix(".__init__"), path)
    return found


@pytest.mark.parametrize("example", [pytest.param(e, id=e.name) for e in examples()])
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(example, out=report.append)
    plt.close("all")
    assert not report, "".join(report)
