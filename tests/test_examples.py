"""The examples as a user runs them: what they print, and in full runs what they claim."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from capsjax.data import load

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, folder, *arguments, timeout=180):
    """What the example prints."""
    quick = "--steps" in arguments
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if not quick:
        environment.pop("XLA_FLAGS", None)  # which make compiling fast and programs slow
    # Warnings are errors here, too; the folder is not that of the repository.
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def percentages(text, names):
    """The percentage that follows each name, in a line of its own."""
    found = {name: re.findall(rf"^{name}\b.*?([\d.]+)%$", text, re.MULTILINE) for name in names}
    assert all(len(figures) == 1 for figures in found.values()), text
    return {name: float(figures[0]) / 100 for name, figures in found.items()}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_tells_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"python examples/{path.name}" in text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_imports_what_there_is(path):
    runpy.run_path(str(path), run_name="imported")


def test_there_are_three():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"object_discovery", "text_classification", "vit_pooling"}


def check_vit_pooling(folder, *arguments, timeout=180):
    text = run("vit_pooling", folder, *arguments, timeout=timeout)
    errors = percentages(text, ("mean", "capsule"))
    assert all(0 < error < 0.95 for error in errors.values())
    (own,) = re.findall(r"own class ([\d.]+) of 16 tokens", text)
    assert 0 < float(own) < 16
    return errors, float(own)


def check_text_classification(folder, *arguments, timeout=180):
    text = run("text_classification", folder, *arguments, timeout=timeout)
    errors = percentages(text, ("capsules", "ridge", "most frequent"))
    # The last two do not depend on the steps.
    assert 0.02 < errors["ridge"] < 0.2 < 0.5 < errors["most frequent"] < 0.8
    libraries = ("python", "numpy", "jax", "flax", "optax")
    words = {
        name: re.search(rf"^{name}: (.*)$", text, re.MULTILINE)[1].split() for name in libraries
    }
    assert all(len(set(own)) == 6 for own in words.values())
    assert not {*libraries, "(none)"} & {word for own in words.values() for word in own}
    return errors, words


# Each imports and compiles for ten seconds and more. docs/examples has what they print.
@pytest.mark.slow
def test_vit_pooling(tmp_path):
    check_vit_pooling(tmp_path, "--steps", 3)


@pytest.mark.slow
def test_text_classification(tmp_path):
    errors, _ = check_text_classification(tmp_path, "--steps", 100)
    assert errors["capsules"] < errors["most frequent"]


def check_object_discovery(folder, *arguments, timeout=180):
    text = run("object_discovery", folder, *arguments, timeout=timeout)
    (error,) = re.findall(r"squared error ([\d.]+)", text)
    (shares,) = re.findall(r"slots ([\d.]+)%, halves ([\d.]+)%", text)
    slots, halves = (float(share) / 100 for share in shares)
    # The better of two matchings is never below a half; halves do not depend on what was learned.
    assert 0.5 <= slots <= 1
    assert 0.7 < halves < 0.85
    return float(error), slots, halves


@pytest.mark.slow
def test_object_discovery(tmp_path):
    error, _, _ = check_object_discovery(tmp_path, "--steps", 3)
    assert 0 < error < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [check_vit_pooling, check_text_classification, check_object_discovery]
)
def test_full_runs_reach_what_the_examples_claim(check, tmp_path):
    found = check(tmp_path, timeout=900)
    if check is check_vit_pooling:
        errors, own = found
        assert errors["capsule"] < 0.08 < errors["mean"] < 0.15
        assert own > 2  # more than chance
    elif check is check_text_classification:
        errors, _ = found
        assert errors["capsules"] < 0.15
    else:
        error, slots, halves = found
        assert error < 0.035
        assert slots > halves + 0.03


@pytest.mark.slow
def test_photographs_are_of_all_kinds_and_some_broken(tmp_path, shared, caplog):
    printed = run("photographs/make", tmp_path, "photos", "--data-dir", shared / "tfds")
    assert "460 photographs and 6 broken or other files in photos" in printed
    files = [path for path in (tmp_path / "photos").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".jpg", ".png", ".tif", ".webp", ".txt"}
    photos = load("image_folder", data_dir=tmp_path / "photos", image_size=28, channels=1)
    assert photos.class_names == ("ankle-boot", "sneaker")
    assert len(photos.train.labels) + len(photos.test.labels) == 460
    assert "image_folder leaves out 4 of 464 images" in caplog.text
