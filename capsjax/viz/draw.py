"""Figures from a run's directory: ``capsjax draw``."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TextIO

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from capsjax import models
from capsjax.data import scale_pixels
from capsjax.training import ConfigError, Loaded, load_network
from capsjax.training.run_directory import RunDirectory
from capsjax.viz import figures
from capsjax.viz.anatomy import Anatomy, check_traced, dissect
from capsjax.viz.diagram import routing_diagram
from capsjax.viz.perturb import OFFSETS, reconstruct, vary_dimensions
from capsjax.viz.theme import ThemeName

FigureName = Literal[
    "diagram",
    "couplings",
    "agreement",
    "lengths",
    "reconstructions",
    "dimensions",
    "overlaps",
    "confusion",
    "curves",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Draw what a trained network computes: NAME RUN, or curves RUN RUN ... to compare runs."""

    name: FigureName
    """diagram (routing, from children to class), couplings (maps over the grid), agreement (and
    entropy over the iterations), lengths, reconstructions, dimensions (each varied from -0.25 to
    0.25), overlaps (two digits on each other, reconstructed apart), confusion (with the worst test
    errors), curves (of training)."""

    runs: tuple[Path, ...]
    """Directories of runs, several for curves only; or mnist_small, the network in the package."""

    out: Path | None = None
    """File to write, its ending the format (.svg, .png, .pdf); RUN/NAME.svg and RUN/NAME.png if not
    given."""

    theme: ThemeName = "light"
    """Colours: light or dark."""

    index: int = 0
    """Number of the test image."""

    classes: tuple[int, ...] | None = None
    """Classes to show; those with the longest capsules if not given."""

    types: tuple[int, ...] | None = None
    """Types of child capsules to show, counted from 1; all if not given."""

    iterations: tuple[int, ...] | None = None
    """Routing iterations to show, counted from 1; all if not given."""

    num_children: int = 8
    """Children that the diagram draws one by one; the others are summed up."""

    checkpoint: str = "last"
    """Which checkpoint: last, best (by validation error), or a step."""

    def __post_init__(self) -> None:
        """Checks every option that can be checked without the run."""
        if not self.runs:
            raise ConfigError(f"{self.name} needs the directory of a run")
        if len(self.runs) > 1 and self.name != "curves":
            raise ConfigError(f"{self.name} takes one run, got {len(self.runs)}")
        if self.index < 0:
            raise ConfigError(f"--index must be at least 0, got {self.index}")
        if self.out is not None and self.out.suffix not in (".svg", ".png", ".pdf"):
            raise ConfigError(f"--out must end in .svg, .png or .pdf, got {self.out}")


def draw(config: DrawConfig) -> list[Path]:
    """Draws a figure of a run and returns the files that it wrote.

    Raises:
      ConfigError: the run or an option does not go with the figure.
      capsjax.data.DataError: the data set cannot be had.
      CheckpointError: the checkpoint cannot be read.
    """
    try:
        figure = make_figure(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{config.name} of {config.runs[0]}: {error}") from None
    # A network that comes with the package has no directory of its own.
    where = config.runs[0] if config.runs[0].is_dir() else Path()
    paths = [config.out] if config.out else [where / f"{config.name}{s}" for s in (".svg", ".png")]
    for path in paths:
        save(figure, path)
    return paths


def save(figure: Figure, target: Path | TextIO, *, dpi: int = 150) -> None:
    """Writes a figure to a file, or as SVG to a buffer; the same figure gives the same SVG."""
    kind = target.suffix.removeprefix(".") if isinstance(target, Path) else "svg"
    metadata = {"Date": None} if kind == "svg" else None
    # Names of shapes follow the salt at the time of writing.
    with mpl.rc_context({"svg.hashsalt": "capsjax"}):
        figure.savefig(target, format=kind, dpi=dpi, metadata=metadata)


def make_figure(config: DrawConfig) -> Figure:
    """Draws the figure that :class:`DrawConfig` names."""
    if config.name == "curves":
        runs = {}
        for run in config.runs:
            RunDirectory(run).read_config()  # says what is wrong with a directory that is no run
            # Runs in several places may be called the same.
            name = run.name if len({r.name for r in config.runs}) == len(config.runs) else str(run)
            runs[name] = RunDirectory(run).read_metrics()
        return figures.training_curves(runs, theme=config.theme)
    loaded = load_network(config.runs[0], config.checkpoint)
    count = len(loaded.test.labels)
    if config.index >= count:
        raise ConfigError(
            f"--index must be below {count}, the number of test images, got {config.index}"
        )
    makers: dict[str, Callable[[Loaded, DrawConfig], Figure]] = {
        "diagram": _diagram,
        "couplings": _couplings,
        "agreement": _agreement,
        "lengths": _lengths,
        "reconstructions": _reconstructions,
        "dimensions": _dimensions,
        "overlaps": _overlaps,
        "confusion": _confusion,
    }
    return makers[config.name](loaded, config)


def child_names(model: models.CapsNetConfig) -> list[str]:
    """Names of primary capsules, in their order: the type, then row and column of the grid."""
    rows, columns = model.grid
    return [
        f"type {kind + 1} at {row + 1},{column + 1}"
        for row in range(rows)
        for column in range(columns)
        for kind in range(model.primary_types)
    ]


def children_of(model: models.CapsNetConfig, types: Sequence[int] | None) -> list[int] | None:
    """Numbers of the primary capsules of these types, which count from 1."""
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
    """The routing diagram of what a network computed."""
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


def _anatomy(loaded: Loaded, index: int) -> tuple[models.CapsNet, Anatomy]:
    network = check_traced(loaded.network)
    return network, dissect(network, scale_pixels(jnp.asarray(loaded.test.images[index])))


def _diagram(loaded: Loaded, config: DrawConfig) -> Figure:
    network, anatomy = _anatomy(loaded, config.index)
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


def _couplings(loaded: Loaded, config: DrawConfig) -> Figure:
    network, anatomy = _anatomy(loaded, config.index)
    children_of(network.config, config.types)  # names a type that is not there
    return figures.coupling_maps(
        anatomy.trace,
        network.config.grid,
        classes=config.classes,
        iterations=config.iterations,
        types=None if config.types is None else [kind - 1 for kind in config.types],
        class_names=loaded.dataset.class_names,
        theme=config.theme,
    )


def _agreement(loaded: Loaded, config: DrawConfig) -> Figure:
    _, anatomy = _anatomy(loaded, config.index)
    return figures.agreement(
        anatomy.trace,
        classes=config.classes,
        class_names=loaded.dataset.class_names,
        theme=config.theme,
    )


def predict_all(loaded: Loaded, images: np.ndarray, batch: int = 250) -> list[models.Prediction]:
    """Predictions for uint8 images, batch by batch."""
    predict = nnx.jit(lambda network, x: network(scale_pixels(x)))
    return [
        predict(loaded.network, jnp.asarray(images[n : n + batch]))
        for n in range(0, len(images), batch)
    ]


def _capsules(loaded: Loaded, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Scores and class capsules."""
    (prediction,) = predict_all(loaded, images, len(images))
    if prediction.poses is None:
        raise ValueError(
            f"network must have class capsules, {type(loaded.network).__name__} has none"
        )
    return prediction.scores, prediction.poses


def _lengths(loaded: Loaded, config: DrawConfig) -> Figure:
    n, test = config.index, loaded.test
    scores, _ = _capsules(loaded, test.images[n : n + 1])
    return figures.lengths(
        scores[0],
        class_names=loaded.dataset.class_names,
        label=int(test.labels[n]),
        theme=config.theme,
    )


def _reconstructions(loaded: Loaded, config: DrawConfig) -> Figure:
    test, names = loaded.test, loaded.dataset.class_names
    images = test.images[config.index : config.index + 12]
    scores, poses = _capsules(loaded, images)
    said = jnp.argmax(scores, axis=-1)
    made = reconstruct(loaded.network, poses, said)
    titles = [
        f"{names[label]} → {names[p]}"
        for label, p in zip(test.labels[config.index :], said.tolist(), strict=False)
    ]
    return figures.reconstructions(images / 255, made, titles=titles, theme=config.theme)


def _dimensions(loaded: Loaded, config: DrawConfig) -> Figure:
    n = config.index
    scores, poses = _capsules(loaded, loaded.test.images[n : n + 1])
    parent = config.classes[0] if config.classes else int(jnp.argmax(scores[0]))
    images = vary_dimensions(loaded.network, poses[0], parent)
    return figures.dimensions(images, OFFSETS, theme=config.theme)


def overlay(first: np.ndarray, second: np.ndarray, shift: int = 4) -> np.ndarray:
    """Two uint8 images ``[H, W, C]`` on each other, moved apart by twice `shift` pixels."""

    def moved(image: np.ndarray, by: int) -> np.ndarray:
        padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)))
        height, width = image.shape[:2]
        return padded[shift - by : shift - by + height, shift - by : shift - by + width]

    return np.maximum(moved(first, -shift), moved(second, shift))


def _overlaps(loaded: Loaded, config: DrawConfig) -> Figure:
    test, names = loaded.test, loaded.dataset.class_names
    # Each image with the next one of another class.
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
    return figures.overlaps(images / 255, parts, titles=titles, theme=config.theme)


def _confusion(loaded: Loaded, config: DrawConfig) -> Figure:
    test = loaded.test
    scores = np.concatenate([p.scores for p in predict_all(loaded, test.images)])
    return figures.confusion(
        test.labels,
        scores,
        images=test.images / 255,
        class_names=loaded.dataset.class_names,
        theme=config.theme,
    )
