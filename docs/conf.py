"""The documentation site: `python -m sphinx -W docs build/docs`."""

import pathlib
import sys

import ldrld_jax

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # generated.py and mathml.py

project = "ldrld_jax"
version = release = ldrld_jax.__version__
author = copyright = "the ldrld_jax contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated", "mathml"]

html_theme = "furo"  # its fonts are the reader's own and its files lie beside the pages: nothing is fetched
html_title = f"ldrld_jax {release}"
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "sh"
default_role = "code"  # docstrings write `x` as Markdown does
autodoc_typehints = "none"  # shapes, units and ranges stand in the docstrings
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # a config's fields as one list, as the arguments of a function are
napoleon_attr_annotations = False
