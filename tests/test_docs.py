"""The API reference builds without a warning, and has an entry for every public name."""

import inspect
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import capsjax
import capsjax.bench
import capsjax.data
import capsjax.models
import capsjax.reproduce
import capsjax.training
import capsjax.viz

ROOT = Path(__file__).parents[1]
MODULES = (
    capsjax,
    capsjax.nn,
    capsjax.routing,
    capsjax.models,
    capsjax.data,
    capsjax.training,
    capsjax.reproduce,
    capsjax.bench,
    capsjax.viz,
)
# Names that stand for a type, a module or a version, and need no page.
WITHOUT_PAGES = {"__version__", "nn", "routing", "ModelConfig", "Network"}


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    """The names that the built pages have an entry for."""
    built = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "-b", "html", "docs", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    packed = (built / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_an_entry(inventory, module):
    entries = {name.rpartition(".")[2] for name in inventory if name.startswith("capsjax.")}
    assert set(module.__all__) - WITHOUT_PAGES <= entries


PUBLIC = [getattr(capsjax, name) for name in capsjax.__all__]
# All but the one that computes nothing.
FUNCTIONS = [f for f in PUBLIC if inspect.isfunction(f) and f is not capsjax.load_pretrained]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_says_what_it_takes_gives_and_raises(function):
    text = inspect.getdoc(function)
    for part in ("Args:", "Returns:", "Raises:", "Example:", ">>> ", ".. math::"):
        assert part in text, part
    # The convolution is nobody's invention.
    assert function is capsjax.conv_general_dilated or "Reference:" in text
