"""Draws the figures of the guides from the guides' own code: ``python scripts/draw_guides.py``."""

import contextlib
import doctest
import io
from pathlib import Path
from typing import Any

from capsjax.viz import routing_diagram
from capsjax.viz.draw import save

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Draws the worked example of the page on concepts, in both themes."""
    page: dict[str, Any] = {}
    text = (DOCS / "guides" / "concepts.md").read_text()
    with contextlib.redirect_stdout(io.StringIO()):
        for example in doctest.DocTestParser().get_examples(text):
            exec(compile(example.source, "concepts.md", "exec"), page)
    for theme in ("light", "dark"):
        figure = routing_diagram(
            page["trace"],
            votes=page["votes"],
            children=page["poses"],
            theme=theme,
            **page["names"],
        )
        save(figure, DOCS / "images" / f"concepts-{theme}.svg")


if __name__ == "__main__":
    main()
