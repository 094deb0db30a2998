"""Images of no data set are predicted as the run's own would be."""

import csv
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import write_run

from capsjax.cli import main
from capsjax.data import Cropped, DataError, Dataset, Pairs, Split, Task, load
from capsjax.training import (
    ConfigError,
    EvaluateConfig,
    PredictConfig,
    load_classifier,
    predict,
    predict_test,
)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier("mnist_small")


@pytest.fixture
def folder(tmp_path):
    """Digits in a directory and in one inside of it, beside what is no image or broken."""
    images = load("mnist_5k").test.images
    (tmp_path / "images" / "more").mkdir(parents=True)
    for n, name in enumerate(("2.png", "10.png", "more/a.png")):
        Image.fromarray(images[n, ..., 0]).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"hidden")
    return tmp_path / "images"


def made_run(path, tiny, task, shape, **model):
    """A run on a few random images, and their data set."""
    images = np.random.default_rng(0).integers(0, 255, (6, *shape)).astype(np.uint8)
    split = Split(images, np.sort(np.arange(6) % 3).astype(np.int32))
    dataset = Dataset("own", split, split, ("a", "b", "c"), task)
    model = dataclasses.replace(tiny, image_shape=dataset.image_shape, num_classes=3, **model)
    return write_run(path, dataset, model).path, dataset


def test_files_are_predicted_as_arrays_are(folder, tmp_path, classifier, caplog):
    (folder / "broken.png").write_bytes(b"no image")
    digits = load("mnist_5k").test.images[:3]
    np.save(tmp_path / "digits.npy", digits[..., 0] / np.float32(255))
    np.save(tmp_path / "small.npy", digits[:, 1:])
    given = (folder / "2.png", tmp_path / "digits.npy", folder, tmp_path / "small.npy")
    output = tmp_path / "predictions.csv"
    found = predict(PredictConfig(run_dir="mnist_small", images=given, batch_size=2, output=output))
    names = ["2.png", *(f"digits.npy[{n}]" for n in range(3)), "10.png", "2.png", "more/a.png"]
    assert [
        name.removeprefix(f"{folder}/").removeprefix(f"{tmp_path}/") for name in found.names
    ] == names
    expected = classifier(digits[[0, 0, 1, 2, 1, 0, 2]])
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    assert [found.label(n) for n in range(7)] == list("7721271")
    assert found.unreadable == 2
    assert [message.split(" as ")[0] for message in caplog.messages] == [
        f"cannot read {folder / 'broken.png'}",
        f"cannot read {tmp_path / 'small.npy'}",
    ]
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["prediction"] for row in rows] == list("7721271")
    assert float(rows[6]["score of 1"]) == found.scores[6, 1]


def test_the_command_prints_a_table_and_ends_with_1_after_a_broken_image(folder, capsys):
    main(["predict", "mnist_small", str(folder / "2.png")])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["score", "class", "image"]
    assert line.split()[1:] == ["7", str(folder / "2.png")]
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "mnist_small", str(folder)])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert [line.split()[1] for line in printed.out.splitlines()] == ["class", "2", "1"]
    (line,) = printed.err.splitlines()
    assert line.startswith(f"cannot read {folder / '2.png'} as an image: ")


def test_what_is_missing_is_named_before_anything_is_predicted(tmp_path):
    for path, match in ((tmp_path, "no images .*bmp, .* in"), (tmp_path / "a", "no image or dir")):
        with pytest.raises(DataError, match=match):
            predict(PredictConfig(run_dir="mnist_small", images=(path,)))


@pytest.mark.parametrize("task", [Cropped(24), Task()], ids=["standardised", "as they are"])
def test_a_run_s_own_images_have_the_scores_of_the_evaluation(tmp_path, tiny, task):
    run, dataset = made_run(tmp_path / "run", tiny, task, (32, 32, 3))
    options = EvaluateConfig(run_dir=run, driver="jit", batch_size=6)
    scores, _ = predict_test(options, dataset=dataset)
    size = 32 if isinstance(task, Cropped) else None
    classifier = load_classifier(run, image_size=size)
    assert classifier.image_shape == (32, 32, 3)
    np.testing.assert_allclose(classifier(dataset.test.images, batch_size=4), scores, atol=1e-6)
    if size:
        with pytest.raises(
            ConfigError, match="--image-size must be the size of .* own, at least 24"
        ):
            load_classifier(run)


def test_images_are_scaled_cropped_and_coloured_as_in_an_image_folder(tmp_path, tiny):
    run, _ = made_run(tmp_path / "run", tiny, Task(), (20, 30, 3))
    classifier, photo = load_classifier(run), tmp_path / "photo.png"
    # Gray, twice as large, and with a border left and right that is cropped.
    gray = np.zeros((40, 80), np.uint8)
    gray[:, 10:70] = 200
    Image.fromarray(gray).save(photo)
    inner = classifier.read_image(photo)[:, 1:-1]  # without what the border is mixed into
    np.testing.assert_array_equal(inner, np.full((20, 28, 3), 200))
    own = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(own).save(photo)
    np.testing.assert_array_equal(classifier.read_image(photo), own)
    # To a network for gray images, and 16 bits beside 8 ones.
    digit = load_classifier("mnist_small")
    Image.new("RGB", (28, 28), (255, 255, 255)).save(photo)
    Image.fromarray(np.full((28, 28), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert digit.read_image(photo).shape == (28, 28, 1)
    found = predict(PredictConfig(run_dir="mnist_small", images=(photo, tmp_path / "deep.png")))
    np.testing.assert_array_equal(*found.scores)


def test_on_a_canvas_small_images_stay_small_and_two_classes_are_predicted(tmp_path, tiny):
    run, dataset = made_run(tmp_path / "run", tiny, Pairs(), (28, 28, 1))
    classifier, photo = load_classifier(run), tmp_path / "photo.png"
    digit = dataset.test.images[0]
    Image.fromarray(digit[..., 0]).save(photo)
    in_the_middle = dataset.task.singly(jnp.asarray(digit)[None])[0]
    np.testing.assert_array_equal(classifier.read_image(photo), in_the_middle)
    found = predict(PredictConfig(run_dir=run, images=(photo,)))
    (row,) = found.scores
    largest = sorted(np.argsort(row)[1:].tolist())
    assert found.label(0) == "+".join("abc"[c] for c in largest)
    assert list(found.lines())[1].split()[0] == "+".join(f"{row[c]:.4f}" for c in largest)
    # As many as have so large a score.
    for threshold, label in ((0.0, "a+b+c"), (1.0, "")):
        found = predict(PredictConfig(run_dir=run, images=(photo,), threshold=threshold))
        assert found.label(0) == label
    Image.new("L", (72, 72)).save(photo)
    assert classifier.read_image(photo).shape == (36, 36, 1)


@dataclasses.dataclass(frozen=True)
class Odd(Task):
    pass


def test_images_that_no_file_or_no_one_else_can_make_are_refused(tmp_path, tiny):
    run, _ = made_run(tmp_path / "stereo", tiny, Task(), (28, 28, 2))
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"takes images with 2 channels, which only arrays"):
        predict(PredictConfig(run_dir=run, images=(tmp_path / "a.png",)))
    run, _ = made_run(tmp_path / "odd", tiny, Odd(), (28, 28, 1))
    with pytest.raises(ConfigError, match="images of own are prepared by a custom task, Odd"):
        load_classifier(run)


def test_images_of_a_wrong_shape_are_refused(classifier):
    with pytest.raises(
        ValueError, match=r"images must have shape \[B, 28, 28, 1\], got \[2, 28, 28\]"
    ):
        classifier(np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(TypeError, match="uint8, uint16 or floating-point, got int32"):
        classifier(np.zeros((2, 28, 28, 1), np.int32))
    for pixel in (200.0, np.nan):
        with pytest.raises(ValueError, match=r"floating-point images must lie in \[0, 1\], got"):
            classifier(np.full((2, 28, 28, 1), pixel, np.float32))
    assert classifier(np.zeros((0, 28, 28, 1), np.uint8)).shape == (0, 10)


def test_an_archive_that_is_named_like_an_array(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 28, 28), np.uint8))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    found = predict(PredictConfig(run_dir="mnist_small", images=(tmp_path / "a.npy",)))
    assert (found.names, found.unreadable) == ([], 1)
    assert "as an array of images: it is an archive (.npz) of arrays" in caplog.text
    with pytest.raises(ConfigError, match=f"--output must be a file, {tmp_path} is a directory"):
        PredictConfig(run_dir="mnist_small", images=(tmp_path / "a.npy",), output=tmp_path)


def test_a_network_for_numbers_predicts_them(tmp_path, digits, tiny):
    means = digits.test.images.mean((1, 2, 3))[:, None].astype(np.float32) / 255
    split = digits.test._replace(labels=means)
    dataset = Dataset("brightness", split, split, ("mean",))
    run = write_run(tmp_path / "run", dataset, dataclasses.replace(tiny, num_classes=1))
    np.save(tmp_path / "images.npy", digits.test.images[:2])
    config = PredictConfig(
        run_dir=run.path, images=(tmp_path / "images.npy",), output=tmp_path / "p.csv"
    )
    found = predict(config)
    assert found.classes is None
    header, first, _ = found.lines()
    assert header.split() == ["mean", "image"]
    assert first.split() == [f"{found.scores[0, 0]:.4f}", f"{tmp_path / 'images.npy'}[0]"]
    assert config.output.read_text().splitlines()[0] == "image,prediction of mean"
    with pytest.raises(ConfigError, match="--threshold is for classes, not for a network that"):
        predict(dataclasses.replace(config, threshold=0.5))
