"""Tables: every seed is an ordinary run, finished ones are listed, interrupted ones go on."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from capsjax import models
from capsjax.data import Dataset, Placed, Split, is_right, save_npz, source_of
from capsjax.reproduce import TABLES, Recipe, ReproduceConfig, RowResult, reproduce
from capsjax.reproduce.results import (
    Line,
    add_result,
    check_alike,
    describe,
    markdown,
    read_results,
)
from capsjax.training import (
    ConfigError,
    EvaluateConfig,
    TrainConfig,
    evaluate,
    load_network,
    predict_test,
    train,
)
from capsjax.training.reporting import Report
from capsjax.training.run_directory import RunDirectory

MODEL = {
    "conv_features": 8,
    "conv_strides": 3,
    "primary_types": 2,
    "primary_features": 4,
    "primary_kernel": 3,
    "class_features": 4,
    "decoder_features": (),
}
RECIPE = Recipe(
    table="small",
    name="tiny",
    title="tiny",
    dataset="mnist_5k",
    preset="paper",
    model=MODEL,
    steps=25,
    batch_size=16,
)


def quiet(_):
    pass


@pytest.fixture(scope="module")
def _table(digits):
    """A table of two small rows, on the small set."""
    rows = (
        dataclasses.replace(RECIPE, name="one", title="the first", published=0.25, spread=0.005),
        dataclasses.replace(RECIPE, name="two", title="the second"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "small", rows)
        for module in ("reproduce.tables", "training.inputs"):
            patch.setattr(f"capsjax.{module}.load", lambda name, **_: digits)
        yield rows


@pytest.fixture
def table(_table, monkeypatch):
    """The same; what a test changes of it is undone."""
    monkeypatch.setitem(TABLES, "small", _table)
    return _table


def options(tmp_path, **others):
    return ReproduceConfig(**{"table": "small", "output": tmp_path, **others})


@pytest.fixture(scope="module")
def _filled(_table, tmp_path_factory):
    config = options(tmp_path_factory.mktemp("filled"), seeds=2, steps=12, together=2)
    return config, reproduce(config, say=quiet)


@pytest.fixture
def filled(_filled, table, tmp_path):
    """The table after two seeds of each row, trained together; a copy."""
    config, rows = _filled
    shutil.copytree(config.output, tmp_path / "filled")
    return dataclasses.replace(config, output=tmp_path / "filled"), rows


def test_a_table_is_filled_row_by_row_and_seed_by_seed(filled):
    config, rows = filled
    assert [(row.recipe.name, len(row.errors), row.steps) for row in rows] == [
        ("one", 2, 12),
        ("two", 2, 12),
    ]
    text = config.folder.with_suffix(".md").read_text()
    assert "| the first | mnist_5k | 12 | 0.25 ± 0.005 |" in text
    assert "(n = 2)" in text
    # Again: nothing is trained. With a third seed: only that one.
    said = []
    assert reproduce(config, say=said.append) == rows
    assert said == []
    more = reproduce(dataclasses.replace(config, seeds=3, rows=("two",)), say=said.append)
    assert [len(row.errors) for row in more] == [3]
    assert sum("seed" in line for line in said) == 1
    # The table on disk has the other row, too.
    assert config.folder.with_suffix(".md").read_text().count("mnist_5k") == 2
    lines = read_results(config.results)
    assert [line.seed for line in lines] == [0, 1, 0, 1, 2]
    assert [line.together for line in lines] == [2, 2, 2, 2, 1]
    assert all(line.seconds > 0 for line in lines)


def test_each_trial_is_a_run_that_other_commands_open(filled, digits):
    config, rows = filled
    for line in read_results(config.results)[:2]:
        run = config.output / line.run
        loaded = load_network(run)
        assert loaded.step == 12
        found = evaluate(EvaluateConfig(run_dir=run, batch_size=16, driver="jit"), dataset=digits)
        assert found.test.error == line.errors["mnist_5k"]
        assert 100 * found.test.error == rows[0].errors[line.seed]
    resumed = dataclasses.replace(RunDirectory(run).read_config().train, steps=14)
    assert train(resumed, dataset=digits).step == 14


def test_a_trial_is_what_train_makes_with_its_seed(filled, table, digits, tiny, tmp_path):
    config, _ = filled
    alone = TrainConfig(
        run_dir=tmp_path / "alone",
        steps=12,
        batch_size=16,
        validation=0,
        seed=1,
        preset="paper",
        driver="jit",
        tensorboard=False,
    )
    result = train(alone, model=tiny, dataset=digits)
    line = read_results(config.results)[1]
    assert (line.seed, line.steps) == (1, 12)
    assert line.counts == {"mnist_5k": 101}
    assert abs(line.errors["mnist_5k"] - result.test.error) <= 2 / 101


def test_an_interrupted_command_saves_and_goes_on(table, tmp_path, monkeypatch):
    config = options(tmp_path, rows=("one",), seeds=2, together=2, steps=25)

    def interrupt(self, step, *_):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reproduce(config, say=quiet)
    runs = [RunDirectory(config.folder / f"one-seed-{seed}") for seed in (0, 1)]
    saved = [[int(p.name) for p in run.checkpoints.iterdir()] for run in runs]
    assert saved[0] == saved[1]
    assert 3 <= saved[0][0] < 25
    assert read_results(config.results) == []
    (row,) = reproduce(config, say=quiet)
    assert (row.steps, len(row.errors)) == (25, 2)
    # Interrupted again, between the end of a run and its line.
    config.results.unlink()
    said = []
    (again,) = reproduce(config, say=said.append)
    assert again == row
    assert sum("seed" in line for line in said) == 2


def test_training_ends_where_the_validation_error_is_small_enough(
    table, digits, monkeypatch, tmp_path
):
    placed = Dataset("placed", *digits_of(digits), digits.class_names, Placed(28))
    monkeypatch.setattr(
        "capsjax.reproduce.tables.load",
        lambda name, **_: placed if name == "expanded_mnist" else digits,
    )
    row = dataclasses.replace(
        table[0], until_error=0.95, steps=1000, also_tested_on="expanded_mnist"
    )
    monkeypatch.setitem(TABLES, "small", (row,))
    rows = reproduce(options(tmp_path, seeds=1), say=quiet)
    assert [each.dataset for each in rows] == ["mnist_5k", "placed"]
    assert rows[0].steps < 1000


def digits_of(digits):
    return digits.train, digits.test


def test_results_that_were_trained_differently_are_refused(filled, monkeypatch, digits):
    config, _ = filled
    inverse = Split(255 - digits.train.images, digits.train.labels)
    other = dataclasses.replace(digits, train=inverse)
    with monkeypatch.context() as patch:
        patch.setattr("capsjax.reproduce.tables.load", lambda name, **_: other)
        with pytest.raises(ConfigError, match="has results with data .* another --output"):
            reproduce(config, say=quiet)
        config.results.unlink()  # the runs are checked as well
        with pytest.raises(ConfigError, match="not the one that the run was started with"):
            reproduce(config, say=quiet)
    (first, second) = TABLES["small"]
    for changed, match in (
        ({"learning_rate": 0.5}, "--learning-rate must stay 0.001 .* got 0.5"),
        ({"model": {**MODEL, "conv_features": 9}}, "trains another network: CapsNetConfig"),
    ):
        monkeypatch.setitem(TABLES, "small", (dataclasses.replace(first, **changed), second))
        with pytest.raises(ConfigError, match=match):
            reproduce(config, say=quiet)


def test_results_of_an_earlier_version_describe_less(digits):
    now = describe(RECIPE, digits)
    less = {k: v for k, v in now["data"].items() if not k.startswith("test_") and k != "task"}
    line = Line(table="small", recipe="tiny", seed=0, errors={"": 0.5}, of={**now, "data": less})
    check_alike(line, now, Path("results.jsonl"))
    line.of["data"]["checksum"] += 1
    with pytest.raises(ConfigError, match="has results with data .* another --output"):
        check_alike(line, now, Path("results.jsonl"))


def test_a_place_that_cannot_be_written_is_named_before_training(table, tmp_path):
    (tmp_path / "file").touch()
    config = ReproduceConfig(table="small", output=tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="--output .*out cannot be written"):
        reproduce(config, say=quiet)


def test_a_seed_is_counted_once_however_many_commands_add_it(tmp_path):
    path = tmp_path / "results.jsonl"
    line = Line(table="small", recipe="affine", seed=0, steps=1, errors={"made": 0.5})
    assert add_result(path, line)
    assert not add_result(path, line)
    assert add_result(path, Line(table="small", recipe="affine", ensemble=2, error=0.5))
    assert [(x.seed, x.ensemble) for x in read_results(path)] == [(0, None), (None, 2)]


def test_a_seed_that_another_command_trains_is_left_to_it(table, tmp_path):
    config = options(tmp_path, rows=("two",), seeds=2, steps=2)
    config.folder.mkdir()
    said = []
    with FileLock(config.folder / "two-seed-0.lock"):
        (row,) = reproduce(config, say=said.append)
    assert len(row.errors) == 1
    assert said[-1] == "two: another command is training seeds [0]"
    (row,) = reproduce(config, say=quiet)
    assert len(row.errors) == 2


def test_the_time_is_kept_and_the_same_command_goes_on(table, tmp_path, monkeypatch):
    config = options(tmp_path, rows=("one",), seeds=1, steps=40, seconds=1e-9)
    said = []
    assert reproduce(config, say=said.append) == []
    assert "run the same command to continue" in said[-1]
    (row,) = reproduce(dataclasses.replace(config, seconds=None), say=said.append)
    assert row.steps == 40


def test_an_ensemble_is_of_all_seeds_however_they_were_trained(
    table, monkeypatch, tmp_path, digits
):
    row = dataclasses.replace(table[0], ensemble=True)
    monkeypatch.setitem(TABLES, "small", (row,))
    config = options(tmp_path, seeds=3, steps=5, together=2)
    single, ensemble = reproduce(config, say=quiet)
    assert (single.title, len(single.errors), single.published) == ("the first", 3, "")
    assert (ensemble.title, ensemble.published) == ("the first, ensemble of 3", "0.25 ± 0.005")
    runs = [config.folder / f"one-seed-{seed}" for seed in range(3)]
    found = [
        predict_test(EvaluateConfig(run_dir=run, driver="jit"), dataset=digits) for run in runs
    ]
    for (scores, labels), error in zip(found, single.errors, strict=True):
        assert scores.shape == (101, 10)
        np.testing.assert_array_equal(labels, digits.test.labels)
        assert 100 * float(1 - np.mean(is_right(scores, labels))) == pytest.approx(error)
    mean = np.mean([scores for scores, _ in found], axis=0)
    expected = 100 * np.mean(np.argmax(mean, axis=1) != digits.test.labels)
    assert ensemble.errors[0] == pytest.approx(expected)
    assert reproduce(config, say=quiet) == [single, ensemble]


def test_rows_are_listed_with_their_own_results(filled, tmp_path):
    config, _ = filled
    said = []
    assert reproduce(options(config.output, list=True), say=said.append) == []
    text = "\n".join(said)
    assert "capsjax reproduce small --rows one --data-dir DIR" in text
    assert "paper 0.25 ± 0.005; here " in text
    assert "(2 seeds, 12 of 25 steps, 0 min)" in text
    assert "RESULTS.md" in text
    elsewhere = options(tmp_path / "nothing", list=True, rows=("two",))
    reproduce(elsewhere, say=said.append)
    assert "paper none; here not run" in said[-2]
    assert not elsewhere.output.exists()


def test_a_result_that_was_cut_off_is_done_again(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = json.dumps({"table": "small", "recipe": "affine", "seed": 0, "errors": {"made": 0.5}})
    path.write_text(whole + '\n{"table"')
    add_result(path, Line(table="small", recipe="affine", seed=1, errors={"made": 0.5}))
    assert [line.seed for line in read_results(path)] == [0, 1]
    for bad in (b'{"table"', b"5", b"[]", b'{"table": "small", "recipe": "affine"}', b"\xff"):
        path.write_bytes(bad + b"\n" + whole.encode() + b"\n")
        with pytest.raises(ConfigError, match="results.jsonl:1 is damaged: "):
            read_results(path)


def test_the_table_shows_mean_deviation_and_number():
    recipe = Recipe(name="r", title="row", published=0.25, spread=0.005)
    row = RowResult(recipe, "mnist", 300_000, (0.2, 0.3, 0.25))
    assert "| 0.25 ± 0.005 | 0.25 ± 0.050 (n = 3) |" in markdown([row])


_BARE = """
import dataclasses, importlib.abc, pathlib, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"tyro", "tensorflow_datasets", "grain", "matplotlib", "PIL"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from capsjax.reproduce import TABLES, ReproduceConfig, reproduce

tiny = {"conv_features": 8, "primary_types": 1, "decoder_features": (8,)}
TABLES["small"] = (dataclasses.replace(TABLES["small"][0], model=tiny, batch_size=16),)
data, output = map(pathlib.Path, sys.argv[1:])
for _ in range(2):
    (row,) = reproduce(ReproduceConfig(
        table="small", rows=("mnist",), steps=2, seeds=2, together=2, data_dir=data, output=output))
print(row.text)
"""


# In the gate, test_sources.py loads data without them, and test_floors.py imports layers.
@pytest.mark.slow
def test_a_bare_machine_will_do(digits, tmp_path):
    save_npz(dataclasses.replace(digits, name="mnist"), tmp_path / "digits.npz")
    run = subprocess.run(
        [sys.executable, "-c", _BARE, tmp_path / "digits.npz", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].endswith("(n = 2)")
    assert run.stderr.count("step 2 of 2") == 1


@pytest.mark.parametrize("recipe", [r for t in TABLES.values() for r in t], ids=lambda r: r.name)
def test_every_recipe_makes_a_network(recipe):
    shapes = {
        "multi_mnist": (36, 36, 1),
        "expanded_mnist": (40, 40, 1),
        "cifar10": (24, 24, 3),
        "svhn_cropped": (32, 32, 3),
        "smallnorb": (32, 32, 2),
    }
    model = recipe.configure(image_shape=shapes.get(recipe.dataset, (28, 28, 1)))
    assert isinstance(model, models.ModelConfig)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [r for t in TABLES.values() for r in t], ids=lambda r: f"{r.table}-{r.name}"
)
def test_every_row_runs_in_miniature(recipe, tmp_path):
    """One step of its command, on noise in the set's shape."""
    shapes = {"cifar10": (32, 32, 3), "svhn_cropped": (32, 32, 3), "smallnorb": (48, 48, 2)}
    shape = shapes.get(recipe.dataset, (28, 28, 1))
    classes = 5 if recipe.dataset == "smallnorb" else 10
    rng = np.random.default_rng(0)
    splits = [
        Split(
            rng.integers(0, 256, (n, *shape), np.uint8), (np.arange(n) % classes).astype(np.int32)
        )
        for n in (160, 20)
    ]
    noise = Dataset(source_of(recipe.dataset), *splits, tuple("0123456789"[:classes]))
    save_npz(noise, tmp_path / "noise.npz")
    config = ReproduceConfig(
        table=recipe.table,
        rows=(recipe.name,),
        seeds=2 if recipe.ensemble else 1,
        steps=1,
        data_dir=tmp_path / "noise.npz",
        output=tmp_path / "out",
    )
    rows = reproduce(config, say=quiet)
    assert len(rows) == 1 + recipe.ensemble + (recipe.also_tested_on is not None)
    assert all(row.steps == 1 and row.recipe == recipe for row in rows)


def test_names_of_rows_are_unique():
    for recipes in TABLES.values():
        assert len({r.name for r in recipes}) == len(recipes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"seconds": 0}, "--seconds must be positive, got 0"),
        ({"rows": ("none",)}, "--rows must be among baseline, .*, got 'none'"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ConfigError, match=match):
        ReproduceConfig(table="mnist", **options)
