"""A tiny network with random weights, its run directory, and an explorer that serves it."""

import threading
import time

import numpy as np
import pytest
import uvicorn
from flax import nnx

from capsjax import models
from capsjax.data import Dataset, Split, load
from capsjax.training import Checkpoints, TrainConfig, TrainedNetwork, init_state, split_network
from capsjax.training.data_description import DataDescription
from capsjax.training.optimizers import make_optimizer
from capsjax.training.run_directory import RunConfig, RunDirectory
from capsjax.viz.explorer import Server, make_app
from capsjax.viz.live import Live

TINY = models.CapsNetConfig(
    conv_features=8,
    conv_strides=3,
    primary_types=3,
    primary_features=4,
    primary_kernel=3,
    class_features=5,
    decoder_features=(16,),
)


@pytest.fixture(scope="session")
def loaded() -> TrainedNetwork:
    full = load("mnist_5k")
    few = Split(full.test.images[:40], full.test.labels[:40])
    dataset = Dataset("mnist_5k", few, few, full.class_names)
    network = models.build(TINY, rngs=nnx.Rngs(0))
    # With long votes the couplings change from iteration to iteration, as after training.
    network.classes.kernel[...] *= 8
    return TrainedNetwork(network, dataset, few, 7)


@pytest.fixture(scope="session")
def image(loaded):
    return loaded.test.images[3].astype(np.float32) / 255


@pytest.fixture(scope="session")
def run(tmp_path_factory, loaded):
    """A run directory of the tiny network, as training leaves it."""
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "short")
    options = TrainConfig(validation=0)
    directory.create()
    directory.write_config(RunConfig(options, TINY, DataDescription.of(load("mnist_5k"))))
    _, variables = split_network(loaded.network)
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(init_state(variables, make_optimizer(options, 4)), 2, None)
    checkpoints.finish()
    checkpoints.close()
    for step in (1, 2):
        directory.append_metrics({"split": "train", "step": step, "loss": 1 / step, "error": 0.5})
    return directory.path


@pytest.fixture(scope="session")
def live(loaded):
    return Live(loaded)


@pytest.fixture(scope="session")
def address(live):
    config = uvicorn.Config(make_app(live), port=0, log_level="warning", lifespan="off")
    server = Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < limit
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
