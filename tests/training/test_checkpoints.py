import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsjax import models
from capsjax.training import (
    CheckpointError,
    Checkpoints,
    TrainState,
    init_state,
    paper_optimizer,
    split_network,
)


def state_of(config, seed=0):
    _, variables = split_network(models.build(config, rngs=nnx.Rngs(seed)))
    return init_state(variables, paper_optimizer())


@pytest.fixture
def saved(tmp_path, tiny):
    """Six checkpoints, the best of which is the second."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = state_of(tiny)
    for step, error in enumerate((0.5, 0.1, 0.4, 0.3, None, 0.2), start=1):
        checkpoints.save(state._replace(step=jnp.int32(step)), step, error)
    checkpoints.finish()
    yield checkpoints, state
    checkpoints.close()


def test_keeps_the_latest_and_the_best(saved):
    checkpoints, _ = saved
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.choose("last") == 6
    assert checkpoints.choose("best") == 2
    assert checkpoints.choose("5") == 5


def test_reads_what_was_written(saved, tiny):
    checkpoints, state = saved
    restored = checkpoints.restore(2, state_of(tiny, seed=1))
    assert int(restored.step) == 2
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)


def test_a_donated_state_is_saved_as_it_was(tmp_path, tiny):
    checkpoints = Checkpoints(tmp_path)
    state = state_of(tiny)
    expected = jax.device_get(jax.tree.map(jnp.copy, state.params))
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)
    checkpoints.save(state, 1, None)
    overwrite(state)
    checkpoints.finish()
    restored = checkpoints.restore(1, state_of(tiny, seed=1))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored.params, expected)


@pytest.mark.parametrize(
    ("which", "match"),
    [("3", "no checkpoint of step 3 in .*, only 2, 5, 6"), ("first", "last, best or a step")],
)
def test_a_checkpoint_that_is_not_there_is_named(saved, which, match):
    with pytest.raises(CheckpointError, match=match):
        saved[0].choose(which)


def test_values_that_are_not_those_that_were_saved_are_refused(saved, tiny):
    checkpoints, state = saved
    five, six = (checkpoints.path / name / "default" for name in "56")
    five.rename(checkpoints.path / "away")
    six.rename(five)
    (checkpoints.path / "away").rename(six)
    with pytest.raises(CheckpointError, match=r"5 is damaged .*\(step has another checksum\)"):
        checkpoints.restore(5, state)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_description_that_was_changed_is_refused(saved):
    checkpoints, state = saved
    description = checkpoints.path / "6" / "_CHECKPOINT_METADATA"
    edit(description, '"checksums"', '"checksumt"')
    edit(checkpoints.path / "5" / "_CHECKPOINT_METADATA", "{", "")
    edit(checkpoints.path / "2" / "metrics" / "metrics", "0.1", "0.9")
    again = Checkpoints(checkpoints.path, read_only=True)
    for which, read in (
        (6, lambda: again.restore(6, state)),
        (5, lambda: again.restore(5, state)),
        (2, lambda: again.choose("best")),
    ):
        with pytest.raises(CheckpointError, match=rf"{which} is damaged or truncated"):
            read()
    again.close()


def test_checkpoints_without_a_description_are_read(saved):
    """Those of earlier versions."""
    checkpoints, state = saved
    for step in checkpoints.steps():
        path = checkpoints.path / str(step) / "_CHECKPOINT_METADATA"
        path.write_text(json.dumps({**json.loads(path.read_text()), "custom_metadata": {}}))
    again = Checkpoints(checkpoints.path, read_only=True, run={"train": {"seed": 1}})
    assert int(again.restore(again.choose("best"), state).step) == 2
    again.close()


def test_a_checkpoint_of_another_run_is_named(tmp_path, tiny):
    state = state_of(tiny)
    written = Checkpoints(tmp_path, run={"train": {"seed": 0, "gone": 1}, "stratified": True})
    written.save(state, 1, None)
    written.finish()
    written.close()
    for run, match in (
        ({"train": {"seed": 0, "new": 2}, "stratified": True}, None),
        (None, None),
        ({"train": {"seed": 1}}, "train.seed is 0, expected 1"),
        ({"stratified": False}, "stratified is True, expected False"),
    ):
        checkpoints = Checkpoints(tmp_path, read_only=True, run=run)
        expected = contextlib.nullcontext()
        if match:
            expected = pytest.raises(CheckpointError, match=match)
        with expected:
            checkpoints.restore(1, state)
        checkpoints.close()


def test_no_checkpoint_at_all(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.choose("last")
    checkpoints.close()


def test_without_validation_there_is_no_best(tmp_path, tiny, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(tiny), 1, None)
    checkpoints.finish()
    assert not caplog.records
    with pytest.raises(CheckpointError, match="was validated"):
        checkpoints.choose("best")
    checkpoints.close()


def test_a_checkpoint_of_another_network_is_named(saved, tiny, tiny_with_decoder):
    import dataclasses

    checkpoints, _ = saved
    other = dataclasses.replace(tiny, class_features=6)
    with pytest.raises(CheckpointError, match="is of another network: .*kernel has shape"):
        checkpoints.restore(2, state_of(other))
    with pytest.raises(CheckpointError, match="is of another network: .*decoder.* has shape none"):
        checkpoints.restore(2, state_of(tiny_with_decoder))


@pytest.mark.parametrize("text", ["", "null", "{}", '{"validation_error": NaN}', "[" * 100_000])
def test_metrics_that_are_damaged_are_named_when_checkpoints_are_opened(tmp_path, text):
    state = TrainState(jnp.int32(1), {"w": jnp.ones(2)}, {}, {})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 1, 0.5)
    checkpoints.finish()
    checkpoints.close()
    (tmp_path / "1" / "metrics" / "metrics").write_text(text)
    with pytest.raises(CheckpointError, match=rf"metrics is damaged: .*; move {tmp_path}/1 away"):
        Checkpoints(tmp_path, read_only=True)
