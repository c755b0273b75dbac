"""Sphinx builds the pages of this folder; `make docs` treats every warning as an error."""

import pyro_nf

project = "pyro_nf"
author = "The pyro_nf authors"
copyright = "2026, The pyro_nf authors"
version = release = pyro_nf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []

html_theme = "furo"
html_title = f"pyro_nf {version}"

# The api page lists what the faces' __all__ name, in that order.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# `name` in a docstring is code, as in Markdown.
default_role = "code"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# A page may hold {code-cell}s; each page runs once and again when its cells change.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
# What libraries say on stderr while a page runs (advice on widgets) is no part of the page.
nb_output_stderr = "remove"
