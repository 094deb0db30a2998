"""Options of a training run, from which the command line is built."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import Doc

from capsjax import data, models, routing
from capsjax.data.transforms import Fill, Flip
from capsjax.errors import ConfigError
from capsjax.files import is_local
from capsjax.options import (
    check_default,
    check_types,
    expand_paths,
    flag,
    require,
    require_at_least,
)
from capsjax.training.drivers import DriverName
from capsjax.training.inputs import InputName
from capsjax.training.objectives import LossName

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[models.presets()]
ChannelsNumber = Literal[1, 3, 4]
ScheduleName = Literal["exponential", "cosine", "constant"]
ClassWeights = Literal["balanced"] | tuple[float, ...] | None
_ROUTING = (
    f"Routing algorithm of the capsule layers: {', '.join(routing.algorithms())}, or one that you"
    " have registered. By default, that of the network."
)
RoutingName = Annotated[str | None, Doc(_ROUTING)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a capsule network on a data set of images.

    The run directory holds the configuration, metrics as JSON lines and for TensorBoard,
    checkpoints, the test result, and a picture of test images above their reconstructions.
    """

    preset: PresetName = "small"
    """Network to train; --model is the same option. small trains in minutes on two CPU cores. paper
    follows the printed formulas of dynamic routing, and official the authors' code, with the
    variants cifar10, smallnorb and svhn for these data sets. baseline is the paper's convolutional
    network; baseline_small is as large as small, and baseline_pairs is for overlapping digits.
    matrix_capsnet uses EM routing; matrix_capsnet_small is the smaller network of that paper.
    efficient_capsnet uses self-attention routing; large_images is its variant for images of 64 to
    224 pixels."""

    routing: RoutingName = None

    reconstruction: bool = True
    """Train with a decoder that reconstructs the images, if the network has one."""

    override: tuple[str, ...] | None = None
    """Changes to the network's configuration, as FIELD=VALUE, such as conv_features=32
    decoder_features=128,256."""

    num_iterations: int | None = None
    """Number of routing iterations, for iterative algorithms. By default, that of the network."""

    dataset: str = "mnist_5k"
    """Data set. mnist_5k is part of the package. mnist, fashion_mnist, kmnist, cifar10,
    svhn_cropped and smallnorb come from TFDS, and tfds:NAME[/CONFIG][:VERSION] is any other set
    that TFDS has prepared. affnist is the published set. multi_mnist (two overlapping digits),
    expanded_mnist (a digit at a random position on 40x40) and affine_mnist (also rotated, sheared
    and scaled) are generated from mnist on the device. image_folder reads images (png, jpg, tif,
    webp and others) from DATA_DIR/train/CLASS and DATA_DIR/test/CLASS, or from DATA_DIR/CLASS,
    where it splits off test images. npz reads the arrays train_images, train_labels, test_images,
    test_labels and class_names from the file DATA_DIR; --dataset FILE.npz is short for that."""

    data_dir: Path | None = None
    """Directory of prepared data sets or of images, or an .npz file. By default, TFDS's own
    directory."""

    image_size: int | None = None
    """Scale the images of image_folder and tfds: to this many rows and columns, cropping the longer
    side. By default, images keep their size, which must then be the same for all."""

    channels: ChannelsNumber | None = None
    """Channels of the images of image_folder and tfds: 1 (grayscale), 3 (RGB) or 4 (with
    transparency; otherwise transparent images are laid on white). By default, 1 if the images are
    grayscale, else 3."""

    run_dir: Path | None = None
    """Run directory, or gs://BUCKET/FOLDER. By default, runs/DATASET-PRESET-TIME."""

    init_from: Path | None = None
    """Start from the parameters of this run, or of a network in the package (mnist_small).
    Parameters without a counterpart of the same name and shape are initialised."""

    init_checkpoint: str = "last"
    """Checkpoint of INIT_FROM: last, best (lowest validation error), or a step."""

    freeze: tuple[str, ...] | None = None
    """Parts of the network to leave untrained, such as conv primary: the first words of their
    parameters' names."""

    resume: bool = False
    """Resume the run in RUN_DIR, also given as --resume RUN_DIR, from its last checkpoint, with its
    options unless they are given again. Options that shape the parameters must stay the same."""

    auto_resume: bool = False
    """Resume the run in RUN_DIR if it exists, and start it otherwise, so that one command serves
    for the first start and every restart. Give all options each time. If the last checkpoint is
    damaged, the one before it is used."""

    epochs: int | None = None
    """Number of passes over the training images, each in a new order; an incomplete last batch is
    left out. By default, 20 unless steps are given."""

    steps: int | None = None
    """Number of training steps, instead of epochs."""

    until_error: float | None = None
    """Stop early at the first checkpoint with at most this validation error, a fraction such as
    0.01."""

    patience: int | None = None
    """Stop early after this many validations without a lower validation error."""

    batch_size: int = 128
    """Examples per step, over all devices together."""

    loss: LossName | None = None
    """Loss: paper (margin + 0.0005 x squared error), official (the authors' scale: the
    reconstruction counts 20 times more), spread (of matrix capsules), cross_entropy and
    binary_cross_entropy (baseline only), or squared_error (for predicting numbers). By default,
    that of the preset."""

    class_weights: ClassWeights = None
    """Weight of each class in the training loss: balanced (inverse to the number of examples of the
    class, 1 on average), or a number for each class. By default, all are equal."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation. Parameters, norms and routing sums are float32 in either case."""

    learning_rate: float = 1e-3
    """Adam's learning rate at the first step, or after the warm-up."""

    schedule: ScheduleName = "exponential"
    """How the learning rate falls: exponential (by DECAY_RATE every DECAY_STEPS steps), cosine (to
    MIN_LEARNING_RATE at the last step), or constant."""

    warmup_steps: int = 0
    """Steps over which the learning rate first rises linearly. The schedule begins after them."""

    decay_rate: float = 0.96
    """Factor by which the learning rate falls every DECAY_STEPS steps, continuously."""

    decay_steps: int = 2000
    """Steps over which the learning rate falls by DECAY_RATE."""

    min_learning_rate: float = 1e-6
    """Lower bound of the learning rate."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, for kernels only; 0 for none."""

    clip_norm: float | None = None
    """Scale gradients down to at most this global norm. By default, they are not clipped."""

    max_shift: int | None = None
    """Shift training images by up to this many pixels along both axes. By default, 2, or 4 for
    overlapping digits, whose test images are shifted too."""

    fill: Fill | None = None
    """What fills the pixels uncovered by shifts: edge (repeats the border of the image), or a gray
    value from 0 (black) to 1 (white). By default, 0."""

    flip: Flip | None = None
    """Mirror training images at random: horizontal (left and right), vertical, or both. By default,
    they are not mirrored."""

    test_size: int | None = None
    """Number of test images to generate for multi_mnist, expanded_mnist and affine_mnist. By
    default, as many as the data set has."""

    validation: int | None = None
    """Number of training images held out to choose the best checkpoint, the same fraction of each
    class; 0 for none. By default, a tenth. The test set is never used for a choice."""

    seed: int = 0
    """Seed of initialisation, order and shifts. A run is determined by its options."""

    driver: DriverName = "pmap"
    """How the step runs: pmap (mapped over the devices), shard (jit over a sharded mesh), or jit
    (one device)."""

    devices: int | None = None
    """Use only this many devices, the first ones. By default, all, or one for jit."""

    input: InputName | None = None
    """Where the images are: resident (all on every device) or stream (sent there in chunks; those
    of image_folder and tfds: are read and decoded from disk). By default, stream if all decoded
    images take more than half of a device's memory or a quarter of the machine's."""

    workers: int | None = None
    """Number of processes that read and decode streamed training images from disk; 0 uses threads
    of this process. By default, one less than the number of processors, at most 32."""

    steps_per_dispatch: int = 256
    """Largest number of steps per dispatch to the devices. Slow devices get fewer, so that progress
    stays visible."""

    log_every: int = 50
    """Steps between two records of the training metrics."""

    checkpoint_every: int | None = None
    """Steps between two checkpoints, each with a validation. By default, one epoch."""

    keep: int = 3
    """Number of latest checkpoints to keep, besides the one with the lowest validation error."""

    tensorboard: bool = True
    """Also write metrics for TensorBoard."""

    def __post_init__(self) -> None:
        """Checks the options that can be checked without data and devices."""
        check_types(self)
        expand_paths(self, "data_dir", remote=("run_dir", "init_from"))
        start = self.init_from
        if start is not None and is_local(start) and start.exists():  # not a packaged network
            object.__setattr__(self, "init_from", start.absolute())
        check_dataset_name(self.dataset)
        if self.routing is not None and self.routing not in routing.algorithms():
            names = ", ".join(routing.algorithms())
            raise ConfigError(
                f"--routing must be one of {names}, or one that your program has registered,"
                f" got {self.routing!r}"
            )
        require_at_least(self, 1, "epochs", "steps", "batch_size", "num_iterations", "test_size")
        require_at_least(self, 1, "decay_steps", "devices", "steps_per_dispatch", "log_every")
        require_at_least(self, 1, "checkpoint_every", "keep")
        require_at_least(self, 1, "image_size", "patience")
        require_at_least(self, 0, "validation", "max_shift", "warmup_steps", "workers")
        few = self.num_iterations is None or self.num_iterations <= 1000
        require(self, "num_iterations", few, "at most 1000")
        for name in ("steps", "batch_size", "decay_steps", "steps_per_dispatch", "warmup_steps"):
            value = getattr(self, name)
            require(self, name, value is None or value < 2**31, "below 2147483648")
        gray = isinstance(self.fill, int | float) and 0 <= self.fill <= 1
        require(self, "fill", self.fill in (None, "edge") or gray, "edge or from 0 to 1")
        require(self, "seed", 0 <= self.seed < 2**32, "between 0 and 4294967295")
        for name in ("learning_rate", "min_learning_rate", "clip_norm"):
            value = getattr(self, name)
            positive = value is None or (math.isfinite(value) and value > 0)
            require(self, name, positive, "positive")
        require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        for name in ("class_weights", "freeze", "override"):
            if getattr(self, name) == ():
                raise ConfigError(f"{flag(name)} needs at least one value")
        if isinstance(self.class_weights, tuple):
            positive = all(0 < weight < math.inf for weight in self.class_weights)
            require(self, "class_weights", positive, "positive")
        for text in self.override or ():
            if not re.fullmatch(r"\w+=.+", text):
                raise ConfigError(f"--override must be FIELD=VALUE, got {text!r}")
        least, first = self.min_learning_rate, self.learning_rate
        require(self, "min_learning_rate", least <= first, f"at most the learning rate, {first}")
        require(self, "decay_rate", 0 < self.decay_rate <= 1, "above 0 and at most 1")
        if self.until_error is not None:
            require(self, "until_error", 0 <= self.until_error < 1, "at least 0 and below 1")
        for option in self.stopping:
            if self.validation == 0:
                raise ConfigError(f"{option} needs validation images, got --validation 0")
        if self.resume and self.run_dir is None:
            raise ConfigError("--resume needs --run-dir, the directory of the run to resume")
        if self.auto_resume and self.run_dir is None:
            raise ConfigError("--auto-resume needs --run-dir, the directory of the run")
        if self.auto_resume and self.resume:
            raise ConfigError("--auto-resume has no effect with --resume")

    @property
    def stopping(self) -> tuple[str, ...]:
        """Names of the given options that may end the run before its last step."""
        ending = {"--until-error": self.until_error, "--patience": self.patience}
        return tuple(option for option, value in ending.items() if value is not None)

    def to_json(self) -> dict[str, Any]:
        """Returns the options as JSON values, for the run directory."""
        values = dataclasses.asdict(self)
        # Absolute: the run may be read from another directory.
        values["data_dir"] = None if self.data_dir is None else str(self.data_dir.absolute())
        values["init_from"] = None if self.init_from is None else str(self.init_from)
        for name in _OF_THE_CALL:
            del values[name]
        return values

    @classmethod
    def shaping(cls) -> tuple[str, ...]:
        """Names of the options that shape the parameters and must not change within a run."""
        names = (field.name for field in dataclasses.fields(cls))
        return tuple(name for name in names if name not in _MAY_CHANGE)

    def check_effect(self) -> None:
        """Raises a ConfigError if an option of a new run has no effect."""
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"--epochs has no effect with --steps {self.steps}")
        if self.init_from is None:
            check_default(self, "without --init-from", "init_checkpoint")
        self.check_learning_rate()

    def check_learning_rate(self) -> None:
        """Raises a ConfigError if a learning-rate option has no effect."""
        if self.schedule != "exponential":
            check_default(self, f"with --schedule {self.schedule}", "decay_rate", "decay_steps")
        elif self.decay_rate == 1:
            check_default(self, "with --decay-rate 1", "decay_steps", "min_learning_rate")
        if self.schedule == "constant":
            check_default(self, "with --schedule constant", "min_learning_rate")

    def check_resumes(self, started: "TrainConfig", *, may_change_rate: bool = True) -> None:
        """Raises a ConfigError if an option that shapes the parameters differs from the run's.

        Args:
          started: the options of the run.
          may_change_rate: whether the learning-rate options may differ.
        """
        if self.steps is not None and self.epochs not in (None, started.epochs):
            raise ConfigError(
                f"--epochs has no effect on the run in {self.run_dir}, which ends after --steps"
                f" {self.steps}"
            )
        for name in (*self.shaping(), *(() if may_change_rate else OF_LEARNING_RATE)):
            now, then = getattr(self, name), getattr(started, name)
            if now != then:
                raise ConfigError(
                    f"{flag(name)} must stay {then} to resume the run in {self.run_dir}, got {now}"
                )


def check_dataset_name(name: str | None) -> None:
    """Raises a ConfigError for a name that no data set can have."""
    if name is not None and not data.is_name(name):
        names = ", ".join(data.names())
        raise ConfigError(f"--dataset must be one of {names}, or tfds:NAME, got {name!r}")


def check_together(configs: Sequence[TrainConfig]) -> None:
    """Raises a ConfigError unless these runs can be trained together."""
    if len(configs) == 1:
        return
    if len({dataclasses.replace(c, seed=0, run_dir=Path()) for c in configs}) > 1:
        raise ConfigError("runs that train together must differ in --seed and --run-dir only")
    for option in configs[0].stopping:
        raise ConfigError(f"{option} is for one run: several runs would end at different steps")
    if len({c.run_dir for c in configs} - {None}) < len(configs):
        raise ConfigError("runs that train together need a --run-dir each")


_OF_THE_CALL = ("run_dir", "resume", "auto_resume")
# A change of these during a run is recorded; see RunConfig.
OF_LEARNING_RATE = (
    "learning_rate",
    "schedule",
    "warmup_steps",
    "decay_rate",
    "decay_steps",
    "min_learning_rate",
)
OF_OPTIMIZER = (*OF_LEARNING_RATE, "weight_decay", "clip_norm")
_MAY_CHANGE = (
    *_OF_THE_CALL,
    *OF_LEARNING_RATE,
    "data_dir",
    "epochs",
    "steps",
    "until_error",
    "patience",
    "driver",
    "devices",
    "input",
    "workers",
    "steps_per_dispatch",
    "log_every",
    "checkpoint_every",
    "keep",
    "tensorboard",
    "test_size",
)
