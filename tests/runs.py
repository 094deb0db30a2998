"""Run directories without training."""

from flax import nnx

from capsjax import models
from capsjax.training import Checkpoints, TrainConfig, init_state, split_network
from capsjax.training.data_description import DataDescription
from capsjax.training.optimizers import make_optimizer
from capsjax.training.run_directory import RunConfig, RunDirectory


def write_run(path, dataset, model):
    """A run directory as training leaves it, with random parameters."""
    directory = RunDirectory(path)
    directory.create()
    options = TrainConfig(steps=2, batch_size=16, validation=0, driver="jit", tensorboard=False)
    stored = RunConfig(options, model, DataDescription.of(dataset), given=True)
    directory.write_config(stored)
    _, variables = split_network(models.build(model, rngs=nnx.Rngs(0)))
    checkpoints = Checkpoints(directory.checkpoints, run=stored.shaping())
    checkpoints.save(init_state(variables, make_optimizer(options, 4)), 2, None)
    checkpoints.finish()
    checkpoints.close()
    return directory
