"""Sphinx configuration: the API reference, made from docstrings and the algorithms' records."""

from sphinx.util.docutils import SphinxDirective

from capsjax import routing
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


class RoutingAlgorithms(SphinxDirective):
    """The routing algorithms as their records describe them: a table, or their functions."""

    required_arguments = 1

    def run(self):
        """Returns the nodes of the table or of the functions."""
        records = [routing.algorithm(name) for name in routing.algorithms()]
        if self.arguments[0] == "functions":
            lines = [f".. autofunction:: {record.function.__name__}" for record in records]
            return self.parse_text_to_nodes("\n".join(lines))
        lines = [".. list-table::", "   :header-rows: 1", ""]
        lines += _row("``routing=``", "function", "source", "learned parameters", "activations")
        for record in records:
            learned = list(record.parameters(routing.Sizes(1, 1, 1, 1)))
            learned = [":class:`capsjax.HeinsenParameters`"] if len(learned) > 4 else learned
            learned = [name if ":" in name else f"``{name}``" for name in learned]
            lines += _row(
                f"``{record.name}``",
                f":func:`capsjax.{record.function.__name__}`",
                record.paper,
                ", ".join([*learned, *(["bias (optional)"] if record.has_bias else [])]),
                "lengths of the poses" if record.squash else "the algorithm's own",
            )
        return self.parse_text_to_nodes("\n".join(lines))


def _row(*cells):
    return [f"   {'  ' if n else '* '}- {cell}" for n, cell in enumerate(cells)]


def setup(app):
    """Registers the directive."""
    app.add_directive("routing-algorithms", RoutingAlgorithms)
