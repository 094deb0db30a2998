"""Trials of recipes: the same as `train` makes, all at once, and gone on with after a cut."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from capsjax.training.recipes import TABLES, Recipe
from capsjax.training.tables import ReproduceConfig, Results, ensemble_error, markdown
from capsjax.training.trials import Trials

from capsjax import models
from capsjax.data import Dataset, Pairs, Placed, Split, save_npz, source_of
from capsjax.training import ConfigError, TrainConfig, reproduce, train

from .test_loop import parameters
from .test_tasks import made

MODEL = {
    "conv_features": 8,
    "conv_strides": 3,
    "primary_types": 2,
    "primary_features": 4,
    "primary_kernel": 3,
    "class_features": 4,
    "decoder_features": (16,),
}
RECIPE = Recipe(name="tiny", title="tiny", preset="paper", model=MODEL, steps=25, batch_size=16)


def trials(digits, folder, seeds=(0, 1), recipe=RECIPE, **options):
    return Trials(recipe, digits, seeds, folder, **options)


def quiet(_):
    pass


def interrupt(_):
    raise KeyboardInterrupt


def test_trials_are_what_train_makes_with_their_seeds(digits, tiny, tmp_path):
    both = trials(digits, tmp_path / "trials")
    found = both.run(say=quiet)
    for n, seed in enumerate((0, 1)):
        config = TrainConfig(
            run_dir=tmp_path / f"run{seed}",
            steps=25,
            batch_size=16,
            validation=0,
            seed=seed,
            preset="paper",
            driver="jit",
            tensorboard=False,
        )
        result = train(config, model=tiny, dataset=digits)
        _, state = parameters(tmp_path / f"run{seed}")
        # A checkpoint has names where the tree has numbers.
        ours, theirs = jax.tree.leaves(both.states.params), jax.tree.leaves(state["params"])
        for a, b in zip(ours, theirs, strict=True):
            # Mapped over trials products are ordered otherwise, and Adam divides by small numbers.
            np.testing.assert_allclose(a[n], b, atol=1e-3)
        assert (found[n].seed, found[n].steps, found[n].together) == (seed, 25, 2)
        assert found[n].counts == {"mnist_5k": 101}
        assert abs(found[n].errors["mnist_5k"] - result.test.error) <= 2 / 101


def test_a_cut_run_is_gone_on_with_to_the_same_bits(digits, tmp_path):
    whole = trials(digits, tmp_path / "whole")
    whole.run(say=quiet)
    cut = trials(digits, tmp_path / "cut")
    assert cut.run(seconds=0, say=quiet) is None
    with pytest.raises(KeyboardInterrupt):
        cut.run(say=interrupt)
    assert 0 < cut.done < 25
    again = trials(digits, tmp_path / "cut")
    assert again.done == cut.done
    assert again.run(say=quiet) is not None
    jax.tree.map(np.testing.assert_array_equal, again.states, whole.states)
    curve = (tmp_path / "cut" / "tiny-seeds-0-1.curve.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in curve]
    assert steps == sorted(set(steps))
    assert steps[-1] == 25


def test_training_ends_where_the_held_out_images_are_told_well_enough(digits, tmp_path):
    recipe = dataclasses.replace(RECIPE, until_error=0.95, steps=1000)
    (done,) = trials(digits, tmp_path, (0,), recipe).run(say=quiet)
    assert done.steps < 1000
    other = made(digits, Placed(28))
    both = trials(
        digits, tmp_path / "both", (0,), recipe, others=[dataclasses.replace(other, name="placed")]
    )
    (done,) = both.run(say=quiet)
    assert set(done.errors) == {"mnist_5k", "placed"}


def test_pairs_are_trained_and_the_mean_of_networks_is_measured(digits, tmp_path):
    dataset = made(digits, Pairs())
    both = trials(dataset, tmp_path, recipe=dataclasses.replace(RECIPE, steps=3))
    (first, _) = both.run(say=quiet)
    scores, labels = both.scores(dataset)
    assert scores.shape == (2, 101, 10)
    assert labels.shape == (101, 2)
    alone = ensemble_error(scores[:1], labels)
    assert alone == pytest.approx(first.errors["made"])


def test_a_damaged_or_foreign_file_is_named(digits, tmp_path):
    trials(digits, tmp_path).run(say=quiet)
    path = tmp_path / "tiny-seeds-0-1.npz"
    other = dataclasses.replace(RECIPE, model={**MODEL, "conv_features": 9})
    with pytest.raises(
        ConfigError, match="is of model {'conv_features': 8, .* not {'conv_features'"
    ):
        trials(digits, tmp_path, recipe=other)
    other = dataclasses.replace(RECIPE, learning_rate=0.5)
    with pytest.raises(ConfigError, match="is of learning rate 0.001, not 0.5; move it away"):
        trials(digits, tmp_path, recipe=other)
    fewer = dataclasses.replace(digits, train=Split(*(x[:100] for x in digits.train)))
    with pytest.raises(ConfigError, match="is of data {'name': 'mnist_5k', .*'train_images': 180"):
        trials(fewer, tmp_path)
    whole = path.read_bytes()
    with np.load(path) as stored:
        arrays = {k: v.astype(np.float64) if k != "about" else v for k, v in stored.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ConfigError, match="is of another network"):
        trials(digits, tmp_path)
    for content in (b"", whole[:500], b"no zip"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="is damaged"):
            trials(digits, tmp_path)
    with path.open("wb") as file:
        np.savez(file, about=np.array("{}"))
    with pytest.raises(ConfigError, match="is damaged: 'of'"):
        trials(digits, tmp_path)


@pytest.fixture
def table(monkeypatch, digits):
    """A table of two small rows, on the small set."""
    rows = (
        dataclasses.replace(RECIPE, name="one", title="the first", published=0.25, spread=0.005),
        dataclasses.replace(RECIPE, name="two", title="the second"),
    )
    monkeypatch.setitem(TABLES, "small", rows)
    monkeypatch.setattr("capsjax.training.tables.load", lambda name, data_dir: digits)
    return rows


def test_a_table_is_filled_row_by_row_and_seed_by_seed(table, tmp_path):
    config = ReproduceConfig(table="small", seeds=2, steps=12, output=tmp_path)
    said = []
    rows = reproduce(config, say=said.append)
    assert [(row.recipe.name, len(row.errors), row.steps) for row in rows] == [
        ("one", 2, 12),
        ("two", 2, 12),
    ]
    text = (tmp_path / "small-12-float32.md").read_text()
    assert "| the first | mnist_5k | 12 |  |" in text
    assert "(n = 2)" in text
    # Again: nothing is trained. With a third seed: only that one.
    said.clear()
    assert reproduce(config, say=said.append) == rows
    assert said == []
    more = reproduce(dataclasses.replace(config, seeds=3, rows=("two",)), say=said.append)
    assert [len(row.errors) for row in more] == [3]
    assert sum("seed" in line for line in said) == 1
    # The table on disk has the other row, too.
    assert (tmp_path / "small-12-float32.md").read_text().count("mnist_5k") == 2


def test_trials_of_other_images_are_not_taken_for_these(table, monkeypatch, digits, tmp_path):
    config = ReproduceConfig(table="small", seeds=1, steps=2, output=tmp_path)
    reproduce(config, say=quiet)
    inverse = Split(255 - digits.train.images, digits.train.labels)
    other = dataclasses.replace(digits, train=inverse)
    monkeypatch.setattr("capsjax.training.tables.load", lambda name, data_dir: other)
    with pytest.raises(ConfigError, match="results.jsonl is of data .* another --output"):
        reproduce(config, say=quiet)


def test_a_place_that_cannot_be_written_is_named_before_training(table, tmp_path):
    (tmp_path / "file").touch()
    config = ReproduceConfig(table="small", output=tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="--output .*out cannot be written"):
        reproduce(config, say=quiet)


def test_two_commands_may_add_to_one_file(tmp_path):
    config = ReproduceConfig(table="small")
    both = [Results(tmp_path / "results.jsonl") for _ in range(2)]
    for n, results in enumerate(both):
        results.add(config, {"recipe": "affine", "seed": n, "steps": 1, "errors": {"made": 0.5}})
    assert [len(results.rows(config)[0].errors) for results in both] == [2, 2]


def test_the_time_is_kept_and_the_same_command_goes_on(table, tmp_path):
    config = ReproduceConfig(table="small", seeds=1, steps=40, output=tmp_path, seconds=1e-9)
    said = []
    assert reproduce(config, say=said.append) == []
    assert "the same command goes on" in said[-1]
    rows = reproduce(dataclasses.replace(config, seconds=None), say=said.append)
    assert [row.steps for row in rows] == [40, 40]


def test_an_ensemble_is_of_all_seeds_however_they_were_trained(table, monkeypatch, tmp_path):
    (row, _) = table
    row = dataclasses.replace(row, ensemble=True)
    monkeypatch.setitem(TABLES, "small", (row,))
    apart = ReproduceConfig(table="small", seeds=3, steps=5, output=tmp_path / "a", together=2)
    single, ensemble = reproduce(apart, say=quiet)
    assert (single.title, len(single.errors), single.published) == ("the first", 3, "")
    assert (ensemble.title, ensemble.published) == ("the first, ensemble of 3", "0.25 ± 0.005")
    together = dataclasses.replace(apart, output=tmp_path / "b", together=3)
    assert reproduce(together, say=quiet)[1].errors == pytest.approx(ensemble.errors, abs=0.5)
    assert reproduce(apart, say=quiet) == [single, ensemble]
    next((tmp_path / "a").rglob("*.scores.npz")).unlink()
    with pytest.raises(ConfigError, match="scores of a finished trial cannot be read"):
        reproduce(dataclasses.replace(apart, seeds=4), say=quiet)


def test_a_result_that_was_cut_off_is_done_again(tmp_path):
    path = tmp_path / "results.jsonl"
    result = {"recipe": "affine", "seed": 0, "steps": 1, "errors": {}}
    whole = json.dumps({"table": "small", **result})
    path.write_text(whole + '\n{"table"')
    results = Results(path)
    results.add(ReproduceConfig(table="small"), {**result, "seed": 1})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    for bad in (b'{"table"', b"5", b"[]", b'{"table": "small", "recipe": "affine"}', b"\xff"):
        path.write_bytes(bad + b"\n" + whole.encode() + b"\n")
        with pytest.raises(ConfigError, match="results.jsonl:1 is no result"):
            Results(path)


def test_the_table_shows_mean_deviation_and_number():
    row = reproduce_row(errors=(0.2, 0.3, 0.25))
    assert "| 0.25 ± 0.005 | 0.25 ± 0.050 (n = 3) |" in markdown([row])


def reproduce_row(errors):
    from capsjax.training.tables import RowResult

    recipe = Recipe(name="r", title="row", published=0.25, spread=0.005)
    return RowResult(recipe, "mnist", 300_000, errors)


_BARE = """
import importlib.abc, pathlib, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"tyro", "tensorflow_datasets", "grain", "matplotlib", "PIL"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from capsjax.training import ReproduceConfig, reproduce

data, output = map(pathlib.Path, sys.argv[1:])
for _ in range(2):
    (row,) = reproduce(ReproduceConfig(
        table="small", rows=("mnist",), steps=2, seeds=2, together=2, data_dir=data, output=output))
print(row.text)
"""


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
    said = run.stdout.splitlines()
    assert said[-1].endswith("(n = 2)")
    assert sum("step 2 of 2" in line for line in said) == 1


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
        ({"rows": ("none",)}, "--rows: table mnist has baseline, .*, no 'none'"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ConfigError, match=match):
        ReproduceConfig(table="mnist", **options)
