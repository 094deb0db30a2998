"""An exported network runs without capsjax, for any batch, and as on every platform."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import forking
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from capsjax import models, routing
from capsjax.data import Cropped, Task, load
from capsjax.models import CapsNetConfig
from capsjax.training import (
    Classifier,
    ConfigError,
    ExportConfig,
    export,
    load_classifier,
    split_network,
)
from capsjax.training.exporting import export_classifier
from capsjax.training.step import split_abstract

PLATFORMS = ("cpu", "cuda", "tpu")
# Runs load.py on the arrays of a file where nothing of capsjax can be imported.
WITHOUT_CAPSJAX = """
import runpy, sys
import numpy as np
sys.modules["capsjax"] = sys.modules["flax"] = None
loaded = runpy.run_path(sys.argv[1])
images = np.load(sys.argv[2])
outputs = {n: loaded["predict"](images[:n]) for n in (1, 7)}
np.savez(sys.argv[3], **{f"{name}{n}": x for n in outputs for name, x in outputs[n].items()})
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(
        ExportConfig(run_dir="mnist_small", out=tmp_path_factory.mktemp("exported") / "digits")
    )


def test_the_example_serves_it(exported):
    digits = load("mnist_5k").test
    path = Path(__file__).parents[2] / "examples" / "photographs" / "serve.py"
    body = io.BytesIO()
    Image.fromarray(digits.images[0, ..., 0]).resize((56, 70)).save(body, "webp", lossless=True)
    with subprocess.Popen(
        [sys.executable, str(path), str(exported), "0"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            request = urllib.request.Request(server.stdout.readline().strip(), body.getvalue())
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.read().split()[0] == b"7"
        finally:
            server.kill()


def test_a_process_without_capsjax_computes_the_same(exported, tmp_path):
    images = load("mnist_5k").test.images[:7]
    np.save(tmp_path / "images.npy", images)
    files = [exported / "load.py", tmp_path / "images.npy", tmp_path / "outputs.npz"]
    command = [sys.executable, "-I", "-c", WITHOUT_CAPSJAX, *map(str, files)]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = jax.jit(load_classifier("mnist_small").predict)(images)
    with np.load(files[2]) as outputs:
        for n in (1, 7):
            for name in ("scores", "poses"):
                values = getattr(expected, name)[:n]
                np.testing.assert_allclose(outputs[f"{name}{n}"], values, atol=1e-6)
    assert len((exported / "load.py").read_text().splitlines()) <= 15


# Compiles an exported network for a TPU that is not there.
FOR_A_TPU = """
import sys
import jax, jax.numpy as jnp
from jax import export
from jax.sharding import SingleDeviceSharding
from capsjax.bench import parse_target, take_libtpu
network = export.deserialize(open(sys.argv[1], "rb").read())
take_libtpu()
sharding = SingleDeviceSharding(parse_target("v5e-1").devices()[0])
images = jax.ShapeDtypeStruct((7, 28, 28, 1), jnp.uint8, sharding=sharding)
print(jax.jit(network.call).lower(images).compile().out_info["scores"].shape)
"""


# In the gate, networks of every kind are lowered for TPUs (below).
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_s_compiler_takes_it(exported, tmp_path):
    done = forking.run("-c", FOR_A_TPU, exported / "network.bin", folder=tmp_path)
    assert done.stdout.splitlines()[0] == "(7, 10)", done.stderr


def test_the_folder_says_what_the_network_takes_and_gives(exported):
    network = jax.export.deserialize((exported / "network.bin").read_bytes())
    assert network.platforms == PLATFORMS
    about = json.loads((exported / "about.json").read_text())
    assert about["images"] == {"shape": ["batch", 28, 28, 1], "dtype": "uint8", "white": 255}
    assert about["outputs"] == {"poses": ["batch", 10, 16], "scores": ["batch", 10]}
    assert (about["classes"], about["platforms"]) == (list("0123456789"), list(PLATFORMS))
    assert (about["run"], about["step"], about["jax"]) == ("mnist_small", None, jax.__version__)


def classify(config, apply, variables, task=None, shape=None):
    names, shape = tuple(map(str, range(config.num_classes))), shape or config.image_shape
    return Classifier(config, names, shape, 1, None, apply, variables, task or Task(), False)


TINY = {
    "conv_features": 8,
    "conv_strides": 3,
    "primary_types": 2,
    "primary_features": 4,
    "primary_kernel": 3,
    "class_features": 4,
    "decoder_features": (),
}
MATRIX = {
    "conv_features": 8,
    "primary_types": 2,
    "capsule_types": (2,),
    "capsule_strides": (2,),
    "num_iterations": 1,
}
# tests/routing lowers the others for every platform, without a network.
IN_GATE = ("dynamic", "em", "self")
NETWORKS = [
    *(
        pytest.param(
            "small", {**TINY, "routing": name}, marks=[pytest.mark.slow] * (name not in IN_GATE)
        )
        for name in routing.algorithms()
    ),
    *(("small", {**TINY, "implementation": name}) for name in ("reference", "blocked", "lanes")),
    ("matrix_capsnet_small", MATRIX),
    ("efficient_capsnet", {}),
    ("baseline_small", {}),
]


@pytest.mark.parametrize(("preset", "options"), NETWORKS)
def test_every_kind_of_network_lowers_for_every_platform(preset, options):
    config = models.configure(preset, **options)
    apply, shapes = split_abstract(config)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    network = export_classifier(classify(config, apply, zeros), PLATFORMS, jnp.dtype("float32"))
    assert network.platforms == PLATFORMS
    assert {str(x.shape[0]) for x in network.out_avals} == {"batch"}
    # Nothing in it has to be registered where it runs: this one is for sizes, and jax's own.
    assert set(re.findall(r"custom_call @(\w+)", network.mlir_module())) <= {"shape_assertion"}


def test_what_the_task_does_to_images_is_exported_too():
    config = CapsNetConfig(**TINY, image_shape=(24, 24, 3))
    network = split_network(models.build(config, rngs=nnx.Rngs(0)))
    classifier = classify(config, *network, Cropped(24), (32, 32, 3))
    network = export_classifier(classifier, ("cpu",), jnp.dtype("uint16"))
    images = jax.random.randint(jax.random.key(0), (2, 32, 32, 3), 0, 65535).astype(jnp.uint16)
    task = Cropped(24)
    pixels, _ = task.render(jax.random.split(jax.random.key(1), 2), images, train=False)
    expected = jax.jit(classifier._apply)(classifier._variables, pixels)[0].scores
    np.testing.assert_allclose(jax.jit(network.call)(images)["scores"], expected, atol=1e-6)


def test_files_of_others_are_left_alone_and_an_earlier_export_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    options = ExportConfig(run_dir="mnist_small", out=out, platforms=("cpu",), pixels="float32")
    for text in ("{}", "no json"):
        (out / "about.json").write_text(text)
        with pytest.raises(ConfigError, match="holds files that capsjax export did not"):
            export(options)
        assert [path.read_text() for path in out.iterdir()] == [text]
    with pytest.raises(ConfigError, match=r"about\.json is not a directory"):
        export(ExportConfig(run_dir="mnist_small", out=out / "about.json"))
    (out / "about.json").unlink()
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ConfigError, match=r"needs the package flatbuffers: pip install .*export"):
        export(options)
    assert list(out.iterdir()) == []
    monkeypatch.undo()
    for _ in range(2):
        assert export(options) == out
    assert json.loads((out / "about.json").read_text())["images"]["white"] == 1
