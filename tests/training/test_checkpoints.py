import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsjax import models
from capsjax.training import (
    CheckpointError,
    Checkpoints,
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


def test_no_checkpoint_at_all(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.choose("last")
    checkpoints.close()


def test_without_validation_there_is_no_best(tmp_path, tiny):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(tiny), 1, None)
    checkpoints.finish()
    with pytest.raises(CheckpointError, match="has a validation error"):
        checkpoints.choose("best")
    checkpoints.close()


def test_a_checkpoint_of_another_network_is_named(saved, tiny):
    import dataclasses

    checkpoints, _ = saved
    other = dataclasses.replace(tiny, class_features=6)
    with pytest.raises(CheckpointError, match="is of another network: .*kernel has shape"):
        checkpoints.restore(2, state_of(other))
    smaller = dataclasses.replace(tiny, decoder_features=())
    with pytest.raises(CheckpointError, match="is of another network: .*decoder.*expected none"):
        checkpoints.restore(2, state_of(smaller))
