"""Sphinx configuration. Build with `python -m sphinx -W docs docs/_build/html`; nothing is fetched."""

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path


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
    "formulas",
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

html_math_renderer = "mathml"

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
