"""Sphinx configuration; build with `sphinx-build -W -b html docs docs/_build/html`."""

import ssmrl

project = "ssmrl"
author = "The ssmrl authors"
copyright = "2026, The ssmrl authors"
version = release = ssmrl.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_render_markdown_format = "myst"
exclude_patterns = ["_build", "jupyter_execute"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
# nn.Module's own docstrings are PyTorch's business.
autodoc_inherit_docstrings = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_static_path = ["_static"]  # films, which no figure copies
html_title = "ssmrl"
