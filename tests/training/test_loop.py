import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import types
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard_events import scalars

from capsjax import routing, uniform_routing
from capsjax.data import Dataset, Split, Task
from capsjax.training import (
    Checkpoints,
    ConfigError,
    DivergedError,
    EvaluateConfig,
    TrainConfig,
    evaluate,
    hold_out,
    train,
)
from capsjax.training.picture import reconstruction_grid
from capsjax.training.reporting import Report
from capsjax.training.run_directory import RunDirectory
from capsjax.training.setup import set_up
from capsjax.training.step import initial_variables, split_abstract
from capsjax.training.stopping import StopRequest


def config(tmp_path, **options):
    defaults = {
        "run_dir": tmp_path / "run",
        "batch_size": 16,
        "steps": 23,
        "validation": 20,
        "log_every": 4,
        "checkpoint_every": 7,
        "tensorboard": False,
    }
    return TrainConfig(**{**defaults, **options})


def parameters(run_dir):
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    manager = checkpoints._manager
    step = checkpoints.choose("last")
    state = manager.restore(step)
    checkpoints.close()
    return step, state


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits, tiny_with_decoder):
    """A whole run on eight devices: 160 training images, ten steps an epoch."""
    tmp_path = tmp_path_factory.mktemp("finished")
    result = train(config(tmp_path, tensorboard=True), model=tiny_with_decoder, dataset=digits)
    return tmp_path / "run", result


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory, digits, tiny):
    """A whole run of eight steps on one device, with checkpoints at 7 and 8."""
    options = config(tmp_path_factory.mktemp("eight"), driver="jit", steps=8)
    train(options, model=tiny, dataset=digits)
    return options


@pytest.fixture
def copied(eight_steps, tmp_path):
    """A copy of the run of eight steps, for a test to go on with or to damage."""
    shutil.copytree(eight_steps.run_dir, tmp_path / "run")
    return dataclasses.replace(eight_steps, run_dir=tmp_path / "run")


def test_a_finished_run_leaves_everything_behind(finished):
    run, result = finished
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "reconstructions.png",
        "result.json",
        "tensorboard",
    ]
    written = json.loads((run / "result.json").read_text())
    assert result.step == written["step"] == 23
    assert result.test.count == written["test_count"] == 101
    assert written["test_error"] == result.test.wrong / 101
    assert (run / "reconstructions.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_cover_every_step_once(finished):
    run, _ = finished
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {
        split: [r["step"] for r in records if r["split"] == split]
        for split in ("train", "validation", "test")
    }
    assert steps == {"train": [4, 8, 12, 16, 20, 23], "validation": [7, 14, 21, 23], "test": [23]}
    assert all(r["count"] == 20 for r in records if r["split"] == "validation")
    assert all(0 <= r["error"] <= 1 and r["loss"] > 0 for r in records)


def test_tensorboard_holds_the_same_numbers(finished):
    run, _ = finished
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], r["loss"]) for r in records if r["split"] == "train"]
    np.testing.assert_allclose(scalars(run / "tensorboard", "train/loss"), expected, rtol=1e-6)


def test_evaluate_repeats_the_run_s_test_result(finished, digits, monkeypatch):
    run, result = finished
    monkeypatch.setattr("capsjax.training.inputs.load", lambda *_, **__: digits)
    evaluated = evaluate(EvaluateConfig(run_dir=run, batch_size=16))
    assert (evaluated.step, evaluated.test.wrong) == (23, result.test.wrong)
    assert evaluated.test.class_wrong == result.test.class_wrong
    assert evaluated.test.class_count == tuple(np.bincount(digits.test.labels))
    assert sum(evaluated.test.class_wrong) == result.test.wrong
    np.testing.assert_allclose(evaluated.test.loss, result.test.loss, rtol=1e-5)
    best = evaluate(EvaluateConfig(run_dir=run, batch_size=16, checkpoint="best"))
    assert best.step in (7, 14, 21, 23)


def test_a_network_of_the_package_is_evaluated_as_a_run_is(digits):
    packaged = EvaluateConfig(run_dir=Path("mnist_small"), driver="jit", batch_size=101)
    evaluated = evaluate(packaged, dataset=digits)
    assert evaluated.step is None
    assert (evaluated.test.count, evaluated.test.wrong <= 5) == (101, True)


def test_a_report_starts_neither_threads_nor_processes(tmp_path, monkeypatch):
    # Where they have to be waited for, a run that is complete may never end.
    for kind in (threading.Thread, multiprocessing.Process, os):
        monkeypatch.setattr(kind, "fork" if kind is os else "start", None)
    directory = RunDirectory(tmp_path)
    with Report([directory], total_steps=3, step=1, tensorboard=True) as report:
        report.record("train", 2, [{"loss": 1.5, "error": 0.5}])
    assert scalars(directory.tensorboard, "train/loss") == [(2, 1.5)]


def test_a_stop_request_survives_a_terminal_that_is_gone(monkeypatch):
    monkeypatch.setattr(os, "write", Mock(side_effect=BrokenPipeError))
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


def test_while_files_are_closed_a_signal_is_obeyed(tmp_path, digits, tiny, monkeypatch):
    monkeypatch.setattr("capsjax.training.run.train_and_test", lambda *_: None)
    monkeypatch.setattr(Checkpoints, "close", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, driver="jit", steps=1), model=tiny, dataset=digits)


def test_the_step_is_compiled_once_in_a_run_and_for_others_like_it(tmp_path, digits, tiny, caplog):
    # No other test has this rate, and so none has compiled the step.
    own = {"driver": "jit", "steps_per_dispatch": 3, "learning_rate": 0.0017}

    def compiled(name, **options):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            train(config(tmp_path / name, **own | options), model=tiny, dataset=digits)
        found = [r for r in caplog.messages if "Finished XLA compilation" in r]
        return sum("run_steps" in r for r in found), len(found)

    assert compiled("first")[0] == 1
    assert compiled("other", seed=1, steps=9, log_every=3) == (0, 0)
    weights, other = (parameters(tmp_path / n / "run")[1]["params"] for n in ("first", "other"))
    assert (weights["conv"]["kernel"] != other["conv"]["kernel"]).all()


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({"seed": 1, "steps": 9, "log_every": 2, "keep": 1, "steps_per_dispatch": 5}, True),
        ({"schedule": "cosine"}, False),
        ({"learning_rate": 0.002}, False),
        ({"clip_norm": 1.0}, False),
        ({"max_shift": 1}, False),
        ({"fill": 0.5}, False),
        ({"flip": "both"}, False),
        ({"loss": "official"}, False),
        ({"class_weights": (1.0,) * 9 + (2.0,)}, False),
        ({"freeze": ("conv",)}, False),
        ({"driver": "shard"}, False),
        ({"batch_size": 8}, False),
    ],
)
def test_runs_share_the_programs_that_are_the_same(tmp_path, digits, tiny, options, shared):
    default = config(tmp_path, driver="jit")
    feeds = [
        set_up([each], tiny, digits).feed
        for each in (default, dataclasses.replace(default, **options))
    ]
    assert (feeds[0].steps is feeds[1].steps) == shared
    assert feeds[0].evaluate is feeds[1].evaluate or not shared


def test_a_schedule_that_ends_with_the_run_is_another_for_each_length(tmp_path, digits, tiny):
    feeds = [
        set_up([config(tmp_path, driver="jit", schedule="cosine", steps=n)], tiny, digits).feed
        for n in (9, 9, 10)
    ]
    assert feeds[0].steps is feeds[1].steps
    assert feeds[0].steps is not feeds[2].steps


@dataclasses.dataclass(frozen=True, eq=False)
class Own(Task):
    mean: np.ndarray  # which cannot be hashed


def test_what_a_program_of_the_user_contains_is_compiled_anew(tmp_path, digits, tiny):
    def own(votes, *, where=None):
        return uniform_routing(votes, where=where)

    options = config(tmp_path, driver="jit")
    with registered(dataclasses.replace(routing.algorithm("uniform"), name="x", function=own)):
        network = dataclasses.replace(tiny, routing="x")
        setups = [set_up([options], network, digits) for _ in range(2)]
    assert setups[0].feed.steps is not setups[1].feed.steps
    dataset = dataclasses.replace(digits, task=Own(np.zeros(3)))
    setups = [set_up([options], tiny, dataset) for _ in range(2)]
    assert setups[0].feed.steps is not setups[1].feed.steps


@contextlib.contextmanager
def registered(record):
    routing.register(record)
    try:
        yield
    finally:
        routing.unregister(record.name)


def test_an_algorithm_that_takes_the_name_of_another_shares_nothing_with_it(tiny):
    applies, shapes = [], []
    for record in map(routing.algorithm, ("uniform", "self")):
        with registered(dataclasses.replace(record, name="x")):
            network = dataclasses.replace(tiny, routing="x")
            applies += [split_abstract(network)[0], split_abstract(network)[0]]
            variables = initial_variables(network, jax.random.key(0))
            shapes.append(jax.tree.map(jnp.shape, variables.params["classes"]))
    assert applies[0] is applies[1]
    assert applies[2] is applies[3]
    assert applies[0] is not applies[2]
    assert shapes[0] != shapes[1]  # the second one learns more


@pytest.mark.parametrize(
    ("driver", "stop", "steps"),
    [pytest.param("jit", 5, 8, marks=pytest.mark.slow), ("pmap", 9, 23)],
)
def test_a_resumed_run_repeats_an_uninterrupted_one(request, tmp_path, digits, driver, stop, steps):
    if driver == "jit":
        whole, model = request.getfixturevalue("eight_steps").run_dir, "tiny"
    else:
        whole, model = request.getfixturevalue("finished")[0], "tiny_with_decoder"
    # Stopped in the middle of an epoch, between two records, and resumed with other calls.
    parts = config(tmp_path, driver=driver, steps=stop, steps_per_dispatch=2)
    train(parts, model=request.getfixturevalue(model), dataset=digits)
    train(
        dataclasses.replace(parts, steps=steps, resume=True, steps_per_dispatch=5), dataset=digits
    )
    (step, expected), (resumed_step, resumed) = map(parameters, (whole, parts.run_dir))
    assert step == resumed_step == steps
    assert_same_bits(expected, resumed)


def test_metrics_of_a_resumed_run_have_no_step_twice(copied, digits):
    # As if the process had died after records that no checkpoint covers.
    path = copied.run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [r for r in records if r["split"] != "test"]
    records[-1]["seconds"] = 1000.0
    records.append({"split": "train", "step": 12, "loss": 9.0, "error": 1.0})
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"split": "tr')
    train(dataclasses.replace(copied, steps=16, resume=True), dataset=digits)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == [4, 8, 12, 16]
    assert all(r["loss"] != 9.0 for r in records)
    # The time goes on as well.
    assert all((r["seconds"] >= 1000) == (r["step"] > 8) for r in records if r["step"] != 8)


def test_the_throughput_is_that_of_the_steps_alone(tmp_path, digits, tiny, monkeypatch):
    # A clock that goes on by a second whenever it is read: at the start, and after each step.
    clock = types.SimpleNamespace(monotonic=functools.partial(next, itertools.count(0.0)))
    monkeypatch.setattr("capsjax.training.loop.time", clock)
    options = config(tmp_path, driver="jit", steps=8, log_every=4, steps_per_dispatch=1)
    for interval in (3, 4):
        directory = tmp_path / str(interval)
        parts = dataclasses.replace(options, run_dir=directory, checkpoint_every=interval)
        train(parts, model=tiny, dataset=digits)
        records = RunDirectory(directory).read_metrics()
        speeds = [r["examples_per_second"] for r in records if r["split"] == "train"]
        assert speeds == [options.batch_size] * 2


def test_a_request_to_stop_saves_and_ends(tmp_path, digits, tiny, monkeypatch):
    def stop_at_step_nine(self, step, *_):
        if step == 9:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Report, "progress", stop_at_step_nine)
    options = config(tmp_path, driver="jit", steps_per_dispatch=1)
    stopped = train(options, model=tiny, dataset=digits)
    assert stopped.stopped_by == signal.SIGTERM
    assert stopped.test is None
    step, _ = parameters(options.run_dir)
    assert step == stopped.step < 23


def test_a_run_that_was_stopped_before_its_first_step_goes_on(tmp_path, digits, tiny, monkeypatch):
    options = config(tmp_path, driver="jit", steps=3, validation=0)
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "requested", lambda self: True)
        stopped = train(options, model=tiny, dataset=digits)
    assert stopped.step == 0
    resumed = train(dataclasses.replace(options, resume=True), model=tiny, dataset=digits)
    assert resumed.step == 3


def test_a_validation_that_was_stopped_is_made_up_for(tmp_path, digits, tiny, monkeypatch):
    options = config(tmp_path, driver="jit", steps=14)
    evaluating = Report.evaluating

    @contextlib.contextmanager
    def stop_in_the_first_validation(self, what):
        signal.raise_signal(signal.SIGINT)
        with evaluating(self, what):
            yield

    with monkeypatch.context() as patch:
        patch.setattr(Report, "evaluating", stop_in_the_first_validation)
        stopped = train(options, model=tiny, dataset=digits)
    assert (stopped.step, stopped.validation_error) == (7, None)
    train(dataclasses.replace(options, resume=True), dataset=digits)
    lines = (options.run_dir / "metrics.jsonl").read_text().splitlines()
    validated = [r for r in map(json.loads, lines) if r["split"] == "validation"]
    assert [r["step"] for r in validated] == [7, 14]
    best = Checkpoints(options.run_dir / "checkpoints", read_only=True)
    assert best.choose("best") == min(reversed(validated), key=lambda r: r["error"])["step"]
    best.close()


def test_a_run_that_died_before_its_first_checkpoint_starts_afresh(copied, digits):
    shutil.rmtree(copied.run_dir / "checkpoints")
    (copied.run_dir / "result.json").unlink()
    result = train(dataclasses.replace(copied, resume=True), dataset=digits)
    assert (result.first_step, result.step) == (0, 8)
    lines = (copied.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [r["step"] for r in map(json.loads, lines) if r["split"] == "train"] == [4, 8]


def test_a_run_is_not_cut_short_by_resuming_it(copied, digits):
    with pytest.raises(ConfigError, match="is finished at step 8"):
        train(dataclasses.replace(copied, resume=True, steps=6), dataset=digits)
    (copied.run_dir / "result.json").unlink()
    with pytest.raises(ConfigError, match="is already at step 8, beyond the 6 steps"):
        train(dataclasses.replace(copied, resume=True, steps=6), dataset=digits)


def test_other_data_than_the_run_s_are_refused(copied, tmp_path, digits, tiny):
    longer = dataclasses.replace(copied, resume=True, steps=9)
    images, labels = digits.train
    for other, what in (
        (dataclasses.replace(digits, class_names=tuple("abcdefghij")), "class names were"),
        (dataclasses.replace(digits, train=Split(images[1:], labels[1:])), "train images were 180"),
        (dataclasses.replace(digits, train=Split(images[::-1], labels)), "checksum were"),
    ):
        with pytest.raises(ConfigError, match=f"not the one that the run was started.*{what}"):
            train(longer, dataset=other)
    empty = dataclasses.replace(digits, test=Split(images[:0], labels[:0]))
    with pytest.raises(ConfigError, match="has no test images"):
        train(config(tmp_path / "b"), model=tiny, dataset=empty)


def test_checkpoints_of_a_run_without_configuration_are_left_alone(copied, digits, tiny):
    (copied.run_dir / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints of a run whose config.json is miss"):
        train(copied, model=tiny, dataset=digits)


def test_stop_request_notes_the_first_signal_and_obeys_the_second():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(copied, digits):
    longer = dataclasses.replace(copied, steps=23, resume=True, learning_rate=1e38)
    with pytest.raises(
        DivergedError, match=r"step \d+; the last good checkpoint is that of step 8"
    ):
        train(longer, dataset=digits)
    step, state = parameters(copied.run_dir)
    assert step == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, digits, tiny):
    options = config(
        tmp_path, driver="jit", steps=2, checkpoint_every=1, learning_rate=1e38, validation=0
    )
    with pytest.raises(DivergedError, match="not finite at step"):
        train(options, model=tiny, dataset=digits)
    checkpoints = Checkpoints(options.run_dir / "checkpoints", read_only=True)
    saved = checkpoints.steps()
    checkpoints.close()
    for step in saved:
        manager = Checkpoints(options.run_dir / "checkpoints", read_only=True)
        state = manager._manager.restore(step)
        manager.close()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_start_that_fails_leaves_its_name_free(tmp_path, digits, tiny, monkeypatch):
    def fail(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("capsjax.training.run.begin", fail)
    with pytest.raises(OSError, match="Cannot allocate"):
        train(config(tmp_path), model=tiny, dataset=digits)
    assert list(tmp_path.iterdir()) == []


def test_validation_images_are_never_trained_on(digits):
    train_split, validation = hold_out(digits.train, 30)
    assert (len(train_split.labels), len(validation.labels)) == (150, 30)
    kept = {image.tobytes() for image in train_split.images}
    held = {image.tobytes() for image in validation.images}
    assert not kept & held
    everything = {image.tobytes() for image in digits.train.images}
    assert kept | held == everything
    assert hold_out(digits.train, 0)[1] is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 12}, "divisible by the number of devices, 8, got 12"),
        ({"batch_size": 800, "driver": "jit"}, "--batch-size must be at most .* 160, got 800"),
        ({"validation": 180}, "--validation must be less than .* 180, got 180"),
        ({"devices": 99}, "--devices must be at most 8, the number of cpu devices, got 99"),
        ({"epochs": 3}, "--epochs has no effect with --steps 23"),
        ({"epochs": 10**9, "steps": None}, "--epochs must make fewer than 2147483648 steps"),
        ({"decay_rate": 1.0, "decay_steps": 5}, "--decay-steps has no effect with --decay-rate 1"),
        ({"routing": "em"}, "--routing has no effect on a network whose configuration is given"),
        ({"dtype": "bfloat16"}, "--dtype has no effect on a network .* float32, got bfloat16"),
        ({"loss": "cross_entropy"}, "must be paper, official or spread, got 'cross_entropy'"),
    ],
)
def test_options_that_do_not_go_together_are_named(tmp_path, digits, tiny, options, match):
    with pytest.raises(ConfigError, match=match):
        train(config(tmp_path, **options), model=tiny, dataset=digits)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_run_is_not_overwritten(finished, digits, tiny):
    run, _ = finished
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run; resume it with --resume"):
        train(config(run.parent), model=tiny, dataset=digits)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_images_that_the_network_does_not_take_are_named(finished, digits, monkeypatch):
    run, _ = finished
    small = digits.test._replace(images=digits.test.images[:, :20])
    other = dataclasses.replace(
        digits, train=digits.train._replace(images=digits.train.images[:, :20]), test=small
    )
    monkeypatch.setattr("capsjax.training.inputs.load", lambda *_, **__: other)
    with pytest.raises(ConfigError, match="images of 20x28x1, but the network takes 28x28x1"):
        evaluate(EvaluateConfig(run_dir=run, batch_size=16))
    halves = (s._replace(labels=s.labels % 2) for s in (digits.train, digits.test))
    fewer = Dataset("parity", *halves, class_names=("even", "odd"))
    monkeypatch.setattr("capsjax.training.inputs.load", lambda *_, **__: fewer)
    with pytest.raises(ConfigError, match="has 2 classes, but the network has 10"):
        evaluate(EvaluateConfig(run_dir=run, batch_size=16))


def test_the_result_does_not_wait_for_the_picture(tmp_path, digits, tiny_with_decoder, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("capsjax.training.run.draw_reconstructions", fail)
    options = config(tmp_path, steps=1, validation=0, driver="jit")
    with pytest.raises(OSError, match="No space"):
        train(options, model=tiny_with_decoder, dataset=digits)
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_pictures_of_any_number_of_channels(channels):
    pixels = np.linspace(0, 1, 6 * channels).reshape(1, 2, 3, channels)
    grid = reconstruction_grid([pixels, pixels])
    shown = pixels[..., : 3 if channels > 2 else 1]
    factor = grid.shape[0] // 10
    found = grid[::factor, ::factor][2:4, 2:5]
    np.testing.assert_array_equal(found, np.broadcast_to(np.round(255 * shown[0]), (2, 3, 3)))


def test_a_network_without_a_decoder_draws_nothing(eight_steps):
    assert (eight_steps.run_dir / "result.json").exists()
    assert not (eight_steps.run_dir / "reconstructions.png").exists()
