"""Sphinx configuration of the documentation site: `python -m sphinx -W docs build/docs`."""

import pathlib
import sys

import ldrld_jax

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # generated.py and mathml.py

project = "ldrld_jax"
version = release = ldrld_jax.__version__
author = copyright = "the ldrld_jax contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated", "mathml"]

html_theme = "furo"  # system fonts and local files: pages fetch nothing from elsewhere
html_title = f"ldrld_jax {release}"
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "sh"
default_role = "code"  # docstrings write `x` as in Markdown
autodoc_typehints = "none"  # docstrings give shapes, units and ranges
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # lists a config's fields like a function's arguments
napoleon_attr_annotations = False
