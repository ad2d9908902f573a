"""Sphinx configuration; build with `sphinx-build -W -b html docs docs/_build/html`."""

import sys
from importlib import import_module
from importlib.util import find_spec

from sphinx.util import logging

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
nb_execution_timeout = 600  # of a cell, on a busy machine too
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
html_title = "ssmrl"
# Films, which no figure copies, and MathJax from its package: nothing is fetched when a page is read.
html_static_path = ["_static", f"{find_spec('sphinx-mathjax-offline').submodule_search_locations[0]}/static"]
mathjax_path = "mathjax/tex-chtml.js"
nb_ipywidgets_js = {}

PACKAGES = ("core", "adaptation", "meta_rl", "env_runner", "checkpoint", "stop")


def check_that_all_is_documented(app, env):
    """Warn, which is an error with -W, of every public name that no page describes."""
    described = env.domaindata["py"]["objects"]
    for package in PACKAGES:
        module = import_module(f"ssmrl.{package}")
        for name in module.__all__:
            # A constant, or an alias, does not know its home: it is described in the module that defines it.
            homes = (key.rpartition(".")[0] for key in described if key.endswith(f".{name}"))
            if not any(home.startswith(module.__name__) and home in sys.modules for home in homes):
                logging.getLogger(__name__).warning("ssmrl.%s.%s is public, and in no page of the API.", package, name)


def setup(app):
    app.connect("env-check-consistency", check_that_all_is_documented)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
