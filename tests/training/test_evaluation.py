"""A run is read with its own data, or with others whose classes have the same names."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from runs import write_run

from capsjax.data import Dataset, Placed, Split
from capsjax.training import (
    CheckpointError,
    ConfigError,
    EvaluateConfig,
    Evaluation,
    TrainConfig,
    choices,
    evaluate,
    hold_out,
    load_network,
    predict_test,
    train,
)
from capsjax.training.data_description import DataDescription
from capsjax.training.inputs import fits
from capsjax.training.loading import load_own
from capsjax.training.run_directory import RunConfig


@pytest.fixture(scope="module")
def galaxies(digits):
    return dataclasses.replace(digits, name="galaxies")


@pytest.fixture(scope="module")
def run(tmp_path_factory, galaxies, tiny):
    """A run on data that no name loads."""
    return write_run(tmp_path_factory.mktemp("runs") / "own", galaxies, tiny)


def options(run, **others):
    return EvaluateConfig(run_dir=run.path, batch_size=16, driver="jit", **others)


def resumed(run, **others):
    started = run.read_config().train
    return dataclasses.replace(started, steps=3, **others)


def reordered(dataset):
    """The same images, with the classes in another order."""
    order = np.random.default_rng(0).permutation(dataset.num_classes)
    new = np.argsort(order).astype(np.int32)
    return dataclasses.replace(
        dataset,
        train=dataset.train._replace(labels=new[dataset.train.labels]),
        test=dataset.test._replace(labels=new[dataset.test.labels]),
        class_names=tuple(dataset.class_names[n] for n in order),
    )


def test_data_that_no_name_loads_have_to_be_given(run, galaxies):
    for read in (
        lambda: evaluate(options(run)),
        lambda: predict_test(options(run)),
        lambda: load_network(run.path),
        lambda: train(resumed(run)),
    ):
        with pytest.raises(ConfigError, match=r"given in Python, galaxies; pass it as dataset="):
            read()
    assert load_network(run.path, dataset=galaxies).dataset is galaxies


def test_classes_are_matched_by_name(run, galaxies, tmp_path):
    predictions = tmp_path / "predictions.csv"
    scores, labels = predict_test(
        options(run, predictions=predictions), dataset=reordered(galaxies)
    )
    np.testing.assert_array_equal(labels, galaxies.test.labels)
    rows = list(csv.DictReader(predictions.read_text().splitlines()))
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [int(row["prediction"]) for row in rows] == scores.argmax(1).tolist()
    assert float(rows[3]["score of 7"]) == scores[3, 7]
    words = dataclasses.replace(galaxies, class_names=("zero", *galaxies.class_names[1:]))
    with pytest.raises(ConfigError, match="class 'zero', which is not among the run's classes: 0,"):
        evaluate(options(run), dataset=words)


def test_predictions_name_the_files_of_images(run, galaxies, tmp_path):
    predictions = tmp_path / "predictions.csv"
    files = [f"{n}.png" for n in range(len(galaxies.test.images) - 1)] + ["n\udcfc.png"]
    dataset = dataclasses.replace(galaxies, test_files=files)
    predict_test(options(run, predictions=predictions), dataset=dataset)
    text = predictions.read_text(errors="surrogateescape")  # file names need not be UTF-8
    assert [row["image"] for row in csv.DictReader(text.splitlines())] == files
    # Generated test images are in another order, and as many as wanted.
    made = dataclasses.replace(dataset, task=Placed(galaxies.image_shape[0]))
    for number in (len(files) - 1, len(files) + 1):
        predict_test(options(run, predictions=predictions, test_size=number), dataset=made)
        lines = csv.DictReader(predictions.read_text().splitlines())
        assert [line["image"] for line in lines] == [str(n) for n in range(number)]
    with pytest.raises(ValueError, match="test_files must name all [0-9]+ test images, got 1"):
        dataclasses.replace(galaxies, test_files=("0.png",))


def test_with_predictions_the_evaluation_is_the_same(run, galaxies, tmp_path):
    counted = evaluate(options(run), dataset=galaxies).test
    predicting = options(run, predictions=tmp_path / "predictions.csv")
    summarised = evaluate(predicting, dataset=galaxies).test
    assert summarised.loss == pytest.approx(counted.loss, rel=1e-5)
    assert dataclasses.replace(summarised, loss=counted.loss) == counted


def test_some_of_the_classes_will_do(digits):
    few = Split(digits.test.images[:3], np.array([0, 1, 0], np.int32))
    matched = choices.match_classes(Dataset("few", few, few, ("7", "4")), digits.class_names)
    assert matched.test.labels.tolist() == [7, 4, 7]
    assert matched.num_classes == 10
    several = Split(few.images, np.array([[1, 0], [1, 1], [0, 0]], bool))
    dataset = Dataset("several", several, several, ("7", "4"))
    matched = choices.match_classes(dataset, digits.class_names)
    assert [np.flatnonzero(row).tolist() for row in matched.test.labels] == [[7], [4, 7], []]


def test_predictions_of_several_classes_name_as_many_as_there_are(run, galaxies, tmp_path):
    predictions = tmp_path / "predictions.csv"
    several = Split(galaxies.test.images[:2], np.zeros((2, 10), bool))
    several.labels[0, [2, 5]] = True
    dataset = dataclasses.replace(galaxies, train=several, test=several)
    scores, labels = predict_test(options(run, predictions=predictions), dataset=dataset)
    np.testing.assert_array_equal(labels, several.labels)
    first, second = csv.DictReader(predictions.read_text().splitlines())
    largest = sorted(np.argsort(-scores[0])[:2].tolist())
    assert (first["label"], first["prediction"]) == ("2+5", "+".join(map(str, largest)))
    assert (second["label"], second["prediction"]) == ("", "")


def test_the_run_s_own_data_must_be_as_they_were(tmp_path, digits, tiny, monkeypatch):
    run = write_run(tmp_path / "run", digits, tiny)
    other = dataclasses.replace(digits, test=digits.train)
    monkeypatch.setattr("capsjax.training.inputs.load", lambda *_, **__: other)
    for read in (
        lambda: evaluate(options(run)),
        lambda: load_network(run.path),
        lambda: train(resumed(run)),
        lambda: train(resumed(run), dataset=other),
    ):
        with pytest.raises(ConfigError, match="test images were 101, are 180"):
            read()
    with pytest.raises(ConfigError, match="--data-dir has no effect on data set mnist_5k"):
        load_network(run.path, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("train", "seed", 1), ("train", "batch_size", 32), ("model", "num_iterations", 1)],
)
def test_an_edited_configuration_is_refused(run, galaxies, part, name, value, request):
    text = run.config.read_text()
    request.addfinalizer(lambda: run.config.write_text(text))
    values = json.loads(text)
    values[part][name] = value
    run.config.write_text(json.dumps(values))
    for read in (
        lambda: load_network(run.path, dataset=galaxies),
        lambda: train(resumed(run), dataset=galaxies),
    ):
        with pytest.raises(CheckpointError, match=rf"{part}.{name} is .*, expected {value}; was"):
            read()


def test_a_run_that_is_being_written_to_is_left_alone(run, galaxies):
    with (
        run.locked(),
        pytest.raises(ConfigError, match=r"in use by process \d+ on .+, since 2.+; wait"),
    ):
        train(resumed(run), dataset=galaxies)


def test_data_of_another_name_are_loaded_as_the_options_say(galaxies, tiny, monkeypatch):
    options = TrainConfig(dataset="image_folder", data_dir="images", image_size=32, channels=3)
    stored = RunConfig(options, tiny, DataDescription.of(galaxies))
    monkeypatch.setattr("capsjax.training.inputs.load", lambda name, **how: (name, how))
    how = {"data_dir": Path("images"), "image_size": 32, "channels": 3, "in_memory": fits}
    assert load_own(stored) == ("image_folder", how)
    assert load_own(stored, Path("moved")) == ("image_folder", {**how, "data_dir": Path("moved")})


def test_errors_by_class():
    test = Evaluation(0.5, wrong=3, count=10, class_wrong=(1, 2, 0), class_count=(8, 2, 0))
    assert test.class_errors[:2] == (0.125, 1)
    assert math.isnan(test.class_errors[2])
    assert test.balanced_error == 0.5625


@pytest.mark.parametrize(
    ("counts", "number", "held"),
    [
        ((200, 6), None, [19, 1]),
        ((200, 3), None, [19, 1]),
        ((50, 30, 20), 10, [5, 3, 2]),
        ((3, 1, 0, 2), 3, [2, 0, 0, 1]),  # the only image of a class is trained on
        ((2, 2, 2), 2, [1, 1, 0]),
        ((2, 2), 3, [2, 1]),
    ],
)
def test_each_class_is_held_out_in_proportion(counts, number, held):
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    split = Split(np.zeros((len(labels), 1, 1, 1), np.uint8), labels)
    with pytest.raises(ConfigError, match="the data set has no training images"):
        hold_out(split.take(np.arange(0)), None)
    kept, validation = hold_out(split, number)
    found = np.bincount(validation.labels, minlength=len(counts))
    assert found.tolist() == held
    assert (np.bincount(kept.labels, minlength=len(counts)) + found).tolist() == list(counts)


def test_runs_that_held_out_otherwise_go_on_as_they_began(run, galaxies, monkeypatch):
    text = run.config.read_text()
    values = json.loads(text)
    del values["stratified"]
    monkeypatch.setattr("capsjax.training.run.check_unfinished", _stop)
    try:
        for stored, expected in ((values, False), (json.loads(text), True)):
            run.config.write_text(json.dumps(stored))
            monkeypatch.setattr("capsjax.training.setup.hold_out", _expecting(expected))
            with pytest.raises(_Stopped):
                train(resumed(run), dataset=galaxies)
    finally:
        run.config.write_text(text)


class _Stopped(Exception):
    pass


def _stop(*_):
    raise _Stopped


def _expecting(expected):
    def hold(train, number, *, stratified):
        assert stratified is expected
        return hold_out(train, number, stratified=stratified)

    return hold
