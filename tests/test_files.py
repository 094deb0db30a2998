"""Files are replaced whole or not at all; paths are those of this machine, or of object storage."""

import dataclasses
from pathlib import Path

import pytest

from capsjax.errors import ConfigError
from capsjax.files import absolute, is_local, naming, replacing, write_text
from capsjax.options import expand_paths, expanded


def write_half(path):
    with replacing(path) as file:
        file.write(b"half of the n")
        raise OSError(28, "full")


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    write_text(path, "old")
    path.chmod(0o600)
    with pytest.raises(OSError, match="full") as failed:
        write_half(path)
    assert failed.value.filename == str(path)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    write_text(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


def test_two_writers_do_not_share_a_temporary_file_nor_take_one_of_the_user(tmp_path):
    path, foreign = tmp_path / "a.json", tmp_path / "a.json.tmp"
    foreign.write_text("mine")
    with replacing(path) as one, replacing(path) as two:
        one.write(b"1")
        two.write(b"2")
    assert (path.read_text(), foreign.read_text()) == ("1", "mine")


def test_a_link_is_kept_and_a_missing_folder_is_named(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    with pytest.raises(FileNotFoundError) as failed:
        write_text(tmp_path / "none" / "file", "")
    assert failed.value.filename == str(tmp_path / "none" / "file")


@dataclasses.dataclass(frozen=True)
class Options:
    run_dir: Path | None = None
    runs: tuple[Path, ...] = ()


def test_paths_are_expanded_and_addresses_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = Options("~/run", (Path("~"), Path("b")))
    expand_paths(options, "run_dir", "runs")
    assert options == Options(Path("/home/me/run"), (Path("/home/me"), Path("b")))


@pytest.mark.parametrize("address", ["gs://bucket/run", Path("gs://bucket/run")])
def test_a_url_is_for_options_that_take_one(address):
    options = Options(address, (address,))
    expand_paths(options, remote=("run_dir", "runs"))
    for path in (options.run_dir, *options.runs):
        assert not is_local(path)
        assert str(path) == str(absolute(path)) == "gs://bucket/run"
        assert (path.name, str(path / "a")) == ("run", "gs://bucket/run/a")
    with pytest.raises(ConfigError, match="--run-dir must be a path .* got gs://bucket/run"):
        expand_paths(Options(address), "run_dir")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("foo://bucket/run", "on this machine, or on gs://, s3://, az://, got foo://bucket/run"),
        ("gs://bucket/", "--run-dir must name a folder in a bucket, got gs://bucket"),
        ("gs://", "--run-dir must name a folder in a bucket, got gs://"),
        ("gs://bucket/s*", r"--run-dir must not contain \*, got gs://bucket/s\*"),
        ("gs://bucket/ch[a]", r"must not contain \[, got"),
        ("gs://bucket/a#b", "must not contain #, got"),
        ("gs://bucket/a?b", r"must not contain \?, got"),
        ("gs://bucket/a/../b", r"must not contain \.\., got"),
        ("gs://bucket/..", r"must not contain \.\., got"),
        ("gs://bucket/a//b", "must not contain an empty folder name, got"),
    ],
)
def test_a_url_that_cannot_be_is_refused(address, message):
    with pytest.raises(ConfigError, match=message):
        expand_paths(Options(address), remote=("run_dir",))


def fail(path, error):
    with naming(path):
        raise error


def test_errors_of_object_storage_are_operating_system_errors(tmp_path):
    remote = expanded("--run-dir", "gs://bucket/run", remote=True)
    for error, text in ((RuntimeError("no\n answer"), "no answer"), (KeyError(), "KeyError")):
        with pytest.raises(OSError, match=text) as failed:
            fail(remote, error)
        assert (failed.value.strerror, failed.value.filename) == (text, "gs://bucket/run")
        with pytest.raises(type(error)):
            fail(tmp_path, error)
    with pytest.raises(OSError, match="no answer") as failed:
        fail(remote, TimeoutError())
    assert (failed.value.strerror, failed.value.filename) == ("no answer", "gs://bucket/run")
    missing = r"gs://bucket/run needs a package: pip .*gcs.* \(Install gcsfs\)"
    with pytest.raises(ConfigError, match=missing):
        fail(remote, ImportError("Install gcsfs"))
    with pytest.raises(ConfigError):
        fail(remote, ConfigError("an option"))
