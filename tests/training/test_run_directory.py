"""What is read back from a run directory: typed, or one line that names the file and the key."""

import dataclasses
import json
import os
import typing

import pytest

from capsjax import data, models
from capsjax.training import ConfigError, TrainConfig, config
from capsjax.training.data_description import DataDescription
from capsjax.training.run_directory import RunConfig, RunDirectory, seconds_of


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path)
    described = DataDescription("mnist_5k", ("a", "b"), 10, 5)
    options = TrainConfig(data_dir=tmp_path / "data", learning_rate=1)
    directory.write_config(RunConfig(options, models.configure("efficient_capsnet"), described))
    return directory


@pytest.mark.parametrize("preset", models.presets())
def test_every_configuration_is_read_as_it_was_written(directory, preset):
    written = directory.read_config()
    written = RunConfig(written.train, models.configure(preset), written.data)
    directory.write_config(written)
    assert directory.read_config() == written
    assert written.train.data_dir == directory.path / "data"
    assert written.train.run_dir == directory.path


def test_options_that_an_older_version_did_not_know_have_their_defaults(directory):
    values = json.loads(directory.config.read_text())
    del values["train"]["until_error"]
    values["train"]["of_long_ago"] = 1
    directory.config.write_text(json.dumps(values))
    assert directory.read_config().train.until_error is None


def change(values, *keys, to):
    for key in keys[:-1]:
        values = values[key]
    values[keys[-1]] = to


@pytest.mark.parametrize(
    ("keys", "to", "match"),
    [
        (("train", "batch_size"), "128", r"Expected `int`, got `str` - at `\$.train.batch_size`"),
        (("train", "data_dir"), 5, r"Expected a path, got 5 - at `\$.train.data_dir`"),
        (("train",), None, r"Expected `object`, got `null` - at `\$.train`"),
        (
            ("data", "class_names"),
            [1],
            r"got `int` - at `\$.data.class_names\[0\]`",
        ),
        (("model", "kind"), "cnn", r"Invalid enum value 'cnn' - at `\$.kind`"),
        (("model", "conv_features"), 5, r"model in .* Expected `array`, got `int`"),
        (("model", "image_shape"), [1, 2], "Expected `array` of length 3"),
    ],
)
def test_a_wrong_value_is_named(directory, keys, to, match):
    values = json.loads(directory.config.read_text())
    change(values, *keys, to=to)
    directory.config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"config.json is damaged: .*{match}|{match}"):
        directory.read_config()


@pytest.mark.parametrize(
    ("option", "to", "match"),
    [
        ("batch_size", 0, "--batch-size must be at least 1, got 0"),
        # As after training with an algorithm that another program has registered.
        ("routing", "own", "--routing must be one of .* has registered, got 'own'"),
    ],
)
def test_what_the_options_refuse_is_not_called_damage(directory, option, to, match):
    values = json.loads(directory.config.read_text())
    change(values, "train", option, to=to)
    directory.config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"config.json: {match}$"):
        directory.read_config()


@pytest.mark.parametrize("key", ["train", "model", "data"])
def test_a_missing_key_is_named(directory, key):
    values = json.loads(directory.config.read_text())
    del values[key]
    directory.config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"missing required field `{key}`"):
        directory.read_config()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"train": "\xff"}', b"[" * 100_000, b"\0" * 50]
)
def test_whatever_a_file_holds_is_one_error(directory, content):
    for path, read in (
        (directory.config, directory.read_config),
        (directory.result, directory.read_result),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{path.name} is damaged: .+"):
            read()
    directory.metrics.write_bytes(content + b"\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl:1 is damaged: .+"):
        directory.read_metrics()


@pytest.mark.parametrize(("wrong", "count"), [(5, 4), (0, 0), (-1, 4)])
def test_a_result_that_cannot_be_is_damaged(directory, wrong, count):
    values = {"step": 1, "test_wrong": wrong, "test_count": count}
    directory.result.write_text(json.dumps({**values, "validation_error": None, "seconds": 1.0}))
    with pytest.raises(ConfigError, match="result.json is damaged"):
        directory.read_result()


def test_an_error_of_the_operating_system_names_the_file(tmp_path):
    full = RunDirectory(tmp_path)
    full.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        full.append_metrics({"step": 1})
    assert error.value.filename == str(full.metrics)


@pytest.mark.parametrize(
    ("times", "expected"),
    [([], 0), ([1.0, 2.5], 2.5), ([100, 200, 50, 90, 10, 20], 310), ([None, 3.0], 3.0)],
)
def test_the_time_of_a_run_is_that_of_all_its_parts(times, expected):
    records = [{} if time is None else {"seconds": time} for time in times]
    assert seconds_of(records) == expected


def test_a_metrics_record_needs_its_keys_and_the_last_may_be_cut_short(directory):
    good = {"split": "train", "step": 1, "seconds": 0.5, "loss": 0.25, "error": None}
    directory.append_metrics(good)
    with directory.metrics.open("a") as file:
        file.write('{"split": "tr')
    assert directory.read_metrics() == [good]
    for bad, match in (
        ({"split": "train", "step": 1, "loss": 1.0}, "missing required field `error`"),
        ({**good, "split": "holdout"}, r"Invalid enum value 'holdout' - at `\$.split`"),
        ({**good, "step": 1.5}, r"Expected `int`, got `float` - at `\$.step`"),
        ({**good, "step": -1}, r"Expected `int` >= 0 - at `\$.step`"),
        ({**good, "error": 1.5}, r"Expected `float` <= 1.0 - at `\$.error`"),
    ):
        directory.metrics.write_text("".join(json.dumps(x) + "\n" for x in (good, bad)))
        with pytest.raises(ConfigError, match=f"metrics.jsonl:2 is damaged: .*{match}"):
            directory.read_metrics()
        before = directory.metrics.read_bytes()
        with pytest.raises(ConfigError, match="metrics.jsonl:2 is damaged"):
            directory.forget_metrics_after(1)
        assert directory.metrics.read_bytes() == before


def test_an_older_version_recorded_less(directory):
    values = json.loads(directory.config.read_text())
    del values["stratified"]
    for name in ("test_images", "test_checksum", "task"):
        del values["data"][name]
    directory.config.write_text(json.dumps(values))
    found = directory.read_config()
    assert found.stratified is False
    found.data.check(DataDescription("renamed", ("a", "b"), 10, 5, 3, 4, "Shifted"))
    full = DataDescription("x", ("a", "b"), 10, 5, 3, 4, "Shifted")
    with pytest.raises(ConfigError, match="task were Shifted, are Placed"):
        full.check(dataclasses.replace(full, task="Placed"))


def test_directories_of_data_are_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(data_dir="images").to_json()["data_dir"] == str(tmp_path / "images")


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "reconstructions.png"])
def test_files_of_others_are_not_taken_for_a_run_s(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name} of a run whose config.json is missing"):
        RunDirectory(tmp_path).create()


def test_one_process_at_a_time_writes(directory):
    with directory.locked():
        again = directory.locked()
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "):
            again.__enter__()
    with directory.locked():  # what a process that died has left
        pass


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_has_not_begun_leaves_its_name_free(directory, begun):
    (directory.path / "notes.txt").write_text("mine")
    if begun:
        directory.append_metrics({"split": "train", "step": 1, "loss": 0.5, "error": 0.5})
    directory.remove_unless_begun()
    assert directory.config.exists() == begun
    assert (directory.path / "notes.txt").exists()
    if not begun:
        directory.check_new()


def test_choices_are_what_is_registered():
    assert typing.get_args(config.PresetName) == models.presets()
    assert all(config.TrainConfig(dataset=name).dataset == name for name in data.names())
