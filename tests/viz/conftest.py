"""A run of a few steps, a tiny network of random weights, and an explorer that serves it."""

import threading
import time

import numpy as np
import pytest
import uvicorn
from flax import nnx

from capsjax import models
from capsjax.data import Dataset, Split, load
from capsjax.training import Loaded, TrainConfig, train
from capsjax.viz.explorer import make_app
from capsjax.viz.live import Live

TINY = models.CapsNetConfig(
    conv_features=8, conv_strides=3, primary_types=3, primary_features=4, primary_kernel=3,
    class_features=5, decoder_features=(16,),
)  # fmt: skip


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    full = load("mnist_5k")
    few = Split(full.test.images[:40], full.test.labels[:40])
    dataset = Dataset("mnist_5k", few, few, full.class_names)
    return Loaded(models.build(TINY, rngs=nnx.Rngs(0)), dataset, 7)


@pytest.fixture(scope="session")
def image(loaded):
    return loaded.dataset.test.images[3].astype(np.float32) / 255


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "short"
    config = TrainConfig(
        run_dir=path, steps=2, batch_size=16, validation=0, driver="jit", log_every=1,
        tensorboard=False,
    )  # fmt: skip
    train(config)
    return path


@pytest.fixture(scope="session")
def live(loaded):
    return Live(loaded)


@pytest.fixture(scope="session")
def address(live):
    config = uvicorn.Config(make_app(live), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
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
