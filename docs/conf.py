"""Sphinx configuration: the API reference, made from the docstrings."""

from capsjax.version import __version__

project = "capsjax"
author = "The capsjax authors"
release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = f"capsjax {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # The docstrings give shapes and dtypes, which the annotations cannot.
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
napoleon_custom_sections = ["Reference"]

nitpicky = True
# Of other projects, whose pages are not looked up: the reference builds without a network.
nitpick_ignore_regex = [("py:func", r"jax\..*")]
