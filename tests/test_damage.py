"""Damaged files are refused in one line that names them; what is read of one is possible.

``python -m pytest -m slow tests/test_damage.py`` damages two thousand.
"""

import gc
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capsjax import models
from capsjax.bench import Row, Run, append_rows, compare_rows, read_rows
from capsjax.data import Dataset, Split, load, save_npz
from capsjax.errors import CapsjaxError, DataError
from capsjax.reproduce import TABLES
from capsjax.reproduce.results import Line, add_result, read_results, rows_of
from capsjax.training import Checkpoints, TrainConfig, TrainState
from capsjax.training.data_description import DataDescription
from capsjax.training.files import write_json
from capsjax.training.run_directory import RunConfig, RunDirectory
from capsjax.viz.explorer import read_image

STATE = TrainState(jnp.int32(3), {"w": jnp.ones((2, 3))}, {}, {"m": jnp.zeros(2)})
TIMES = Run(
    median_seconds=0.2,
    least_seconds=0.1,
    most_seconds=0.3,
    first_seconds=(1.0,),
    medians=(0.2,),
    calls=((0.1, 0.2, 0.3),),
)
ROWS = [
    Row(cell=cell, workload="squash", parameters={}, target="cpu", run=TIMES) for cell in ("a", "b")
]


def read_config(path):
    RunDirectory(path.parent).read_config().to_json()


def read_metrics(path):
    for record in RunDirectory(path.parent).read_metrics():
        assert record["step"] >= 0
        assert 0 <= record["error"] <= 1 if record["error"] is not None else True


def read_result(path):
    result = RunDirectory(path.parent).read_result()
    assert 0 <= result.test_wrong / result.test_count <= 1


def read_trials(path):
    for row in rows_of(TABLES["small"][0], read_results(path)):
        assert all(0 <= error <= 100 for error in row.errors)


def read_benchmark(path):
    compare_rows(ROWS, read_rows(path))


def read_npz(path):
    found = load("mnist", data_dir=path)
    np.testing.assert_array_equal(found.train.images, few().train.images)
    np.testing.assert_array_equal(found.test.labels, few().test.labels)


def read_png(path):
    try:
        pixels = read_image(path.read_bytes(), (28, 28, 1))
    except ValueError as error:  # which the explorer answers
        raise DataError(f"{path}: {error}") from None
    assert (pixels.shape, pixels.dtype) == ((28, 28, 1), np.uint8)


def read_checkpoint(path):
    checkpoints = Checkpoints(path, read_only=True)
    try:
        checkpoints.choose("best")
        restored = checkpoints.restore(checkpoints.choose("last"), STATE)
    finally:
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)


READERS = {
    "config.json": read_config,
    "metrics.jsonl": read_metrics,
    "result.json": read_result,
    "results.jsonl": read_trials,
    "rows.jsonl": read_benchmark,
    "digits.npz": read_npz,
    "image.png": read_png,
    "checkpoints": read_checkpoint,
}


def few():
    digits = load("mnist_5k")
    split = Split(digits.test.images[:12], digits.test.labels[:12])
    return Dataset("mnist", split, split, digits.class_names)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of each file as it was written."""
    run = RunDirectory(tmp_path_factory.mktemp("whole"))
    data = DataDescription.of(few())
    run.write_config(RunConfig(TrainConfig(), models.configure("small"), data))
    for step in (1, 2, 3):
        values = {"seconds": 0.5, "loss": 1 / step, "error": 0.5}
        run.append_metrics({"split": "train", "step": step, **values})
    result = {"step": 3, "test_wrong": 1, "test_count": 12, "validation_error": 0.2, "seconds": 2.5}
    write_json(run.result, result)
    for seed in (0, 1):
        of = {"errors": {"mnist": 0.25}, "counts": {"mnist": 12}, "seconds": 1.5}
        add_result(run.path / "results.jsonl", Line(table="small", recipe="mnist", seed=seed, **of))
    append_rows(run.path / "rows.jsonl", ROWS)
    save_npz(few(), run.path / "digits.npz")
    Image.fromarray(few().test.images[0, ..., 0]).save(run.path / "image.png")
    checkpoints = Checkpoints(run.checkpoints)
    for step in (2, 3):
        checkpoints.save(STATE, step, 1 / step)
    checkpoints.finish()
    checkpoints.close()
    return run.path


FRACTIONS = st.floats(0, 1, exclude_max=True)
WRONG = [None, True, -1, -0.5, 0.5, 10**30, "x", "1", [], [[]], {}]
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), FRACTIONS),
    st.tuples(st.just("overwrite"), FRACTIONS, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("insert"), FRACTIONS, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("remove"), FRACTIONS, st.integers(1, 20)),
    st.tuples(st.just("nest"), FRACTIONS),
    st.tuples(st.just("forget"), FRACTIONS),
    st.tuples(st.just("replace"), FRACTIONS, st.sampled_from(WRONG)),
)


def damaged(data, kind, where, what=None):
    """The bytes of a file with one fault."""
    at = int(where * len(data))
    match kind:
        case "cut":
            return data[:at]
        case "overwrite":
            return data[:at] + what + data[at + len(what) :]
        case "insert":
            return data[:at] + what + data[at:]
        case "remove":
            return data[:at] + data[at + what :]
        case "nest":
            return data[:at] + b"[" * 100_000
    try:
        lines = [json.loads(data)]
    except ValueError:
        try:
            lines = [json.loads(line) for line in data.splitlines()]
        except ValueError:  # neither JSON nor lines of it
            return data[:at]
    places = list(inner(lines))
    if not places:
        return b"[]"
    values, key = places[int(where * len(places))]
    if kind == "forget":
        del values[key]
    else:
        values[key] = what
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def inner(values):
    """Every value in nested values, by what holds it."""
    if isinstance(values, dict | list):
        for key in values if isinstance(values, dict) else range(len(values)):
            yield values, key
            yield from inner(values[key])


def check(whole, name, which, damage):
    """Damages one file, and reads it."""
    path = whole / name
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    file = files[int(which * len(files))]
    before, refusal = file.read_bytes(), None
    file.write_bytes(damaged(before, *damage))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[name](path)
    except CapsjaxError as error:
        refusal = str(error)
    finally:
        file.write_bytes(before)
    assert refusal is None or (str(path) in refusal and "\n" not in refusal)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Orbax drops coroutines when a read fails; the command line does not report them either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _: None)
        yield
        gc.collect()


CASES = {"name": st.sampled_from(list(READERS)), "which": FRACTIONS, "damage": DAMAGE}


@given(**CASES)
@settings(max_examples=100, deadline=None)
def test_a_hundred_damaged_files(whole, name, which, damage):
    check(whole, name, which, damage)


@pytest.mark.slow
@given(**CASES)
@settings(max_examples=2000, deadline=None)
def test_two_thousand_damaged_files(whole, name, which, damage):
    check(whole, name, which, damage)


@pytest.mark.parametrize("name", READERS)
def test_undamaged_files_are_read(whole, name):
    READERS[name](whole / name)
