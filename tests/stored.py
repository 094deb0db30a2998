"""Small data sets on disk: folders of images, and prepared sets as TFDS leaves them."""

import io
import json
import struct

import numpy as np
from PIL import Image


def pixels(number, shape=(12, 12)):
    """An image of its own for each number."""
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def write_folder(root, number, *, classes=("cat", "dog", "eel"), shape=(12, 12)):
    """A folder of so many training images and a third as many test images."""
    for split, first, count in (("train", 0, number), ("test", 1000, number // 3)):
        for n in range(first, first + count):
            file = root / split / classes[n % len(classes)] / f"{n:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(n, shape)).save(file)
    return root


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def write_prepared(
    data_dir, splits, *, name="pets", config=None, version="1.0.0", shape=(12, 12, 1), features=None
):
    """A set in two TFRecord files a split; images of a split with their labels."""
    from tensorflow_datasets.proto import tf_example_pb2

    folder = data_dir / name / (config or "") / version
    folder.mkdir(parents=True)
    described = []
    for split, examples in splits.items():
        half = len(examples) // 2
        for shard, some in enumerate((examples[:half], examples[half:])):
            with (folder / f"{name}-{split}.tfrecord-{shard:05}-of-00002").open("wb") as file:
                for image, label in some:
                    example = tf_example_pb2.Example()
                    stored = example.features.feature
                    encoded = image if isinstance(image, bytes) else png(image)
                    stored["image"].bytes_list.value.append(encoded)
                    stored["label"].int64_list.value.append(label)
                    record = example.SerializeToString()
                    file.write(struct.pack("<QI", len(record), 0) + record + bytes(4))
        described.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(half), str(len(examples) - half)],
            }
        )
    about = {"fileFormat": "tfrecord", "name": name, "version": version, "splits": described}
    if config:
        about["configName"] = config
    (folder / "dataset_info.json").write_text(json.dumps(about))
    module = "tensorflow_datasets.core.features"
    if features is None:
        features = {
            "image": {
                "image": {
                    "dtype": "uint8",
                    "shape": {"dimensions": [str(-1 if n is None else n) for n in shape]},
                },
                "pythonClassName": f"{module}.image_feature.Image",
            },
            "label": {
                "classLabel": {"numClasses": "3"},
                "pythonClassName": f"{module}.class_label_feature.ClassLabel",
            },
        }
    whole = {
        "featuresDict": {"features": features},
        "pythonClassName": f"{module}.features_dict.FeaturesDict",
    }
    (folder / "features.json").write_text(json.dumps(whole))
    return folder
