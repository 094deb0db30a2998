"""Seeds trained together are what each is alone, and go on after an interruption."""

import dataclasses
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from capsjax.training import (
    Checkpoints,
    ConfigError,
    EvaluateConfig,
    evaluate,
    load_network,
    train,
    train_seeds,
)
from capsjax.training.reporting import Report
from capsjax.training.run_directory import RunDirectory

from .test_loop import assert_same_bits, config, parameters

SEEDS = (3, 5)


def group(folder, **options):
    return [
        config(folder, run_dir=folder / f"seed-{seed}", seed=seed, driver="jit", **options)
        for seed in SEEDS
    ]


def resumed(configs, **options):
    return [dataclasses.replace(each, resume=True, **options) for each in configs]


@pytest.fixture(scope="module")
def together(tmp_path_factory, digits, tiny):
    """Two finished runs of 14 steps, with checkpoints at 7 and 14."""
    configs = group(tmp_path_factory.mktemp("together"), steps=14)
    return configs, train_seeds(configs, model=tiny, dataset=digits)


def test_seeds_trained_together_are_what_each_is_alone(together, digits, tiny, tmp_path):
    configs, results = together
    # The last of them; that the first differs from it is asserted below.
    each, result = configs[-1], results[-1]
    alone = dataclasses.replace(each, run_dir=tmp_path / str(each.seed))
    expected = train(alone, model=tiny, dataset=digits)
    assert (result.run_dir, result.step) == (each.run_dir, 14)
    assert abs(result.test.wrong - expected.test.wrong) <= 2
    (_, ours), (_, theirs) = (parameters(c.run_dir) for c in (each, alone))
    # Mapped over seeds, products are ordered differently, and Adam divides by small numbers.
    for a, b in zip(*map(jax.tree.leaves, (ours["params"], theirs["params"])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    metrics, others = (RunDirectory(c.run_dir).read_metrics() for c in (each, alone))
    assert [(r["split"], r["step"]) for r in metrics] == [(r["split"], r["step"]) for r in others]
    np.testing.assert_allclose([r["loss"] for r in metrics], [r["loss"] for r in others], rtol=1e-2)
    first, second = (parameters(c.run_dir)[1]["params"] for c in configs)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_each_directory_is_that_of_an_ordinary_run(together, digits, monkeypatch, tmp_path):
    configs, results = together
    monkeypatch.setattr("capsjax.training.inputs.load", lambda *_, **__: digits)
    for each, result in zip(configs, results, strict=True):
        found = evaluate(EvaluateConfig(run_dir=each.run_dir, batch_size=16, driver="jit"))
        assert (found.step, found.test.wrong) == (14, result.test.wrong)
        # The other's parameters would not give this loss.
        np.testing.assert_allclose(found.test.loss, result.test.loss, rtol=1e-5)
        assert load_network(each.run_dir).step == 14
    copy = tmp_path / "copy"
    shutil.copytree(configs[1].run_dir, copy)
    longer = dataclasses.replace(configs[1], run_dir=copy, resume=True, steps=16)
    assert (train(longer, dataset=digits).first_step, parameters(copy)[0]) == (14, 16)


def test_an_interrupted_group_goes_on_to_the_same_bits(
    together, digits, tiny, tmp_path, monkeypatch
):
    whole, _ = together
    configs = group(tmp_path, steps=14, steps_per_dispatch=1)

    def stop_at_step_nine(self, step, *_):
        if step == 9:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Report, "progress", stop_at_step_nine)
        stopped = train_seeds(configs, model=tiny, dataset=digits)
    assert [r.stopped_by for r in stopped] == [signal.SIGTERM] * 2
    assert 9 <= stopped[0].step < 14
    # As if one directory had been killed before its last save, and an instant later the other.
    last = stopped[0].step
    shutil.rmtree(configs[1].run_dir / "checkpoints" / str(last))
    results = train_seeds(resumed(configs), dataset=digits)
    assert [r.first_step for r in results] == [7, 7]
    for a, b in zip(whole, configs, strict=True):
        assert_same_bits(*(parameters(c.run_dir)[1] for c in (a, b)))
        steps = [(r["split"], r["step"]) for r in RunDirectory(b.run_dir).read_metrics()]
        assert len(steps) == len(set(steps))
        checkpoints = Checkpoints(b.run_dir / "checkpoints", read_only=True)
        assert checkpoints.steps() == [7, 14]
        checkpoints.close()
    with pytest.raises(ConfigError, match="is finished at step 14"):
        train_seeds(resumed(configs), dataset=digits)


def test_a_deadline_saves_as_a_stop_request_does(digits, tiny, tmp_path):
    (options, _) = group(tmp_path)
    (stopped,) = train_seeds([options], model=tiny, dataset=digits, deadline=time.monotonic())
    assert (stopped.test, stopped.stopped_by) == (None, None)
    assert parameters(options.run_dir)[0] == stopped.step


def test_runs_that_differ_in_more_than_their_seed_are_refused(digits, tiny, tmp_path):
    first, second = group(tmp_path)
    for other, match in (
        (dataclasses.replace(second, batch_size=32), "must differ in --seed and --run-dir only"),
        (dataclasses.replace(second, run_dir=first.run_dir), "need a --run-dir each"),
    ):
        with pytest.raises(ConfigError, match=match):
            train_seeds([first, other], model=tiny, dataset=digits)
    ending = [dataclasses.replace(each, until_error=0.5) for each in (first, second)]
    with pytest.raises(ConfigError, match="--until-error is for one run"):
        train_seeds(ending, model=tiny, dataset=digits)
    assert not first.run_dir.exists()


def test_a_run_ends_at_its_error_and_goes_on_with_a_smaller_one(digits, tiny, tmp_path):
    options = config(tmp_path, driver="jit", until_error=0.95, checkpoint_every=2)
    result = train(options, model=tiny, dataset=digits)
    assert result.step == 2
    assert result.validation_error <= 0.95
    again = dataclasses.replace(options, resume=True)
    with pytest.raises(ConfigError, match="is finished at step 2"):
        train(again, dataset=digits)
    smaller = dataclasses.replace(again, until_error=0.0, steps=6)
    assert train(smaller, dataset=digits).step == 6
