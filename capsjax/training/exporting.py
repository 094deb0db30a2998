"""``capsjax export``: writes a trained network to a folder that runs without capsjax."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import export as jax_export

from capsjax.data import white_of
from capsjax.errors import ConfigError, how_to_install
from capsjax.files import replacing, write_text
from capsjax.options import check_types, expand_paths
from capsjax.training.classifier import Classifier, load_classifier
from capsjax.training.files import write_json
from capsjax.version import __version__

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
PixelDtype = Literal["uint8", "uint16", "float32"]

_FORMAT = "capsjax export 1"
_NETWORK, _ABOUT, _LOADER = "network.bin", "about.json", "load.py"

# Written beside the network: all the code that running it takes.
_LOAD = '''\
"""Runs the network in this folder, with the packages jax and flatbuffers alone."""
# pip install "jax!=0.10.2" flatbuffers: the XLA of jax 0.10.2 computes wrongly on CPUs.

import json
from pathlib import Path

import jax
from jax import export

folder = Path(__file__).parent
about = json.loads((folder / "about.json").read_text())
network = export.deserialize((folder / "network.bin").read_bytes())
# predict(images)["scores"] is float32 [B, classes]; images are as about["images"] says, for any B.
predict = jax.jit(network.call)
'''


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a trained network to StableHLO."""

    run_dir: Path
    """Run directory, or mnist_small for the network in the package."""

    out: Path
    """Directory to write, with network.bin, about.json and load.py. An earlier export in it is
    replaced."""

    checkpoint: str = "last"
    """Checkpoint: last, best (lowest validation error), or a step."""

    platforms: tuple[Platform, ...] = ("cpu", "cuda", "tpu")
    """Platforms to lower the network for. None of them has to be present."""

    pixels: PixelDtype = "uint8"
    """Pixel type that the exported network takes: uint8 from 0 to 255, uint16 from 0 to 65535, or
    float32 from 0 to 1."""

    image_size: int | None = None
    """Rows and columns of the images, for a network that sees only their center. By default, 32 for
    networks trained on cifar10."""

    def __post_init__(self) -> None:
        """Checks the options that can be checked without the network."""
        check_types(self)
        expand_paths(self, "out", remote=("run_dir",))
        if not self.platforms:
            raise ConfigError(f"--platforms needs at least one of {', '.join(get_args(Platform))}")


def export(config: ExportConfig) -> Path:
    """Exports a run's network and its parameters by ``jax.export``, for batches of any size.

    The exported function takes stored images and returns a dict with the network's ``scores``
    ``[B, J]`` and, for a capsule network, ``poses`` ``[B, J, D]``. It includes the preprocessing of
    test images by the run's task: scaling, or cropping the middle and standardising it.

    Args:
      config: the options.

    Returns:
      The folder, with ``network.bin``, the serialised function; ``about.json``, which describes its
      images and classes; and ``load.py``, which runs it without capsjax.

    Raises:
      ConfigError: an option is invalid, the folder holds other files, flatbuffers is not installed,
        or as in :func:`load_classifier`.
      CheckpointError: the checkpoint cannot be read.
      OSError: a file cannot be written.
    """
    _check_folder(config.out)
    if importlib.util.find_spec("flatbuffers") is None:  # jax.export needs but does not declare it
        raise ConfigError(f"needs the package flatbuffers: {how_to_install('export')}")
    classifier = load_classifier(config.run_dir, config.checkpoint, image_size=config.image_size)
    exported = export_classifier(classifier, config.platforms, jnp.dtype(config.pixels))
    network = exported.serialize()
    config.out.mkdir(parents=True, exist_ok=True)
    # Written first, as it marks the folder, so that the remains of a crash can be replaced.
    write_json(config.out / _ABOUT, _describe(config, classifier, exported))
    with replacing(config.out / _NETWORK) as file:
        file.write(network)
    write_text(config.out / _LOADER, _LOAD)
    return config.out


def export_classifier(
    classifier: Classifier, platforms: tuple[str, ...], dtype: jnp.dtype
) -> jax_export.Exported:
    """Lowers a network for these platforms, with a symbolic batch size."""

    def predict(images: jax.Array) -> dict[str, jax.Array]:
        prediction = classifier.predict(images)
        values = {"scores": prediction.scores, "poses": prediction.poses}
        return {name: value for name, value in values.items() if value is not None}

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *classifier.image_shape), dtype)
    return jax_export.export(jax.jit(predict), platforms=platforms)(images)


def _check_folder(out: Path) -> None:
    """Raises a ConfigError unless the folder is new, empty, or that of an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is not a directory")
    found = {path.name for path in out.iterdir()}
    try:
        about: Any = json.loads((out / _ABOUT).read_bytes()) if _ABOUT in found else None
    except ValueError:
        about = None
    ours = isinstance(about, dict) and about.get("format") == _FORMAT
    if found and not ours:
        raise ConfigError(f"{out} holds files that capsjax export did not write; choose another")


def _describe(
    config: ExportConfig, classifier: Classifier, exported: jax_export.Exported
) -> dict[str, Any]:
    """The contents of about.json."""
    return {
        "format": _FORMAT,
        "images": {
            "shape": ["batch", *classifier.image_shape],
            "dtype": config.pixels,
            "white": white_of(config.pixels),
        },
        "classes": classifier.class_names,
        "classes_per_image": classifier.classes_per_image,
        "is_regression": classifier.is_regression,
        "outputs": {
            name: ["batch", *value.shape[1:]]
            for name, value in jax.tree.unflatten(exported.out_tree, exported.out_avals).items()
        },
        "platforms": exported.platforms,
        "run": str(config.run_dir),
        "step": classifier.step,
        "model": dataclasses.asdict(classifier.model),
        "capsjax": __version__,
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
    }
