import os

import numpy as np
import pytest

from capsjax.data.dataset import Split
from capsjax.data.decoded_cache import cached


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "shard").write_bytes(b"records")
    return tmp_path


class Decoder:
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        split = Split(np.full((3, 2, 2, 1), self.calls, np.uint8), np.arange(3, dtype=np.int32))
        return split, split


def entries(cache_home):
    return sorted((cache_home / "capsjax").iterdir())


def test_a_second_call_does_not_decode(directory, cache_home):
    decode = Decoder()
    first, second = (cached(directory, "set-1.0.0", decode) for _ in range(2))
    assert decode.calls == 1
    np.testing.assert_array_equal(first[0].images, second[0].images)
    np.testing.assert_array_equal(first[1].labels, second[1].labels)
    assert second[0].images.dtype == np.uint8
    assert second[0].labels.dtype == np.int32
    assert [entry.suffix for entry in entries(cache_home)] == [".npz"]


def touch(file):
    os.utime(file, ns=(0, 0))


@pytest.mark.parametrize(
    "change",
    [
        touch,
        lambda file: file.write_bytes(b"more records"),
        lambda file: file.rename(file.with_name("other")),
    ],
    ids=["time", "size", "name"],
)
def test_a_changed_directory_is_decoded_anew(directory, change):
    decode = Decoder()
    cached(directory, "set-1.0.0", decode)
    change(directory / "shard")
    cached(directory, "set-1.0.0", decode)
    assert decode.calls == 2


def test_sets_do_not_share_entries(directory):
    decode = Decoder()
    cached(directory, "set-1.0.0", decode)
    cached(directory, "set-2.0.0", decode)
    assert decode.calls == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no zip",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"\1" * 12, b"\2" * 12),
    ],
    ids=["empty", "text", "truncated", "pixels"],
)
def test_a_damaged_entry_is_decoded_anew_and_replaced(directory, cache_home, damage):
    decode = Decoder()
    cached(directory, "set-1.0.0", decode)
    (entry,) = entries(cache_home)
    entry.write_bytes(damage(entry.read_bytes()))
    assert cached(directory, "set-1.0.0", decode)[0].images[0, 0, 0, 0] == 2
    cached(directory, "set-1.0.0", decode)
    assert decode.calls == 2


def test_without_a_place_to_write(directory, tmp_path_factory, monkeypatch):
    blocked = tmp_path_factory.mktemp("blocked") / "file"
    blocked.write_text("a file where the cache directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    decode = Decoder()
    for _ in range(2):
        cached(directory, "set-1.0.0", decode)
    assert decode.calls == 2


def test_a_failed_write_leaves_nothing(directory, cache_home, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    cached(directory, "set-1.0.0", Decoder())
    assert entries(cache_home) == []


def test_errors_of_decoding_are_passed_on(directory):
    def fail():
        raise ValueError("damaged shard")

    with pytest.raises(ValueError, match="damaged shard"):
        cached(directory, "set-1.0.0", fail)
