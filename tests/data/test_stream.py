import secrets
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from stored import write_folder

from capsjax.data import DataError, epoch_order, load, stream
from capsjax.data.stream import EpochOrder, InOrder, open_stream

pytest.importorskip("grain")

KEY = jax.random.key(7)


def order(count, batch_size, positions=None):
    chosen = np.arange(batch_size) if positions is None else np.array(positions)
    data = np.asarray(jax.random.key_data(KEY))
    return EpochOrder(data, str(jax.random.key_impl(KEY)), True, count, batch_size, chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), 30)


@pytest.fixture(scope="module")
def dataset(folder):
    return load("image_folder", data_dir=folder, in_memory=False)


@pytest.fixture(scope="module")
def resident(folder):
    return load("image_folder", data_dir=folder)


def read(split, of, batches, workers=0):
    with open_stream(split, of, batches, workers=workers) as batches_read:
        return [(np.array(images), np.array(labels)) for images, labels in batches_read]


def assert_same(batches, expected):
    for (images, labels), split in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(images, split.images)
        np.testing.assert_array_equal(labels, split.labels)


def test_stored_images_are_those_in_memory(dataset, resident):
    for split in ("train", "test"):
        whole = getattr(dataset, split).read()
        np.testing.assert_array_equal(whole.images, getattr(resident, split).images)
        np.testing.assert_array_equal(whole.labels, getattr(resident, split).labels)
    assert dataset.train.images.nbytes == resident.train.images.nbytes


def test_the_order_is_that_of_resident_training():
    ours = order(30, 4)
    for step in (0, 6, 7, 20):
        epoch, number = divmod(step, 7)
        whole = np.asarray(epoch_order(jax.random.fold_in(KEY, epoch), 30))
        np.testing.assert_array_equal(ours(step), whole[4 * number :][:4])
    np.testing.assert_array_equal(order(30, 4, [2, 3])(5), ours(5)[2:])


def test_a_stream_begins_at_any_batch(dataset, resident):
    batches = read(dataset.train, order(30, 4), range(5, 16))
    assert_same(batches, [resident.train.take(order(30, 4)(step)) for step in range(5, 16)])


def test_the_last_batch_is_filled_up(dataset, resident):
    batches = read(dataset.test, InOrder(10, 4, np.arange(4)), range(3))
    last = resident.test.take(np.array([8, 9, 9, 9]))
    assert_same(batches[2:], [last])


def test_images_in_memory_are_a_stream_too(resident):
    batches = read(resident.train, order(30, 4), range(3), workers=2)
    assert_same(batches, [resident.train.take(order(30, 4)(step)) for step in range(3)])


def test_large_batches_are_read_in_pieces(dataset, resident, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE", 3 * 12 * 12)  # three images
    batches = read(dataset.train, order(30, 10), range(4))
    assert_same(batches, [resident.train.take(order(30, 10)(step)) for step in range(4)])


def test_worker_processes_read_the_same(dataset, resident):
    batches = read(dataset.train, order(30, 4), range(3, 12), workers=2)
    assert_same(batches, [resident.train.take(order(30, 4)(step)) for step in range(3, 12)])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path, workers):
    write_folder(tmp_path, 9)
    broken = tmp_path / "train" / "dog" / "0004.png"
    broken.write_bytes(broken.read_bytes()[:90])
    dataset = load("image_folder", data_dir=tmp_path, in_memory=False)
    with pytest.raises(DataError, match="dog/0004.png.*repair or remove the file") as error:
        read(dataset.train, InOrder(9, 3, np.arange(3)), range(3), workers)
    assert "\n" not in str(error.value)


def test_images_unlike_the_first_are_named(tmp_path):
    write_folder(tmp_path, 9)
    write_folder(tmp_path, 3, shape=(10, 12))
    dataset = load("image_folder", data_dir=tmp_path, in_memory=False, image_size=10)
    assert dataset.train.read().images.shape == (9, 10, 10, 1)
    dataset = load("image_folder", data_dir=tmp_path, in_memory=False)
    for split, number in (("train", "0003"), ("test", "1002")):
        named = f"10 x 12 x 1 like the first, got 12 x 12 x 1 in .*{number}"
        with pytest.raises(DataError, match=named):
            getattr(dataset, split).read()


def test_files_are_known_by_names_and_sizes(tmp_path):
    def checksum():
        dataset = load("image_folder", data_dir=tmp_path, in_memory=False)
        return dataset.train.images.checksum

    write_folder(tmp_path, 9)
    first = checksum()
    assert checksum() == first
    file = tmp_path / "train" / "cat" / "0000.png"
    file.rename(file.with_name("0000b.png"))
    assert checksum() != first


ENDS = """
import os, signal, sys
from multiprocessing import shared_memory
import numpy as np
from capsjax.data import load
from capsjax.data.stream import InOrder, open_stream

# Of this test alone; the workers read these lines, too.
shared_memory._SHM_NAME_PREFIX = sys.argv[3]

if __name__ == "__main__":
    train = load("image_folder", data_dir=sys.argv[1], in_memory=False).train
    with open_stream(train, InOrder(30, 2, np.arange(2)), range(15), workers=1) as batches:
        next(batches)
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "worker":
            from multiprocessing import active_children
            os.kill(active_children()[0].pid, signal.SIGKILL)
            for _ in batches:
                pass
"""


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("killed", -9, ""),
        pytest.param("worker", 1, "--workers 0 reads in this process", marks=pytest.mark.slow),
    ],
)
def test_no_process_and_no_memory_is_left_behind(folder, tmp_path, how, code, text):
    script = tmp_path / "script.py"
    script.write_text(ENDS)
    prefix = f"cj{secrets.token_hex(3)}"
    # The workers inherit the pipe: it ends with the last of them.
    done = subprocess.run(
        [sys.executable, script, folder, how, f"/{prefix}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code
    assert text in done.stderr
    if how == "killed":  # a worker that is killed may have made memory that nobody knows of yet
        assert not list(Path("/dev/shm").glob(f"{prefix}*"))  # where Linux keeps shared memory


def test_without_grain_a_stream_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs grain, which is not installed: pip install"):
        stream.check_installed()
