"""Images that are streamed to the devices train the same network as those that stay there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from stored import write_folder

from capsjax.data import DataError, Dataset, Pairs, Split, load
from capsjax.training import (
    Checkpoints,
    ConfigError,
    EvaluateConfig,
    TrainConfig,
    evaluate,
    feeding,
    inputs,
    predict_test,
    train,
    train_seeds,
)
from capsjax.training.run_directory import RunDirectory
from capsjax.training.stopping import StopRequest

pytest.importorskip("grain")


def config(path, **options):
    """160 training images, ten steps an epoch."""
    defaults = {
        "batch_size": 16,
        "steps": 13,
        "validation": 20,
        "log_every": 5,
        "checkpoint_every": 6,
        "flip": "horizontal",
        "driver": "jit",
        "tensorboard": False,
        "workers": 0,
    }
    return TrainConfig(run_dir=path, **{**defaults, **options})


def parameters(run_dir):
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    state = checkpoints._manager.restore(checkpoints.choose("last"))
    checkpoints.close()
    return state


def assert_same_bits(run_dir, other):
    jax.tree.map(np.testing.assert_array_equal, parameters(run_dir), parameters(other))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four batches a chunk on one device."""
    monkeypatch.setattr(feeding, "_CHUNK", 4 * 16 * 28 * 28)


@pytest.fixture(scope="module")
def resident(tmp_path_factory, digits, tiny):
    """The run on one device that keeps its images there."""
    path = tmp_path_factory.mktemp("resident") / "run"
    return train(config(path, input="resident"), model=tiny, dataset=digits)


def test_a_stream_trains_the_same_network(tmp_path, digits, tiny, resident, capsys):
    streamed = train(config(tmp_path / "run", input="stream"), model=tiny, dataset=digits)
    assert_same_bits(streamed.run_dir, resident.run_dir)
    assert streamed.test.class_wrong == resident.test.class_wrong
    np.testing.assert_allclose(streamed.test.loss, resident.test.loss, rtol=1e-6)
    ours, theirs = (RunDirectory(x.run_dir).read_metrics() for x in (streamed, resident))
    assert [r["error"] for r in ours] == [r["error"] for r in theirs]
    assert "input: streamed by threads of this process, as requested" in capsys.readouterr().err


# In the gate, test_programs.py has the samples that pmap's devices see, test_processes.py a stream
# that processes share.
@pytest.mark.slow
@pytest.mark.parametrize("driver", ["pmap", "shard"])
def test_a_stream_trains_the_same_network_on_eight_devices(tmp_path, digits, tiny, driver):
    results = [
        train(
            config(
                tmp_path / name, input=name, driver=driver, steps=6, batch_size=32, validation=0
            ),
            model=tiny,
            dataset=digits,
        )
        for name in ("resident", "stream")
    ]
    assert_same_bits(*(each.run_dir for each in results))
    assert len({each.test.class_wrong for each in results}) == 1


def test_a_run_goes_on_within_an_epoch_and_a_chunk(tmp_path, digits, tiny, resident):
    for name, steps in (("resident", 7), ("stream", 9), ("stream", 11), ("resident", 13)):
        options = config(tmp_path / "run", steps=steps, input=name, resume=steps > 7)
        train(options, model=tiny, dataset=digits)
    assert_same_bits(tmp_path / "run", resident.run_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), 60, shape=(28, 28))


@pytest.fixture(scope="module")
def on_disk(folder, tmp_path_factory, tiny_with_decoder):
    """A run on images that a worker process reads."""
    model = dataclasses.replace(tiny_with_decoder, num_classes=3)
    path = tmp_path_factory.mktemp("disk") / "run"
    options = config(path, dataset="image_folder", data_dir=folder, input="stream", workers=1)
    return train(dataclasses.replace(options, steps=4, validation=10), model=model), model


def test_images_on_disk_train_the_same_network(folder, on_disk, tmp_path):
    streamed, model = on_disk
    options = dataclasses.replace(
        RunDirectory(streamed.run_dir).read_config().train,
        run_dir=tmp_path / "run",
        resume=False,
        input=None,  # which is resident for so few images
    )
    kept = train(options, model=model)
    assert_same_bits(streamed.run_dir, kept.run_dir)
    assert (streamed.run_dir / "reconstructions.png").exists()
    # A stream is known by its files and labels, the others by their pixels and labels.
    described = [RunDirectory(r.run_dir).read_config().data for r in (streamed, kept)]
    assert [d.checksum is None for d in described] == [True, False]
    assert [d.files is None for d in described] == [False, True]
    assert described[0].labels == described[1].labels


def test_a_stream_is_evaluated(on_disk, tmp_path):
    streamed, _ = on_disk
    found = {}
    for name in ("resident", "stream"):
        options = EvaluateConfig(
            run_dir=streamed.run_dir, input=name, driver="jit", batch_size=8, predictions=None
        )
        found[name] = evaluate(options).test, *predict_test(options)
    kept, read = found["resident"], found["stream"]
    assert read[0].class_wrong == kept[0].class_wrong == streamed.test.class_wrong
    np.testing.assert_allclose(read[0].loss, kept[0].loss, rtol=1e-6)
    np.testing.assert_allclose(read[1], kept[1], rtol=1e-6)
    np.testing.assert_array_equal(read[2], kept[2])


def test_other_files_are_another_data_set(on_disk, folder, tmp_path):
    streamed, model = on_disk
    other = write_folder(tmp_path / "other", 60, shape=(28, 28))
    (other / "train" / "cat" / "0000.png").rename(other / "train" / "cat" / "00000.png")
    options = RunDirectory(streamed.run_dir).read_config().train
    with pytest.raises(ConfigError, match="files were .* are"):
        train(dataclasses.replace(options, steps=6, data_dir=other), model=model)


def test_an_image_that_cannot_be_read_ends_the_run_in_one_line(folder, tmp_path, tiny):
    other = write_folder(tmp_path / "images", 60, shape=(28, 28))
    broken = other / "train" / "dog" / "0022.png"
    broken.write_bytes(broken.read_bytes()[:100])
    options = config(
        tmp_path / "run", dataset="image_folder", data_dir=other, input="stream", validation=0
    )
    model = dataclasses.replace(tiny, num_classes=3)
    with pytest.raises(DataError, match=r"0022\.png.*a stream cannot leave images out"):
        train(options, model=model)


def test_large_sets_are_streamed(monkeypatch, folder):
    limit = 60 * 28 * 28
    monkeypatch.setattr(inputs, "machine_memory", lambda: 4 * limit)
    assert not inputs.fits(limit + 1)
    assert inputs.fits(limit)
    loaded = inputs.load_dataset("image_folder", None, data_dir=folder)
    assert not isinstance(loaded.train, Split)
    asked = inputs.load_dataset("image_folder", "resident", data_dir=folder)
    assert isinstance(asked.train, Split)


def test_the_reason_for_a_stream_is_said(monkeypatch, tmp_path, digits, tiny, capsys):
    monkeypatch.setattr(inputs, "machine_memory", lambda: 400_000)
    monkeypatch.setattr(StopRequest, "requested", lambda self: True)  # before the first step
    train(config(tmp_path / "run", validation=0), model=tiny, dataset=digits)
    line = "as all decoded images take 0.00 GB, more than 0.00 GB, half of a device's memory"
    assert line in capsys.readouterr().err


def test_what_cannot_be_streamed_is_refused(tmp_path, digits, tiny):
    train_split, test_split = (
        split.take(np.argsort(split.labels, kind="stable")) for split in (digits.train, digits.test)
    )
    pairs = Dataset("pairs", train_split, test_split, digits.class_names, Pairs(size=28))
    with pytest.raises(ConfigError, match="--input stream is not for data set pairs"):
        train(config(tmp_path / "run", input="stream", flip=None), model=tiny, dataset=pairs)
    several = [config(tmp_path / str(n), seed=n, input="stream") for n in range(2)]
    with pytest.raises(ConfigError, match="--input stream is for one run"):
        train_seeds(several, model=tiny, dataset=digits)
    assert not list(tmp_path.iterdir())


def test_input_may_change_and_is_stored(on_disk):
    streamed, _ = on_disk
    stored = json.loads((streamed.run_dir / "config.json").read_text())["train"]
    assert (stored["input"], stored["workers"]) == ("stream", 1)
    assert not {"input", "workers"} & set(TrainConfig.shaping())
    assert isinstance(load("mnist_5k").train, Split)
