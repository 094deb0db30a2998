import json
import sys

import numpy as np
import pytest
from stored import pixels, png, write_prepared

from capsjax.data import DataError, StoredSplit, load

pytest.importorskip("tensorflow_datasets")

TRAIN = [(pixels(n), n % 3) for n in range(21)]
TEST = [(pixels(n), n % 3) for n in range(100, 107)]


def refusal(name, data_dir, **options):
    with pytest.raises(DataError) as error:
        load(name, data_dir=data_dir, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tfrecord_files_are_read_by_index(tmp_path):
    write_prepared(tmp_path, {"train": TRAIN, "test": TEST})
    stored = load("tfds:pets", data_dir=tmp_path, in_memory=False)
    assert isinstance(stored.train, StoredSplit)
    assert (stored.name, stored.class_names, stored.image_shape) == (
        "tfds:pets",
        ("0", "1", "2"),
        (12, 12, 1),
    )
    some = stored.train.take(np.array([20, 0, 11])).read()
    np.testing.assert_array_equal(some.images[..., 0], [TRAIN[n][0] for n in (20, 0, 11)])
    np.testing.assert_array_equal(some.labels, [2, 0, 2])
    assert stored.train.images.checksum != stored.test.images.checksum


def test_all_images_fit_into_memory_or_stay_on_disk(tmp_path):
    write_prepared(tmp_path, {"train": TRAIN, "test": TEST})
    sizes = []
    in_memory = load("tfds:pets", data_dir=tmp_path, in_memory=lambda n: sizes.append(n) or True)
    assert sizes == [28 * 12 * 12]
    np.testing.assert_array_equal(in_memory.test.images[..., 0], [image for image, _ in TEST])
    assert in_memory.train.labels.dtype == np.int32


def test_array_record_files_are_read_by_index(prepared):
    import tensorflow_datasets as tfds

    ours = load("tfds:mnist", data_dir=prepared, in_memory=False)
    builder = tfds.builder("mnist", data_dir=prepared)
    chosen = np.array([0, 59_999, 31_234])
    theirs = builder.as_data_source(split="train").__getitems__(chosen.tolist())
    some = ours.train.take(chosen).read()
    np.testing.assert_array_equal(some.images, [record["image"] for record in theirs])
    expected = [record["label"] for record in theirs]
    np.testing.assert_array_equal(some.labels, expected)
    np.testing.assert_array_equal(ours.train.labels[chosen], expected)
    assert ours.class_names == tuple(builder.info.features["label"].names)


@pytest.mark.parametrize(
    ("others", "number"),
    [({}, 3), ({"validation": TEST}, 7), ({"test": [(TEST[0][0], -1)] * 2}, 3)],
)
def test_without_labelled_test_images_others_are_for_test(tmp_path, others, number):
    write_prepared(tmp_path, {"train": TRAIN, **others})
    dataset = load("tfds:pets", data_dir=tmp_path, in_memory=False)
    assert len(dataset.test.labels) == number
    assert len(dataset.train.labels) == (21 if number == 7 else 18)


def test_images_of_several_sizes_are_scaled(tmp_path):
    train = [(pixels(n, (20 + n, 30, 3)), n % 3) for n in range(6)]
    write_prepared(tmp_path, {"train": train, "test": train}, shape=(None, None, 3))
    assert "--image-size" in refusal("tfds:pets", tmp_path)
    dataset = load("tfds:pets", data_dir=tmp_path, image_size=8, channels=1)
    assert dataset.train.images.shape == (6, 8, 8, 1)


def test_a_set_is_named_as_tfds_names_it(tmp_path):
    for version in ("1.2.0", "1.10.0"):
        write_prepared(tmp_path, {"train": TRAIN}, config="big", version=version)
    write_prepared(tmp_path, {"train": TRAIN}, config="small")
    for name in ("pets/big", "pets/big:1.2.0", "pets/small"):
        assert load(f"tfds:{name}", data_dir=tmp_path, in_memory=False).name == f"tfds:{name}"
    several = refusal("tfds:pets", tmp_path)
    assert "pets/big:1.10.0" in several
    assert "pets/small:1.0.0" in several
    assert "prepared there: pets/big" in refusal("tfds:birds", tmp_path)
    assert "prepared there: pets/big" in refusal("tfds:pets/small:3.0.0", tmp_path)
    assert "prepared there: none" in refusal("tfds:pets", tmp_path / "missing")
    for name in ("", "/pets", "pets/", "pets//big", "../pets", "pets:", "pets/big:latest", "p*"):
        assert "must be named like NAME[/CONFIG][:VERSION]" in refusal(f"tfds:{name}", tmp_path)
    write_prepared(tmp_path / "of-mine", {"train": TRAIN}, config="v1.5+")
    name = "tfds:of-mine/pets/v1.5+:1.0.0"
    assert load(name, data_dir=tmp_path, in_memory=False).name == name
    # TFDS writes a set to such a folder first.
    (tmp_path / "pets" / "big" / "1.10.0").rename(tmp_path / "pets/big/1.11.0.incompleteAB12")
    assert load("tfds:pets/big", data_dir=tmp_path, in_memory=False).num_classes == 3


def test_a_set_must_have_one_image_and_one_class(tmp_path):
    text = {"text": {}, "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text"}
    write_prepared(tmp_path, {"train": TRAIN}, features={"review": text})
    assert "one Image and one ClassLabel feature, got review (Text)" in refusal(
        "tfds:pets", tmp_path
    )


OWN = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
INNER = {"x": {"type": "payload.X", "content": {}}}
LEGACY = {"features": {"x": {"pythonClassName": "payload.X", "jsonFeature": {"json": "{}"}}}}
PAYLOADS = {
    "feature": ("features.json", "pythonClassName", "payload.X"),
    "proto's name": ("features.json", "python_class_name", "payload.X"),
    "inner": ("features.json", "jsonFeature", {"json": json.dumps(INNER)}),
    "legacy": (
        "features.json",
        None,
        {
            "type": OWN,
            "proto_cls": "tensorflow_datasets.FeaturesDict",
            "content": json.dumps(LEGACY),
        },
    ),
    "info": (
        "dataset_info.json",
        "features",
        {"pythonClassName": "payload.X", "jsonFeature": {"json": "{}"}},
    ),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_set_executes_no_code(tmp_path, monkeypatch, payload):
    """TFDS would import the module of a feature that it does not know."""
    (tmp_path / "payload.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = write_prepared(tmp_path, {"train": TRAIN, "test": TEST})
    name, key, value = PAYLOADS[payload]
    whole = json.loads((folder / name).read_text())
    if key is None:
        whole = value
    elif name == "dataset_info.json":
        whole[key] = value
    else:
        whole["featuresDict"]["features"]["x"] = {"pythonClassName": OWN, key: value}
        if key == "python_class_name":
            del whole["featuresDict"]["features"]["x"]["pythonClassName"]
    (folder / name).write_text(json.dumps(whole))
    assert "features must be TFDS's own, got one of class payload.X" in refusal(
        "tfds:pets", tmp_path
    )
    assert "payload" not in sys.modules


def test_a_damaged_image_is_named(tmp_path):
    damaged = png(pixels(0))[:80]
    write_prepared(tmp_path, {"train": [*TRAIN[:5], (damaged, 0), *TRAIN], "test": TEST})
    dataset = load("tfds:pets", data_dir=tmp_path, in_memory=False)
    with pytest.raises(DataError, match="image 5 of data set pets, split train cannot be read"):
        dataset.train.read()


def test_a_damaged_file_is_one_line(tmp_path):
    folder = write_prepared(tmp_path, {"train": TRAIN, "test": TEST})
    file = folder / "pets-train.tfrecord-00001-of-00002"
    file.write_bytes(file.read_bytes()[:100])
    assert "damaged or incomplete" in refusal("tfds:pets", tmp_path)
