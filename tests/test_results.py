"""RESULTS.md tells what is recorded, and recipes tell the same."""

import importlib.util
import re
from pathlib import Path

import pytest

from capsjax.training import TABLES

ROOT = Path(__file__).parents[1]
ROWS = [recipe for table in TABLES.values() for recipe in table]


@pytest.fixture(scope="module")
def results():
    """The script that fills the page."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "write_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_records_say(results):
    page = results.PAGE.read_text()
    assert results.filled(page, results.records()) == page
    assert results.filled(page.replace("not run", "0.25"), results.records()) == page
    for recipe in ROWS:
        assert f"| `{recipe.command}` |" in page


@pytest.mark.parametrize("recipe", ROWS, ids=lambda r: f"{r.table}-{r.name}")
def test_a_recipe_tells_what_was_measured(results, recipe):
    assert recipe.measured.startswith(results.measured(recipe, results.records()))


def test_rows_for_two_cores_have_been_run(results):
    for recipe in TABLES["small"]:
        assert results.measured(recipe, results.records()) != "not run"


def test_pictures_of_the_page_are_there(results):
    page = results.PAGE.read_text()
    names = re.findall(r'(?:src|srcset)="([^"]+)"', page)
    assert len(names) == 2 * len(results.CURVES)
    for name in names:
        assert (ROOT / name).is_file()


def test_means_and_deviations_are_of_trials_of_full_length(results):
    recipe = TABLES["mnist"][0]
    trial = {
        "table": "mnist",
        "recipe": recipe.name,
        "asked_steps": None,
        "seconds": 60.0,
        "seed": 0,
        "dtype": "float32",
        "steps": 9000,
        "errors": {"mnist": 0.004},
    }
    short = {**trial, "asked_steps": 5, "errors": {"mnist": 0.5}}
    half = {**trial, "dtype": "bfloat16", "errors": {"mnist": 0.5}}
    assert results.measured(recipe, [half]) == "not run"
    shorter = {**short, "asked_steps": 2, "seed": 1}
    text = "50.00 (1 seed, 9,000 of 300,000 steps, 1 min)"
    assert results.measured(recipe, [shorter, short, half]) == text
    second = {**trial, "seed": 1, "errors": {"mnist": 0.003}, "seconds": 180.0}
    both = [half, {**trial, "errors": {"mnist": 0.5}}, trial, short, second]
    ensemble = {**trial, "ensemble": 2, "error": 0.0025}
    del ensemble["seed"], ensemble["errors"]
    assert results.measured(recipe, [ensemble, *both]).startswith("0.25 as an ensemble of 2, 0.35")
    assert results.measured(recipe, both) == "0.35 ± 0.071 (2 seeds, 9,000 steps, 2 min)"
