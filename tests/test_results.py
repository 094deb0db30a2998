"""RESULTS.md holds what is recorded in docs/results."""

import importlib.util
import re
from pathlib import Path

import pytest

from capsjax.reproduce import TABLES
from capsjax.reproduce.results import Line, measured

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


def test_rows_for_two_cores_have_been_run(results):
    for recipe in TABLES["small"]:
        assert measured(recipe, results.records()) != "not run"


def test_pictures_of_the_page_are_there(results):
    page = results.PAGE.read_text()
    names = re.findall(r'(?:src|srcset)="([^"]+)"', page)
    assert len(names) == 2 * len(results.CURVES)
    for name in names:
        assert (ROOT / name).is_file()


def test_every_picture_is_of_a_recorded_trial(results):
    for of_table, rows in results.CURVES.values():
        for row in rows:
            records = results.curve(of_table, row)
            steps = [r["step"] for r in records if r["split"] == "train"]
            assert steps == sorted(set(steps))
            assert records[-1]["split"] == "test"
            assert records[-1]["step"] == steps[-1]


def test_means_and_deviations_are_of_trials_of_full_length():
    recipe = TABLES["mnist"][0]

    def trial(**fields):
        options = {"seconds": 60.0, "seed": 0, "steps": 9000, "errors": {"mnist": 0.004}}
        return Line(table="mnist", recipe=recipe.name, **{**options, **fields})

    short = trial(asked_steps=5, errors={"mnist": 0.5})
    half = trial(dtype="bfloat16", errors={"mnist": 0.5})
    assert measured(recipe, []) == measured(TABLES["mnist"][1], [half]) == "not run"
    shorter = trial(asked_steps=2, seed=1, errors={"mnist": 0.5})
    text = "50.00 (1 seed, 9,000 of 300,000 steps, 1 min)"
    assert measured(recipe, [shorter, short]) == text
    text = "50.00 (1 seed, 9,000 steps in bfloat16, 1 min)"
    assert measured(recipe, [shorter, half, short]) == text
    second = trial(seed=1, errors={"mnist": 0.003}, seconds=180.0)
    both = [half, trial(errors={"mnist": 0.5}), trial(), short, second]
    ensemble = Line(table="mnist", recipe=recipe.name, ensemble=2, error=0.0025)
    assert measured(recipe, [ensemble, *both]).startswith("0.25 as an ensemble of 2, 0.35")
    assert measured(recipe, both) == "0.35 ± 0.071 (2 seeds, 9,000 steps, 2 min)"
    twice = trial(errors={"mnist": 0.004, "affine_mnist": 0.2})
    expected = "0.40 on mnist, 20.00 on affine MNIST (1 seed, 9,000 steps, 1 min)"
    assert measured(recipe, [twice], {"affine_mnist": "affine MNIST"}) == expected
