"""Training and evaluation of what is made of images: pairs, placed and distorted digits."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from capsjax.data import (
    DataError,
    Dataset,
    Distorted,
    Pairs,
    Placed,
    Sampler,
    Shifted,
    Split,
)
from capsjax.training import (
    ConfigError,
    EvaluateConfig,
    TrainConfig,
    evaluate,
    load_network,
    make_train_step,
    paper_loss,
    train,
)
from capsjax.training.choices import choose_task
from capsjax.training.data_description import DataDescription
from capsjax.training.inputs import fits
from capsjax.training.optimizers import make_optimizer
from capsjax.training.picture import draw_reconstructions, reconstruction_grid
from capsjax.training.programs import as_batch
from capsjax.training.run_directory import RunConfig, RunDirectory
from capsjax.training.setup import set_up


def by_class(split):
    order = np.argsort(split.labels, kind="stable")
    return Split(split.images[order], split.labels[order])


def made(digits, task):
    splits = (by_class(split) for split in (digits.train, digits.test))
    return Dataset("made", *splits, digits.class_names, task)


def options(tmp_path, **others):
    defaults = {"batch_size": 16, "steps": 4, "validation": 20, "tensorboard": False}
    return TrainConfig(run_dir=tmp_path / "run", **{**defaults, **others})


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory, digits, tiny_with_decoder):
    folder = tmp_path_factory.mktemp("pairs")
    dataset = made(digits, Pairs())
    model = dataclasses.replace(tiny_with_decoder, image_shape=dataset.image_shape)
    config = options(folder, test_size=250, validation=0)
    return folder / "run", train(config, model=model, dataset=dataset)


def test_a_network_is_trained_and_tested_on_pairs(pairs_run):
    run, result = pairs_run
    assert result.test.count == 250
    # A chance of one in 45 to name both of two digits.
    assert result.test.error > 0.5
    assert np.isfinite(result.test.loss)
    with Image.open(run / "reconstructions.png") as picture:
        width, height = picture.size
    # Sixteen images of 36 pixels, over two reconstructions of each.
    assert (width, height) == (2 + 16 * 38, 2 + 3 * 38)


# tests/training/test_programs.py has that drivers agree, whatever the samples are.
@pytest.mark.slow
@pytest.mark.parametrize("driver", ["shard", "jit"])
def test_the_drivers_agree_on_pairs(
    pairs_run, tmp_path, digits, tiny_with_decoder, driver, monkeypatch
):
    monkeypatch.setattr("capsjax.training.run.draw_reconstructions", lambda *_: None)
    dataset = made(digits, Pairs())
    model = dataclasses.replace(tiny_with_decoder, image_shape=dataset.image_shape)
    config = options(tmp_path, driver=driver, test_size=250, validation=0)
    result = train(config, model=model, dataset=dataset)
    assert abs(result.test.wrong - pairs_run[1].test.wrong) <= 2
    np.testing.assert_allclose(result.test.loss, pairs_run[1].test.loss, rtol=1e-3)


# In the gate, tests/data/test_tasks.py has the images, the test above a run on larger ones.
@pytest.mark.slow
@pytest.mark.parametrize("task", [Placed(32), Distorted(32)], ids=["placed", "distorted"])
def test_a_network_is_trained_and_tested_on_a_larger_canvas(tmp_path, digits, tiny, task):
    dataset = made(digits, task)
    model = dataclasses.replace(tiny, image_shape=dataset.image_shape)
    config = options(tmp_path, driver="jit", validation=0)
    result = train(config, model=model, dataset=dataset)
    assert result.test.count == len(digits.test.labels)
    assert np.isfinite(result.test.loss)


def test_a_network_is_trained_on_any_number_of_classes(tmp_path, digits, tiny_with_decoder):
    both = [
        Split(images, (labels[:, None] == np.arange(10)) | (np.arange(10) == 3))
        for images, labels in (digits.train, digits.test)
    ]
    dataset = Dataset("made", *both, digits.class_names)
    config = options(tmp_path)
    setup = set_up([config], tiny_with_decoder, dataset)
    sample = setup.sampler.test(as_batch(dataset.test), np.arange(4))
    step = make_train_step(setup.apply, make_optimizer(config, 4), paper_loss)
    _, metrics = jax.eval_shape(step, setup.initial, sample)
    assert metrics.error.shape == ()
    variables, path = setup.initial.variables, tmp_path / "picture.png"
    draw_reconstructions(
        setup.apply, variables, tiny_with_decoder, setup.sampler, dataset.test, path
    )
    assert path.exists()
    with pytest.raises(ConfigError, match="--loss must be for several classes in an image, got"):
        set_up([dataclasses.replace(config, loss="spread")], tiny_with_decoder, dataset)


def test_validation_images_are_in_no_pair_of_training(digits):
    from capsjax.data import Batch
    from capsjax.training import hold_out

    train_split, validation = hold_out(by_class(digits.train), 20)
    assert (np.diff(train_split.labels) >= 0).all()
    assert (np.diff(validation.labels) >= 0).all()
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = Pairs().select(keys, Batch(*map(np.asarray, train_split)), np.arange(4000) % 160)
    held = {image.tobytes() for image in validation.images}
    seen = {image.tobytes() for pair in np.asarray(drawn.images) for image in pair}
    assert not held & seen
    assert len(seen) == len({image.tobytes() for image in train_split.images})


def test_shifts_are_chosen_for_what_is_shifted(digits):
    assert choose_task(made(digits, Shifted()), 3) == Shifted(3)
    assert choose_task(made(digits, Pairs()), None) == Pairs(36, 4)
    assert choose_task(made(digits, Pairs()), 2) == Pairs(36, 2)
    with pytest.raises(ConfigError, match="--max-shift has no effect on data set made, whose"):
        choose_task(made(digits, Placed()), 2)
    assert choose_task(made(digits, Shifted()), None, "edge") == Shifted(2, "edge")
    with pytest.raises(ConfigError, match="--fill is for training images that are shifted, not"):
        choose_task(made(digits, Pairs()), None, 0.5)


def test_augmentation_is_that_of_the_options(tmp_path, digits, tiny):
    setup = set_up([options(tmp_path, fill="edge", flip="both", max_shift=1)], tiny, digits)
    assert setup.sampler == Sampler(Shifted(1, "edge"), 10, "both")


def test_a_run_s_images_are_read_as_it_read_them(tmp_path, digits, tiny, monkeypatch):
    asked = []

    def load(name, **given):
        asked.append((name, given))
        raise DataError("enough")

    monkeypatch.setattr("capsjax.training.inputs.load", load)
    run, folder = RunDirectory(tmp_path / "run"), tmp_path / "data"
    config = options(tmp_path, dataset="image_folder", data_dir=folder, image_size=8, channels=3)
    run.create()
    run.write_config(RunConfig(config, tiny, DataDescription.of(digits)))
    assert run.read_config().train.image_size == 8
    again = EvaluateConfig(run_dir=run.path)
    for read in (
        lambda: train(dataclasses.replace(config, run_dir=tmp_path / "new")),
        lambda: evaluate(again),
        lambda: load_network(run.path),
        lambda: evaluate(dataclasses.replace(again, image_size=4, channels=1)),
    ):
        with pytest.raises(DataError, match="enough"):
            read()
    own = {"data_dir": folder, "image_size": 8, "channels": 3, "in_memory": fits}
    assert asked[:3] == [("image_folder", own)] * 3
    assert asked[3][1] == own | {"image_size": 4, "channels": 1}


def test_pictures_of_any_number_of_channels():
    rows = np.linspace(0, 1, 5)[None, None, None]
    for channels, shown in ((1, [0] * 3), (2, [0] * 3), (3, [0, 64, 128]), (5, [0, 64, 128])):
        assert reconstruction_grid([rows[..., :channels]])[800, 800].tolist() == shown


def test_the_number_of_test_images_is_chosen_where_they_are_made(tmp_path, digits, tiny):
    message = "data sets whose images are generated; mnist_5k has 101 test images"
    with pytest.raises(ConfigError, match=message):
        train(options(tmp_path, test_size=5), model=tiny, dataset=digits)
