"""Sphinx configuration: the site, with a reference made from docstrings, records and help texts."""

import contextlib
import importlib
import io
import os
import re
from typing import ClassVar
from unittest import mock

from docutils import nodes
from math_core import LatexToMathML
from sphinx.util.docutils import SphinxDirective

from capsjax import cli, routing
from capsjax.version import __version__

project = "capsjax"
author = "The capsjax authors"
copyright = author  # what Sphinx names the footer's text
release = __version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "results"]
html_theme = "furo"
html_title = f"capsjax {release}"
html_theme_options = {
    # The backgrounds and the first accent of the figures (capsjax.viz.theme).
    "light_css_variables": {"color-brand-primary": "#0069b4", "color-brand-content": "#0069b4"},
    "dark_css_variables": {
        "color-brand-primary": "#62b6f7",
        "color-brand-content": "#62b6f7",
        "color-background-primary": "#0d1117",
    },
}
html_domain_indices = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Prompts and the output of commands are not copied.
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

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
        lines += _row("``routing=``", "source", "learned parameters", "activations")
        for record in records:
            learned = list(record.parameters(routing.Sizes(1, 1, 1, 1)))
            learned = [":class:`~capsjax.HeinsenParameters`"] if len(learned) > 4 else learned
            learned = [name if ":" in name else f"``{name}``" for name in learned]
            lines += _row(
                f":func:`{record.name} <capsjax.{record.function.__name__}>`",
                record.paper,
                ", ".join([*learned, *(["bias (optional)"] if record.has_bias else [])]),
                "lengths of the poses" if record.squash else "the algorithm's own",
            )
        return self.parse_text_to_nodes("\n".join(lines))


def _row(*cells):
    return [f"   {'  ' if n else '* '}- {cell}" for n, cell in enumerate(cells)]


class PublicNames(SphinxDirective):
    """The public names of a module in a table, each with the first line of its docstring."""

    required_arguments = 1
    option_spec: ClassVar = {"exclude": str.split}

    def run(self):
        """Returns the nodes of the table."""
        module = importlib.import_module(self.arguments[0])
        lines = [f".. currentmodule:: {module.__name__}", ""]
        lines += [".. autosummary::", "   :nosignatures:", ""]
        for name in module.__all__:
            if callable(getattr(module, name)) and name not in self.options.get("exclude", []):
                lines.append(f"   {name}")
        return self.parse_text_to_nodes("\n".join(lines))


class CommandHelp(SphinxDirective):
    """What a command prints for ``--help``: usage, description, and a list of its options."""

    required_arguments = 1
    optional_arguments = 1  # a subcommand

    def run(self):
        """Returns the nodes of the help."""
        printed = io.StringIO()
        with (
            mock.patch.dict(os.environ, {"COLUMNS": "2000"}),  # so that few lines are wrapped
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
        ):
            cli.main([*self.arguments, "--help"])
        usage, *about = re.split(r"\n\n+", re.split(r"\n (?=\w)", printed.getvalue())[0].strip())
        options = nodes.definition_list(classes=["options"])
        # An option begins in the third column; what it does follows in its line and below it.
        for line in printed.getvalue().splitlines():
            if begins := re.match(r"  (\S.*?)(?:\s\s+(.*))?$", line):
                term = nodes.term("", "", nodes.literal("", begins[1]))
                text = nodes.paragraph("", "", *_with_options(begins[2] or ""))
                options += nodes.definition_list_item("", term, nodes.definition("", text))
            elif line.startswith("   "):
                text += _with_options(f" {line.strip()}")
        block = nodes.literal_block(usage, usage, language="text")
        return [*(nodes.paragraph("", "", *_with_options(text)) for text in about), block, options]


def _with_options(text):
    """The text with names of options set as code."""
    parts = re.split(r"(--[a-z][\w-]*)", text)
    return [nodes.literal("", p) if p.startswith("--") else nodes.Text(p) for p in parts if p]


_PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img src="([^"]+)" alt="([^"]+)">\s*</picture>'
)


def adapt_markdown(text, *, included):
    """Adapts Markdown that is written for forges.

    They choose between a light and a dark picture by ``<picture>``, the site by a class. Sphinx
    links a picture that has a width to its full size. Pages that are included from the root of the
    repository link to ``docs/``.
    """
    light = r'![\3](\2){.only-light width="100%"}'
    dark = r'![\3](\1){.only-dark width="100%"}'
    text = re.sub(_PICTURE, f"{light}\n{dark}", text)
    return text.replace("](docs/", "](") if included else text


def _read(app, docname, content):
    content[0] = adapt_markdown(content[0], included=False)


def _include(app, path, docname, content):
    content[0] = adapt_markdown(content[0], included=path.parent.name == "..")


_MATHML = LatexToMathML()


def _inline_formula(self, node):
    self.body.append(_MATHML.convert_with_local_state(node.astext(), displaystyle=False))
    raise nodes.SkipNode


def _displayed_formula(self, node):
    formula = _MATHML.convert_with_local_state(node.astext(), displaystyle=True)
    self.body.append(f'<div class="math">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app):
    """Registers the directives, what adapts pages, and formulas as MathML."""
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_displayed_formula, None))
    app.add_directive("routing-algorithms", RoutingAlgorithms)
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-help", CommandHelp)
    app.connect("source-read", _read)
    app.connect("include-read", _include)
