"""Minutes of training on the real MNIST: `pytest -m slow`; results in docs/measurements.md."""

import json

import pytest

from capsjax.training import TrainConfig, train

pytestmark = pytest.mark.slow


def test_small_reaches_one_percent(tmp_path, shared):
    config = TrainConfig(
        dataset="mnist", data_dir=shared / "tfds", epochs=14, devices=1, run_dir=tmp_path / "run"
    )
    result = train(config)
    assert result.test.count == 10_000
    assert result.test.error <= 0.01


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
