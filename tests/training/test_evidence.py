"""Minutes of training on the real MNIST: `pytest -m slow`; results in docs/measurements.md."""

import json

import forking
import pytest

from capsjax.training import TrainConfig, train

pytestmark = pytest.mark.slow


def test_small_reaches_one_percent(tmp_path, shared):
    run = tmp_path / "run"
    options = ["--dataset", "mnist", "--data-dir", shared / "tfds", "--epochs", 14]
    command = ["-m", "capsjax", "train", *options, "--devices", 1, "--run-dir", run]
    # Compiled as for users, not quickly as for tests, which would take an hour.
    done = forking.run(*command, folder=tmp_path, env={"XLA_FLAGS": ""}, timeout=3000)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["test_count"] == 10_000
    assert result["test_wrong"] <= 100


def test_the_loss_of_the_paper_s_network_falls(tmp_path, shared):
    config = TrainConfig(
        preset="paper",
        dataset="mnist",
        data_dir=shared / "tfds",
        steps=50,
        batch_size=64,
        log_every=10,
        validation=1000,
        devices=1,
        run_dir=tmp_path / "run",
    )
    train(config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["split"] == "train"]
    assert len(losses) == 5
    assert losses[-1] < 0.5 * losses[0]
