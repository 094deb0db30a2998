"""CIFAR-10, SVHN and smallNORB, from small files in the original formats on a local server."""

import functools
import gzip
import hashlib
import importlib
import io
import sys
import tarfile
from urllib.parse import urlsplit

import numpy as np
import pytest
from scipy.io import savemat

from capsjax.data import Batch, DataError, load


def numbers(*shape, most=256, seed=0):
    return np.random.default_rng(seed).integers(0, most, shape).astype(np.uint8)


def cifar_archive():
    """The archive of the binary version: six files of records and the names of the classes."""
    contents, images, labels = {}, [], []
    files = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    for seed, file in enumerate(files):
        pixels, digits = numbers(3, 3072, seed=seed), numbers(3, 1, most=10, seed=seed)
        contents[file] = np.concatenate([digits, pixels], axis=1).tobytes()
        images.append(pixels.reshape(3, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(digits[:, 0])
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    contents["batches.meta.txt"] = "\n".join([*names, ""]).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file, data in contents.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    train = np.concatenate(images[:5]), np.concatenate(labels[:5])
    return {"/cifar-10-binary.tar.gz": packed.getvalue()}, train, (images[5], labels[5]), names


def svhn_files():
    """MATLAB files: X is [32, 32, 3, N], y is [N, 1] with 10 for the digit 0."""
    files, splits = {}, {}
    for seed, split in enumerate(("train", "test", "extra")):
        images = numbers(32, 32, 3, 12, seed=seed)
        y = (np.arange(12, dtype=np.uint8) % 10 + 1)[:, None]
        packed = io.BytesIO()
        savemat(packed, {"X": images, "y": y})
        files[f"/{split}_32x32.mat"] = packed.getvalue()
        splits[split] = (images.transpose(3, 0, 1, 2), y[:, 0] % 10)
    return files, splits["train"], splits["test"], list("0123456789")


def binary_matrix(array):
    magic = {1: 0x1E3D4C55, 4: 0x1E3D4C54}[array.dtype.itemsize]
    shape = [*array.shape, 1, 1][: max(3, array.ndim)]
    header = np.array([magic, array.ndim, *shape], "<i4").tobytes()
    return gzip.compress(header + array.tobytes())


def norb_files():
    """Binary matrices of pairs [N, 2, 96, 96], categories [N] and conditions [N, 4]."""
    files, splits = {}, {}
    stems = {
        "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
        "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
    }
    for seed, (split, stem) in enumerate(stems.items()):
        # Blocks of four equal pixels have exact means.
        small = numbers(7, 2, 48, 48, seed=seed)
        category = (np.arange(7) % 5).astype("<i4")
        info = np.stack([np.arange(7) % 10, np.arange(7), 2 * np.arange(7), np.arange(7) % 6], 1)
        for kind, array in (
            ("dat", small.repeat(2, 2).repeat(2, 3)),
            ("cat", category),
            ("info", info.astype("<i4")),
        ):
            files[f"/{stem}-{kind}.mat.gz"] = binary_matrix(array)
        splits[split] = (small.transpose(0, 2, 3, 1), category)
    names = ["four-legged animals", "human figures", "airplanes", "trucks", "cars"]
    return files, splits["train"], splits["test"], names


SETS = {"cifar10": cifar_archive, "svhn_cropped": svhn_files, "smallnorb": norb_files}


@pytest.fixture
def serve(server, monkeypatch):
    """Serves a set's files and points its stock builder at the server."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.download import checksums

    def serve(name):
        files, *expected = SETS[name]()
        server.files.update(files)
        stock = tfds.builder_cls(name)
        module = importlib.import_module(stock.__module__)
        base = server.url.rstrip("/")
        if name == "cifar10":
            info = stock._cifar_info.fget(stock)._replace(url=f"{base}/cifar-10-binary.tar.gz")
            monkeypatch.setattr(stock, "_cifar_info", info)
        elif name == "svhn_cropped":
            monkeypatch.setattr(module, "URL", server.url)
        else:
            for constant in ("_TRAINING_URL_TEMPLATE", "_TESTING_URL_TEMPLATE"):
                path = urlsplit(getattr(module, constant)).path.rsplit("/", 1)[1]
                monkeypatch.setattr(module, constant, f"{base}/{path}")
        infos = {
            base + path: checksums.UrlInfo(
                size=len(body), checksum=hashlib.sha256(body).hexdigest(), filename=path[1:]
            )
            for path, body in files.items()
        }
        monkeypatch.setattr(stock, "url_infos", infos)
        return expected

    return serve


@pytest.mark.parametrize("name", SETS)
def test_is_prepared_from_its_own_files_without_tensorflow(name, serve, tmp_path):
    train, test, names = serve(name)
    dataset = load(name, data_dir=tmp_path)
    assert not hasattr(sys.modules.get("tensorflow"), "io")
    assert dataset.class_names == tuple(names)
    for split, (images, labels) in ((dataset.train, train), (dataset.test, test)):
        assert split.images.shape == images.shape
        # TFDS stores records in a different order.
        ours = sorted((i.tobytes(), int(n)) for i, n in zip(*split, strict=True))
        assert ours == sorted((i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True))
    again = load(name, data_dir=tmp_path, download=False)
    np.testing.assert_array_equal(again.test.images, dataset.test.images)


@pytest.mark.parametrize("name", SETS)
def test_damaged_files_are_one_line_and_nothing_is_left(name, serve, server, tmp_path):
    serve(name)
    path = next(iter(server.files))
    server.files[path] = server.files[path][:-20]
    with pytest.raises(DataError, match=name) as error:
        load(name, data_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / name).glob("*.*.*/dataset_info.json"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cifar10", (24, 24, 3)), ("svhn_cropped", (32, 32, 3)), ("smallnorb", (32, 32, 2))],
)
def test_the_inputs_of_the_network_are_those_of_the_paper(name, shape, serve, tmp_path):
    import jax

    serve(name)
    dataset = load(name, data_dir=tmp_path)
    assert dataset.image_shape == shape
    batch = Batch(dataset.train.images, dataset.train.labels)
    keys = jax.random.split(jax.random.key(0), len(dataset.train.labels))
    for train in (True, False):
        render = jax.jit(functools.partial(dataset.task.render, train=train))
        images, drawings = map(np.asarray, render(keys, batch.images))
        assert images.shape[1:] == shape
        if name != "svhn_cropped":
            np.testing.assert_allclose(images.mean((1, 2, 3)), 0, atol=1e-5)
            np.testing.assert_allclose(images.std((1, 2, 3)), 1, rtol=1e-3)
            middle = (
                slice(None),
                *[
                    slice((n - s) // 2, (n + s) // 2)
                    for n, s in zip(batch.images.shape[1:3], shape, strict=False)
                ],
            )
            drawn = np.asarray(drawings) * 255
            same = np.isclose(drawn, np.asarray(batch.images[middle]), atol=0.01).all((1, 2, 3))
            assert same.all() != train
