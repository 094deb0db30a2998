import hashlib
import json
import shutil
import socket
import subprocess
import sys
from urllib.parse import urljoin

import numpy as np
import pytest

from capsjax.data import DataError, load, tfds_source

from . import conftest

VERSION = "3.0.1"
FILES = {"train": "train", "test": "t10k"}


def refusal(name, data_dir, **options):
    """Returns the message of the DataError, which is one line."""
    with pytest.raises(DataError) as error:
        load(name, data_dir=data_dir, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


FEW = {"train": 2100, "test": 300}  # of which the first take several reads


@pytest.fixture(scope="session")
def few(prepared, tmp_path_factory):
    """The prepared MNIST with the first records of each split."""
    array_record = pytest.importorskip("array_record.python.array_record_module")
    root = tmp_path_factory.mktemp("few")
    whole, directory = (folder / "mnist" / VERSION for folder in (prepared, root))
    directory.mkdir(parents=True)
    info = json.loads((whole / "dataset_info.json").read_text())
    for split in info["splits"]:
        number = FEW[split["name"]]
        split["shardLengths"] = [str(number)]
        shard = f"mnist-{split['name']}.array_record-00000-of-00001"
        reader = array_record.ArrayRecordReader(str(whole / shard))
        writer = array_record.ArrayRecordWriter(str(directory / shard), "group_size:1")
        for record in reader.read(0, number):
            writer.write(record)
        writer.close()
        reader.close()
    (directory / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(whole / "features.json", directory)
    return root


@pytest.fixture(scope="session")
def decoded(few, tmp_path_factory):
    """Those records, decoded once, and the resulting cache."""
    home = tmp_path_factory.mktemp("shared_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        return load("mnist", data_dir=few), home


def originals_of(folder):
    for split, prefix in FILES.items():
        images = conftest.read_original(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = conftest.read_original(folder / f"{prefix}-labels-idx1-ubyte.gz")
        yield split, images, labels


def assert_same_as_originals(dataset, folder):
    for split, images, labels in originals_of(folder):
        ours = getattr(dataset, split)
        assert ours.images.shape == (*images.shape, 1)
        assert ours.images.dtype == np.uint8
        assert ours.labels.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(ours.labels), np.bincount(labels))
        # TFDS stores records in a different order: compare the sums of each class.
        for label in range(10):
            assert ours.images[ours.labels == label].sum() == images[labels == label].sum()


def test_prepared_set_holds_originals(decoded, originals):
    dataset, _ = decoded
    for split, images, labels in originals_of(originals / "mnist"):
        ours = getattr(dataset, split)
        assert ours.images.shape == (FEW[split], 28, 28, 1)
        assert (ours.images.dtype, ours.labels.dtype) == (np.uint8, np.int32)
        # TFDS stores records in a different order.
        known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        for image, label in zip(ours.images, ours.labels, strict=True):
            assert known[image.tobytes()] == label
        assert len({image.tobytes() for image in ours.images}) == FEW[split]
    assert dataset.class_names == tuple("0123456789")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "some"),
    [("mnist", ("0", "9")), ("fashion_mnist", ("T-shirt/top", "Ankle boot"))],
)
def test_prepared_sets_hold_all_of_the_originals(prepared, originals, name, some):
    dataset = load(name, data_dir=prepared)
    assert_same_as_originals(dataset, originals / name)
    assert dataset.class_names[::9] == some


def test_second_load_does_not_decode(decoded, few, monkeypatch):
    dataset, home = decoded
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(tfds_source, "_decode", lambda builder: pytest.fail("decoded again"))
    again = load("mnist", data_dir=few)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)


@pytest.fixture
def copy(prepared, tmp_path):
    """A prepared set to damage; returns its data directory and the set's own."""
    shutil.copytree(prepared / "mnist", tmp_path / "mnist")
    return tmp_path, tmp_path / "mnist" / VERSION


@pytest.mark.parametrize("kept", [0, 100, 2_000_000, -10])
def test_truncated_shard(copy, kept):
    root, directory = copy
    shard = directory / "mnist-train.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert str(directory) in refusal("mnist", root)


def test_missing_shard(copy):
    root, directory = copy
    (directory / "mnist-train.array_record-00000-of-00001").unlink()
    assert str(directory) in refusal("mnist", root)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_dataset_info(copy, text):
    root, directory = copy
    (directory / "dataset_info.json").write_text(text)
    assert str(root / "mnist") in refusal("mnist", root)


def test_directory_without_dataset_info_is_not_taken_for_prepared(copy, server, monkeypatch):
    root, directory = copy
    (directory / "dataset_info.json").unlink()
    point_at(server, monkeypatch)
    server.files["/"] = b""
    assert str(directory) in refusal("mnist", root)


def test_other_format(copy):
    root, directory = copy
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for shard in directory.glob("*array_record*"):
        shard.rename(directory / shard.name.replace("array_record", "tfrecord"))
    text = refusal("mnist", root)
    assert "tfrecord" in text
    assert "array_record" in text


def test_other_version(copy):
    root, directory = copy
    directory.rename(directory.with_name("1.0.0"))
    text = refusal("mnist", root, download=False)
    assert "1.0.0" in text
    assert VERSION in text


def test_data_dir_is_a_file(prepared, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f"{file} is a file" in refusal("mnist", file)


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_prepared_and_no_download(prepared, tmp_path, exists):
    root = tmp_path if exists else tmp_path / "no"
    text = refusal("kmnist", root, download=False)
    for part in ("kmnist", str(root), "--data-dir", "mnist_5k"):
        assert part in text
    assert exists or not root.exists()


def test_default_directory_comes_from_the_environment(prepared, tmp_path):
    # TFDS reads the variable when it is imported.
    code = (
        "from capsjax.data import DataError, load\n"
        "try: load('kmnist', download=False)\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"TFDS_DATA_DIR": str(tmp_path), "HOME": "/", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert str(tmp_path) in done.stdout


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "PIL"])
def test_without_optional_packages(tmp_path, monkeypatch, missing):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setitem(sys.modules, missing, None)
    text = refusal("mnist", tmp_path)
    assert missing in text
    assert 'pip install -e ".[data]"' in text


def point_at(server, monkeypatch, name="MNIST"):
    """Makes a stock builder download from `server`, with its registered checksums."""
    from tensorflow_datasets.image_classification import mnist

    stock = getattr(mnist, name)
    infos = {urljoin(server.url, url.rsplit("/", 1)[1]): i for url, i in stock.url_infos.items()}
    monkeypatch.setattr(stock, "URL", server.url)
    monkeypatch.setattr(stock, "url_infos", infos)


@pytest.fixture
def serving_mnist(prepared, originals, server, monkeypatch):
    for file in (originals / "mnist").iterdir():
        server.files[f"/{file.name}"] = file.read_bytes()
    server.files["/"] = b""
    point_at(server, monkeypatch)
    return server


@pytest.mark.slow
def test_prepares_the_stock_set(serving_mnist, prepared, tmp_path, capfd):
    made, stock = (load("mnist", data_dir=folder) for folder in (tmp_path, prepared))
    for split in FILES:
        np.testing.assert_array_equal(getattr(made, split).images, getattr(stock, split).images)
        np.testing.assert_array_equal(getattr(made, split).labels, getattr(stock, split).labels)
    files = {file.name for file in (tmp_path / "mnist" / VERSION).iterdir()}
    assert files == {file.name for file in (conftest.SHARED / "tfds/mnist" / VERSION).iterdir()}
    written = capfd.readouterr()
    assert written.out == ""
    assert written.err == ""


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_corrupted_download_is_refused_and_nothing_is_left(serving_mnist, tmp_path, damage):
    path = "/train-images-idx3-ubyte.gz"
    body = bytearray(serving_mnist.files[path])
    if damage == "flipped":
        body[len(body) // 2] ^= 1
        serving_mnist.files[path] = bytes(body)
    elif damage == "truncated":
        serving_mnist.files[path] = bytes(body[:-1])
    else:
        del serving_mnist.files[path]
    first = refusal("mnist", tmp_path)
    assert "mnist" in first
    if damage != "missing":
        assert "checksum" in first.lower()
    assert not (tmp_path / "mnist" / VERSION).exists()
    # A second call does not mistake leftovers of the first for a prepared set.
    assert refusal("mnist", tmp_path)


def test_a_server_that_is_down(prepared, server, tmp_path, monkeypatch):
    with socket.socket() as silent:  # a port that does not listen, and that nobody else gets
        silent.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        point_at(server, monkeypatch)
        text = refusal("mnist", tmp_path)
    for part in ("mnist", str(tmp_path), "127.0.0.1", "--data-dir", "mnist_5k"):
        assert part in text


def test_a_server_in_trouble(prepared, server, tmp_path, monkeypatch):
    point_at(server, monkeypatch)
    server.files["/train-images-idx3-ubyte.gz"], server.status = b"", 503
    assert "503" in refusal("mnist", tmp_path)


def test_a_server_that_never_answers(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_PROBE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_server = type("Silent", (), {})()
        silent_server.url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        point_at(silent_server, monkeypatch)
        text = refusal("mnist", tmp_path)
    assert str(tmp_path) in text
    assert not (tmp_path / "mnist").exists()


def test_a_directory_that_cannot_be_made(serving_mnist):
    # /dev/null is not a directory, even for root.
    text = refusal("mnist", "/dev/null/tfds")
    assert "/dev/null/tfds" in text


def test_registered_checksums_are_those_of_the_originals(prepared, originals):
    from tensorflow_datasets.image_classification.mnist import MNIST

    for url, info in MNIST.url_infos.items():
        body = (originals / "mnist" / url.rsplit("/", 1)[1]).read_bytes()
        assert hashlib.sha256(body).hexdigest() == info.checksum
