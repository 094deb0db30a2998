"""``capsjax draw``: figures of a run."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure

from capsjax import models
from capsjax.data import Dataset, scale_pixels, white_of
from capsjax.files import is_local, replacing
from capsjax.options import check_default, check_types, expand_paths, require_folder
from capsjax.training import ConfigError, TrainedNetwork, load_network
from capsjax.training.loading import is_packaged
from capsjax.training.run_directory import RunDirectory
from capsjax.viz import capsules, evaluation
from capsjax.viz._checks import as_indices, as_names
from capsjax.viz.anatomy import Anatomy, check_traced, dissect
from capsjax.viz.diagram import routing_diagram
from capsjax.viz.perturb import OFFSETS, reconstruct, vary_dimensions
from capsjax.viz.theme import ThemeName

_BATCH = 250  # images per prediction of the test set
_NUM_CHILDREN = 8


def child_names(model: models.CapsNetConfig) -> list[str]:
    """Names of the primary capsules in order: type, row and column of the grid, from 1."""
    rows, columns = model.grid
    return [
        f"type {kind + 1} at {row + 1},{column + 1}"
        for row in range(rows)
        for column in range(columns)
        for kind in range(model.primary_types)
    ]


def children_of(model: models.CapsNetConfig, types: Sequence[int] | None) -> list[int] | None:
    """Numbers of the primary capsules of these types, counted from 1; None for all types."""
    if types is None:
        return None
    for kind in types:
        if not 1 <= kind <= model.primary_types:
            raise ValueError(f"types must be from 1 to {model.primary_types}, got {kind}")
    return [n for n in range(model.num_primary) if n % model.primary_types + 1 in types]


def diagram_of(
    network: models.CapsNet,
    anatomy: Anatomy,
    *,
    class_names: Sequence[str],
    classes: Sequence[int] | None = None,
    types: Sequence[int] | None = None,
    iterations: Sequence[int] | None = None,
    num_children: int = 8,
    theme: ThemeName = "light",
) -> Figure:
    """Draws the routing diagram of a network's intermediate results."""
    return routing_diagram(
        anatomy.trace,
        votes=anatomy.votes,
        children=anatomy.children,
        image=anatomy.image,
        bias=anatomy.bias,
        routing=network.config.routing,
        classes=classes,
        among=children_of(network.config, types),
        num_children=num_children,
        iterations=iterations,
        class_names=class_names,
        child_names=child_names(network.config),
        theme=theme,
    )


def _load(config: "DrawConfig", dataset: Dataset | None) -> TrainedNetwork:
    loaded = load_network(
        config.runs[0], config.checkpoint, dataset=dataset, data_dir=config.data_dir
    )
    count = len(loaded.test.labels)
    if config.index >= count:
        raise ConfigError(
            f"--index must be below {count}, the number of test images, got {config.index}"
        )
    return loaded


def _names(loaded: TrainedNetwork) -> list[str]:
    names = loaded.dataset.class_names
    return as_names("class_names", names, len(names))


def _in_unit_range(images: np.ndarray) -> np.ndarray:
    return images / white_of(images.dtype)


def _anatomy(loaded: TrainedNetwork, index: int) -> tuple[models.CapsNet, Anatomy]:
    network = check_traced(loaded.network)
    return network, dissect(network, scale_pixels(jnp.asarray(loaded.test.images[index])))


def _diagram(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Routing of one image, from the children to the classes."""
    network, anatomy = _anatomy(loaded, config.index)
    among = children_of(network.config, config.types)
    most = network.config.num_primary if among is None else len(among)
    if config.num_children > max(most, _NUM_CHILDREN):
        raise ConfigError(f"--num-children must be at most {most}, got {config.num_children}")
    return diagram_of(
        network,
        anatomy,
        class_names=loaded.dataset.class_names,
        classes=config.classes,
        types=config.types,
        iterations=config.iterations,
        num_children=config.num_children,
        theme=config.theme,
    )


def _couplings(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Couplings of one image as maps over the grid."""
    network, anatomy = _anatomy(loaded, config.index)
    children_of(network.config, config.types)  # checks the types as they were given, from 1
    return capsules.coupling_maps(
        anatomy.trace,
        network.config.grid,
        classes=config.classes,
        iterations=config.iterations,
        types=None if config.types is None else [kind - 1 for kind in config.types],
        class_names=loaded.dataset.class_names,
        theme=config.theme,
    )


def _agreement(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Agreement and entropy of one image over the iterations."""
    _, anatomy = _anatomy(loaded, config.index)
    return capsules.agreement(
        anatomy.trace,
        classes=config.classes,
        class_names=loaded.dataset.class_names,
        theme=config.theme,
    )


@nnx.jit
def _predict(network: models.Network, images: jax.Array) -> models.Prediction:
    return network(scale_pixels(images))


def _capsules(loaded: TrainedNetwork, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Scores and class capsules of images of a data set."""
    prediction = _predict(loaded.network, jnp.asarray(images))
    if prediction.poses is None:
        raise ValueError(
            f"network must have class capsules, got a {type(loaded.network).__name__} without any"
        )
    return prediction.scores, prediction.poses


def _lengths(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Lengths of the class capsules of one image."""
    n, test = config.index, loaded.test
    scores, _ = _capsules(loaded, test.images[n : n + 1])
    return capsules.lengths(
        scores[0],
        class_names=loaded.dataset.class_names,
        label=int(test.labels[n]),
        theme=config.theme,
    )


def _reconstructions(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Twelve images above their reconstructions."""
    test, names = loaded.test, _names(loaded)
    images = test.images[config.index : config.index + 12]
    scores, poses = _capsules(loaded, images)
    predicted = jnp.argmax(scores, axis=-1)
    reconstructed = reconstruct(loaded.network, poses, predicted)
    titles = [
        f"{names[label]} → {names[p]}"
        for label, p in zip(test.labels[config.index :], predicted.tolist(), strict=False)
    ]
    return capsules.reconstructions(
        _in_unit_range(images), reconstructed, titles=titles, theme=config.theme
    )


def _dimensions(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Reconstructions of one image with each dimension of its capsule varied by up to 0.25."""
    n = config.index
    scores, poses = _capsules(loaded, loaded.test.images[n : n + 1])
    parent = int(jnp.argmax(scores[0]))
    if config.classes is not None:
        (parent,) = as_indices("classes", config.classes, 0, scores.shape[-1] - 1)
    images = vary_dimensions(loaded.network, poses[0], parent)
    return capsules.dimensions(images, OFFSETS, theme=config.theme)


def overlay(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Overlays images ``[H, W, C]``, one moved up and left by 4 pixels, one down and right."""
    height, width = second.shape[:2]
    upper, lower = (np.pad(image, ((4, 4), (4, 4), (0, 0))) for image in (first, second))
    return np.maximum(upper[8:, 8:], lower[:height, :width])


def _overlaps(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Pairs of overlaid images and the reconstructions from their two longest capsules."""
    test, names = loaded.test, _names(loaded)
    if len(names) < 2:
        raise ValueError("two capsules are reconstructed, but the network has one class")
    # Each image is paired with the next image of another class.
    pairs = []
    for a in range(config.index, len(test.labels)):
        b = next((b for b in range(a + 1, len(test.labels)) if test.labels[a] != test.labels[b]), a)
        pairs.append((a, b))
        if len(pairs) == 8:
            break
    images = np.stack([overlay(test.images[a], test.images[b]) for a, b in pairs])
    scores, poses = _capsules(loaded, images)
    two = jax.lax.top_k(scores, 2)[1]
    parts = jnp.stack([reconstruct(loaded.network, poses, two[:, n]) for n in (0, 1)], axis=1)
    titles = [
        f"{names[test.labels[a]]}+{names[test.labels[b]]} → {names[p]}+{names[q]}"
        for (a, b), (p, q) in zip(pairs, two.tolist(), strict=True)
    ]
    return capsules.overlaps(_in_unit_range(images), parts, titles=titles, theme=config.theme)


def _confusion(config: "DrawConfig", loaded: TrainedNetwork) -> Figure:
    """Confusion matrix of the test set, with the worst errors."""
    test = loaded.test
    batches = np.split(test.images, range(_BATCH, len(test.images), _BATCH))
    scores = np.concatenate([_predict(loaded.network, jnp.asarray(x)).scores for x in batches])
    return evaluation.confusion(
        test.labels,
        scores,
        images=_in_unit_range(test.images),
        class_names=loaded.dataset.class_names,
        theme=config.theme,
    )


def _curves(config: "DrawConfig") -> Figure:
    """Loss and error of one or more runs over their steps."""
    if len({run.resolve() if is_local(run) else run for run in config.runs}) < len(config.runs):
        raise ValueError("runs must be different directories")
    runs = {}
    for run in config.runs:
        if is_packaged(run):
            raise ConfigError(f"{run} is a network in the package, without records of its training")
        RunDirectory(run).read_config()  # raises if the directory holds no run
        # Runs in different folders may have the same name.
        unique = len({r.name for r in config.runs}) == len(config.runs)
        runs[run.name if unique else str(run)] = RunDirectory(run).read_metrics()
    return evaluation.training_curves(runs, theme=config.theme)


class _Kind(NamedTuple):
    """A figure of a trained network.

    Attributes:
      draw: makes the figure.
      options: the options that choose what it shows.
    """

    draw: Callable[["DrawConfig", TrainedNetwork], Figure]
    options: tuple[str, ...]


_FIGURES = {
    "diagram": _Kind(_diagram, ("index", "classes", "types", "iterations", "num_children")),
    "couplings": _Kind(_couplings, ("index", "classes", "types", "iterations")),
    "agreement": _Kind(_agreement, ("index", "classes")),
    "lengths": _Kind(_lengths, ("index",)),
    "reconstructions": _Kind(_reconstructions, ("index",)),
    "dimensions": _Kind(_dimensions, ("index", "classes")),
    "overlaps": _Kind(_overlaps, ("index",)),
    "confusion": _Kind(_confusion, ()),
}
_HELP = "\n".join(
    [f"{name}: {kind.draw.__doc__}" for name, kind in _FIGURES.items()]
    + [f"curves: {_curves.__doc__}"]
)
if TYPE_CHECKING:
    FigureName = str
else:
    FigureName = Literal[(*_FIGURES, "curves")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Draw what a trained network computes: NAME RUN, or curves RUN RUN ... to compare runs."""

    name: Annotated[FigureName, tyro.conf.arg(help=_HELP)]

    runs: tuple[Path, ...]
    """Run directory, or mnist_small for the network in the package. curves takes several."""

    out: Path | None = None
    """File to write: .svg, .png or .pdf. By default, RUN/NAME.svg and RUN/NAME.png."""

    theme: ThemeName = "light"
    """Colour theme: light or dark."""

    index: int = 0
    """Index of the test image."""

    classes: tuple[int, ...] | None = None
    """Classes to show. By default, those with the longest capsules."""

    types: tuple[int, ...] | None = None
    """Types of child capsules to show, counted from 1. By default, all."""

    iterations: tuple[int, ...] | None = None
    """Routing iterations to show, counted from 1. By default, all."""

    num_children: int = _NUM_CHILDREN
    """Number of children that the diagram draws individually; it summarises the others."""

    checkpoint: str = "last"
    """Checkpoint: last, best (by validation error), or a step."""

    data_dir: Path | None = None
    """Directory of the run's data set, if it has moved since training."""

    def __post_init__(self) -> None:
        """Checks the options that can be checked without the run."""
        check_types(self)
        expand_paths(self, "out", "data_dir", remote=("runs",))
        require_folder(self, "out")
        used = ["name", "runs", "out", "theme"]
        if self.name != "curves":
            used += ["checkpoint", "data_dir", *_FIGURES[self.name].options]
        unused = {field.name for field in dataclasses.fields(self)}.difference(used)
        check_default(self, f"on {self.name}", *unused)
        if self.name == "dimensions" and self.classes is not None and len(self.classes) != 1:
            raise ConfigError(f"--classes of dimensions must be one class, got {self.classes}")
        if not self.runs:
            raise ConfigError(f"{self.name} needs a run directory, got none")
        if len(self.runs) > 1 and self.name != "curves":
            raise ConfigError(f"{self.name} takes one run, got {len(self.runs)}")
        if self.index < 0:
            raise ConfigError(f"--index must be at least 0, got {self.index}")
        if self.out is not None and self.out.suffix not in (".svg", ".png", ".pdf"):
            raise ConfigError(f"--out must end in .svg, .png or .pdf, got {self.out}")


def draw(config: DrawConfig, *, dataset: Dataset | None = None) -> list[Path]:
    """Draws a figure of a run and returns the files that it wrote.

    Args:
      config: the options.
      dataset: images to draw instead of the run's.

    Raises:
      ConfigError: the figure cannot be drawn for this run or with these options.
      capsjax.data.DataError: the data set cannot be loaded.
      CheckpointError: the checkpoint cannot be read.
    """
    try:
        figure = make_figure(config, dataset=dataset)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{config.name} of {config.runs[0]}: {error}") from None
    # A network in the package has no run directory.
    folder = config.runs[0] if config.runs[0].is_dir() else Path()
    paths = [config.out] if config.out else [folder / f"{config.name}{s}" for s in (".svg", ".png")]
    for path in paths:
        save(figure, path)
    return paths


def save(figure: Figure, target: Path | io.StringIO, *, dpi: int = 150) -> None:
    """Writes a figure to a file, or as SVG to a buffer; equal figures give equal SVG."""
    kind = "svg" if isinstance(target, io.StringIO) else target.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    opened = (
        contextlib.nullcontext(target) if isinstance(target, io.StringIO) else replacing(target)
    )
    # Matplotlib derives the ids of SVG elements from the salt, which is random by default.
    with mpl.rc_context({"svg.hashsalt": "capsjax"}), opened as file:
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)


def make_figure(config: DrawConfig, *, dataset: Dataset | None = None) -> Figure:
    """Draws the figure that the configuration names."""
    if config.name == "curves":
        return _curves(config)
    return _FIGURES[config.name].draw(config, _load(config, dataset))
