"""The order of the rooms: a file imports only from rooms below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import capsjax

PACKAGE = Path(capsjax.__file__).parent
MAY_IMPORT = {
    "ops": set(),
    "routing": {"ops"},
    "nn": {"ops", "routing"},
    "models": {"ops", "routing", "nn"},
    "data": {"ops"},
    "training": {"ops", "routing", "nn", "models", "data"},
    "reproduce": {"ops", "routing", "nn", "models", "data", "training"},
    "bench": {"ops", "routing", "nn", "models", "data", "training"},
    "viz": {"ops", "routing", "nn", "models", "data", "training"},
}
SHARED = ("errors", "files", "machine", "options", "version")
# What the lower rooms may import of other packages.
PACKAGES = {"ops": {"jax", "numpy"}, "routing": {"jax", "numpy"}, "nn": {"jax", "flax"}}
FILES = [path for folder in MAY_IMPORT for path in sorted((PACKAGE / folder).rglob("*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_folder_has_its_floor():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_go_down(path):
    room = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "capsjax":
            assert rest[0] in {*MAY_IMPORT[room], room, *SHARED}, f"{path} imports {name}"
        elif room in PACKAGES and package not in sys.stdlib_module_names:
            assert package in PACKAGES[room], f"{path} imports {name}"


def test_importing_capsjax_brings_little():
    code = """
import sys, jax, flax.nnx
before = set(sys.modules)
import capsjax.nn
capsjax.length, capsjax.dynamic_routing
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
print(*sorted({"tensorflow_datasets", "grain", "matplotlib", "tyro", "tensorboardX", "PIL"}
              & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["capsjax", ""]


def test_measuring_imports_nothing_of_training():
    code = """
import sys
import capsjax.bench.processes.worker
others = {"capsjax.training", "capsjax.data", "msgspec", "orbax.checkpoint"}
print(*sorted(others & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "\n"
