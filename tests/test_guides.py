"""Code of the guides runs with the tests, and their commands have the options that they name."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

from capsjax.cli import main

GUIDES = sorted((Path(__file__).parents[1] / "docs" / "guides").glob("*.md"))
FENCE = re.compile(r"^ *```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

guides = pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)


def blocks(path, language):
    return [code for kind, code in FENCE.findall(path.read_text()) if kind == language]


@functools.cache
def help_of(*command):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return text.getvalue()


@guides
def test_python_is_a_doctest(path):
    assert not blocks(path, "py") + blocks(path, "pycon")
    for code in blocks(path, "python"):
        assert code.lstrip().startswith(">>> ")
        # Without it the fence would be a part of the expected output.
        assert code.endswith("\n\n")


@guides
def test_commands_have_these_options(path):
    lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    for line in lines:
        called, _, _ = line.strip().partition(" #")
        if called.startswith("capsjax "):
            _, name, *rest = called.split(" --xla-flag ")[0].split()
            text = help_of(name, *rest[: name == "bench" and rest[:1] == ["compare"]])
            for option in rest:
                if option.startswith("--"):
                    assert re.search(rf"{option}\b", text), line
