"""Runs whose directory is a URL of object storage, held by an emulator on this machine."""

import json

import jax
import numpy as np
import pytest
from tensorboard_events import scalars

from capsjax.errors import ConfigError, ProcessError
from capsjax.files import replacing
from capsjax.training import (
    CheckpointError,
    Checkpoints,
    EvaluateConfig,
    TrainConfig,
    evaluate,
    load_classifier,
    train,
)
from capsjax.training.reporting import Report
from capsjax.training.run_directory import RunDirectory
from capsjax.training.run_lock import lock_of
from capsjax.viz.draw import DrawConfig, draw


def config(run_dir, **options):
    defaults = {"batch_size": 16, "steps": 8, "validation": 20, "log_every": 4}
    settings = {**defaults, "checkpoint_every": 7, "driver": "jit", **options}
    return TrainConfig(run_dir=run_dir, **settings)


def state(run):
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    found = checkpoints._manager.restore(checkpoints.choose("last"))
    checkpoints.close()
    return found


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "examples_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def scalars_of(run, folder, tag):
    """What TensorBoard shows of a run, whose event files are copied."""
    folder.mkdir()
    for source in (run / "tensorboard").iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    return scalars(folder, tag)


@pytest.fixture(scope="module")
def local(tmp_path_factory, digits, tiny_with_decoder):
    """A run on this machine, with checkpoints at 7 and 8."""
    path = tmp_path_factory.mktemp("local") / "run"
    train(config(path), model=tiny_with_decoder, dataset=digits)
    return path


def test_a_run_is_the_same_as_on_this_machine(remote, local, digits, tiny_with_decoder, tmp_path):
    found = train(config(str(remote)), model=tiny_with_decoder, dataset=digits)
    assert str(found.run_dir) == str(remote)
    jax.tree.map(np.testing.assert_array_equal, state(remote), state(local))
    assert records(remote) == records(local)
    tag = "validation/error"
    events = scalars_of(remote, tmp_path / "remote", tag)
    assert [step for step, _ in events] == [7, 8]
    assert scalars_of(local, tmp_path / "local", tag) == events
    assert (remote / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    assert not (remote / ".lock").exists()

    options = EvaluateConfig(run_dir=str(remote), driver="jit")
    found = evaluate(options, dataset=digits).test
    result = json.loads((remote / "result.json").read_text())
    assert (found.wrong, found.count) == (result["test_wrong"], result["test_count"])
    assert load_classifier(str(remote)).step == 8
    paths = draw(DrawConfig(name="curves", runs=(str(remote),)))
    assert [str(path) for path in paths] == [f"{remote}/curves.svg", f"{remote}/curves.png"]
    assert b"<svg" in paths[0].read_bytes()


def test_the_last_to_start_takes_a_run_over(remote):
    first, second = lock_of(remote), lock_of(remote)
    directory = RunDirectory(remote)
    with first.held() as before:
        assert before is None
        first.check()
        with directory.locked() as before:
            assert before.startswith("process ")
            with pytest.raises(ProcessError, match=r"gs://.* was taken over by process \d+ on"):
                first.check()
            report = Report([directory], total_steps=8, step=0, tensorboard=False)
            report.record("train", 4, [{"loss": 1.0, "error": 0.5}])
            report.flush()
            assert len(records(remote)) == 1
            with second.held() as before, report:
                assert before is not None
                report.record("train", 8, [{"loss": 1.0, "error": 0.5}])
                with pytest.raises(ProcessError, match="was taken over"):
                    report.flush()
            assert len(records(remote)) == 1  # nothing of a run that was taken over is written
    with directory.locked() as before:  # the last one ended in good order
        assert before is None


def test_a_run_that_was_taken_over_is_not_removed(remote):
    first, second = RunDirectory(remote), RunDirectory(remote)
    with first.locked():
        first.config.write_text("{}")
        with second.locked():
            first.remove_unless_begun()
            assert first.config.exists()
            second.remove_unless_begun()
            assert not first.config.exists()


def test_auto_resume_goes_back_over_a_checkpoint_that_is_incomplete(
    remote, local, digits, tmp_path, capsys
):
    for source in local.rglob("*"):
        if source.is_file():
            copied = remote / source.relative_to(local).as_posix()
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(source.read_bytes())
    # As two processes leave it that write the same checkpoint.
    (remote / "checkpoints" / "8" / "default" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="8 is damaged"):
        train(config(remote, resume=True, steps=9), dataset=digits)
    train(config(remote, auto_resume=True), dataset=digits)
    assert "8 is damaged or truncated" in (said := capsys.readouterr().err)
    assert "resuming from step 7 instead" in said
    jax.tree.map(np.testing.assert_array_equal, state(remote), state(local))
    ours, theirs = ([r for r in records(x) if r["split"] != "train"] for x in (remote, local))
    assert ours == theirs
    events = scalars_of(remote, tmp_path / "remote", "validation/error")
    assert [step for step, _ in events] == [7, 8, 8]


def test_a_checkpoint_that_is_not_whole_is_none(remote):
    (remote / "checkpoints" / "7" / "default" / "_METADATA").write_text("{}")
    assert RunDirectory(remote).last_checkpoint() == 0
    (remote / "checkpoints" / "7" / "commit_success.txt").write_text("")
    assert RunDirectory(remote).last_checkpoint() == 7


def test_a_run_that_does_not_begin_leaves_nothing(remote, digits, tiny):
    with pytest.raises(ConfigError, match="--batch-size"):
        train(config(remote, batch_size=4096), model=tiny, dataset=digits)
    assert not RunDirectory(remote).exists()


def write_half(path):
    with replacing(path) as file:
        file.write(b"half of the n")
        raise ValueError("half")


def test_an_error_leaves_the_old_object(remote):
    path = remote / "page.html"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(ValueError, match="half"):
        write_half(path)
    assert path.read_bytes() == b"old"


def test_a_bucket_that_is_missing_is_named(storage, digits, tiny):
    options = config("gs://no-such-bucket/run")
    with pytest.raises(ConfigError, match=r"--run-dir gs://no-such-bucket/run cannot be made"):
        train(options, model=tiny, dataset=digits)
    with pytest.raises(ConfigError, match="run directory gs://no-such-bucket/run does not exist"):
        RunDirectory(options.run_dir).read_config()
