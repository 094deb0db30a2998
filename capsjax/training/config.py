"""Options of a training run; the command line is made from this dataclass."""

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
from capsjax.files import absolute, expand_paths
from capsjax.training.drivers import DriverName
from capsjax.training.inputs import InputName
from capsjax.training.objectives import LossName
from capsjax.training.options import check_types, require, require_at_least

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[models.presets()]
ChannelsNumber = Literal[1, 3, 4]
ScheduleName = Literal["exponential", "cosine", "constant"]
ClassWeights = Literal["balanced"] | tuple[float, ...] | None
_ROUTING = (
    f"Routing algorithm of the capsule layers: {', '.join(routing.algorithms())}, or one that a"
    " module of yours registers; the network's own if not given."
)
RoutingName = Annotated[str | None, Doc(_ROUTING)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a capsule network on a set of images.

    The run directory receives the configuration, metrics as JSON lines and for TensorBoard,
    checkpoints, the test result, and a picture of test images over their reconstructions.
    """

    preset: PresetName = "small"
    """Network, also given as --model: small (minutes on two cores), paper (dynamic routing,
    formulas as printed), official (the authors' code; cifar10, smallnorb and svhn for these sets),
    baseline (the paper's convolutional network; baseline_small of the size of small,
    baseline_pairs the one for overlapping digits), matrix_capsnet (EM routing),
    matrix_capsnet_small (the small one of that paper), efficient_capsnet (self-attention
    routing), large_images (the same for images of 64 to 224 pixels)."""

    routing: RoutingName = None

    reconstruction: bool = True
    """Train with a decoder that reconstructs the images, if the network has one."""

    override: tuple[str, ...] | None = None
    """Fields of the network's configuration, as FIELD=VALUE: conv_features=32
    decoder_features=128,256."""

    num_iterations: int | None = None
    """Routing iterations, for algorithms that iterate; the network's own if not given."""

    dataset: str = "mnist_5k"
    """Data set: mnist_5k is part of the package; mnist, fashion_mnist, kmnist, cifar10,
    svhn_cropped and smallnorb come from TFDS; tfds:NAME[/CONFIG][:VERSION] is any other set that
    TFDS has prepared; affnist is the published one; multi_mnist (two overlapping digits),
    expanded_mnist (a digit somewhere on 40x40) and affine_mnist (also rotated, sheared and scaled)
    are made of mnist on the device; image_folder reads images (png, jpg, tif, webp and others) in
    DATA_DIR/train/CLASS and DATA_DIR/test/CLASS, or in DATA_DIR/CLASS, and splits off test images
    if there are none; npz reads the arrays train_images, train_labels, test_images, test_labels
    and class_names of the file DATA_DIR, and may be given as --dataset FILE.npz."""

    data_dir: Path | None = None
    """Directory of prepared data sets, of images, or an .npz file; TFDS's own default if not
    given."""

    image_size: int | None = None
    """Rows and columns to which the images of image_folder and tfds: are scaled, their longer side
    cropped; their own, the same for all, if not given."""

    channels: ChannelsNumber | None = None
    """Channels of the images of image_folder and tfds: 1 (gray), 3 (RGB), 4 (with transparency,
    which is laid on white otherwise); 1 for grayscale images and 3 for others if not given."""

    run_dir: Path | None = None
    """Run directory, or gs://BUCKET/FOLDER; runs/DATASET-PRESET-TIME if not given."""

    init_from: Path | None = None
    """Start from the parameters of this run, or of a network that comes with the package
    (mnist_small): those of the same name and shape; the others are initialised."""

    init_checkpoint: str = "last"
    """Which checkpoint of INIT_FROM: last, best (by validation error), or a step."""

    freeze: tuple[str, ...] | None = None
    """Parts of the network that are not trained, by the beginning of their parameters' names: conv
    primary."""

    resume: bool = False
    """Go on with the run in RUN_DIR from its last checkpoint and with its options, except those
    that are given; options that shape the parameters must stay the same."""

    auto_resume: bool = False
    """Go on with the run in RUN_DIR if it has begun, and begin it if not: one command for the first
    start and for every restart. Give all options each time."""

    epochs: int | None = None
    """Passes over the training images, each in a new order; a last incomplete batch is left out.
    20 if neither epochs nor steps are given."""

    steps: int | None = None
    """Number of steps, in place of epochs."""

    until_error: float | None = None
    """End earlier, at the first checkpoint whose validation error is at most this share."""

    patience: int | None = None
    """End earlier, when the validation error has not become smaller in so many validations."""

    batch_size: int = 128
    """Examples in a step, over all devices together."""

    loss: LossName | None = None
    """Objective: paper (margin + 0.0005 x squared error), official (the authors' scale: the
    reconstruction counts 20 times more), spread (matrix capsules' own), cross_entropy and
    binary_cross_entropy (baseline only), squared_error (numbers to predict); the preset's own if
    not given."""

    class_weights: ClassWeights = None
    """Factors of the loss of examples of each class in training: balanced (inverse to the number of
    the class's examples, 1 on average), or a number for each class; equal if not given."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; parameters, norms and routing sums are float32 in both."""

    learning_rate: float = 1e-3
    """Adam's learning rate at the first step, or after the warm-up."""

    schedule: ScheduleName = "exponential"
    """How the learning rate falls: exponential (by DECAY_RATE every DECAY_STEPS steps), cosine (to
    MIN_LEARNING_RATE at the last step), constant."""

    warmup_steps: int = 0
    """Steps over which the learning rate first rises linearly; the schedule begins after them."""

    decay_rate: float = 0.96
    """The learning rate is multiplied by this factor every DECAY_STEPS steps, continuously."""

    decay_steps: int = 2000
    """Steps over which the learning rate decays by DECAY_RATE."""

    min_learning_rate: float = 1e-6
    """The learning rate never falls below this."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, of kernels alone; none if 0."""

    clip_norm: float | None = None
    """Largest global norm of the gradients, which are scaled down to it; not clipped if not
    given."""

    max_shift: int | None = None
    """Training images are shifted by up to this many pixels along both axes; 2 if not given, of
    overlapping digits 4, which then are shifted in test too."""

    fill: Fill | None = None
    """Pixels that shifts move in: edge repeats the border of the image, a number is a grey from 0
    (black) to 1 (white); 0 if not given."""

    flip: Flip | None = None
    """Mirror training images at random: horizontal (left and right), vertical, or both; not if not
    given."""

    test_size: int | None = None
    """Number of test images to generate, for multi_mnist, expanded_mnist and affine_mnist; that of
    the set if not given."""

    validation: int | None = None
    """Training images held out to choose the best checkpoint, the same share of each class; a tenth
    of them if not given, 0 for none. The test set is never used for a choice."""

    seed: int = 0
    """Seed of initialisation, order and shifts; a run is determined by its options."""

    driver: DriverName = "pmap"
    """How the step runs: pmap (mapped over the devices), shard (jit over a sharded mesh), jit (one
    device)."""

    devices: int | None = None
    """Use the first so many devices; all of them if not given (one for jit)."""

    input: InputName | None = None
    """Where the images are: resident (all on every device) or stream (read, decoded and sent there
    in chunks, for image_folder and tfds: from disk). If not given, stream where all decoded images
    take more than half of a device's memory or a quarter of the machine's."""

    workers: int | None = None
    """Processes that read and decode the training images of a stream from disk; 0 for threads of
    this process; one less than there are processors if not given, at most 32."""

    steps_per_dispatch: int = 256
    """Largest number of steps in one call of the devices; fewer if they are slow, so that progress
    stays visible."""

    log_every: int = 50
    """Steps between two records of the training metrics."""

    checkpoint_every: int | None = None
    """Steps between two checkpoints with validation; once an epoch if not given."""

    keep: int = 3
    """Latest checkpoints to keep, besides the one with the best validation error."""

    tensorboard: bool = True
    """Also write metrics for TensorBoard."""

    def __post_init__(self) -> None:
        """Checks every option that can be checked without data and devices."""
        check_types(self)
        expand_paths(self, "data_dir", remote=("run_dir", "init_from"))
        if self.init_from is not None and self.init_from.exists():  # no name of a packaged network
            object.__setattr__(self, "init_from", absolute(self.init_from))
        check_dataset_name(self.dataset)
        if self.routing is not None and self.routing not in routing.algorithms():
            names = ", ".join(routing.algorithms())
            raise ConfigError(f"--routing must be one of {names}, got {self.routing!r}")
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
        grey = isinstance(self.fill, int | float) and 0 <= self.fill <= 1
        require(self, "fill", self.fill in (None, "edge") or grey, "edge or from 0 to 1")
        require(self, "seed", 0 <= self.seed < 2**32, "between 0 and 4294967295")
        for name in ("learning_rate", "min_learning_rate", "clip_norm"):
            value = getattr(self, name)
            positive = value is None or (math.isfinite(value) and value > 0)
            require(self, name, positive, "positive")
        require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        for name in ("class_weights", "freeze", "override"):
            if getattr(self, name) == ():
                raise ConfigError(f"--{name.replace('_', '-')} needs at least one value")
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
            raise ConfigError("--resume needs --run-dir, the directory of the run to go on with")
        if self.auto_resume and self.run_dir is None:
            raise ConfigError("--auto-resume needs --run-dir, the directory of the run")
        if self.auto_resume and self.resume:
            raise ConfigError("--auto-resume has no effect with --resume")

    @property
    def stopping(self) -> tuple[str, ...]:
        """The options given that may end the run before its last step."""
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
        """Names of the options that shape the parameters, which must stay the same in a run."""
        names = (field.name for field in dataclasses.fields(cls))
        return tuple(name for name in names if name not in _MAY_CHANGE)

    def check_effect(self) -> None:
        """Raises a ConfigError if an option of a new run has no effect."""
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"--epochs has no effect with --steps {self.steps}")
        if self.init_from is None:
            self.check_default("without --init-from", "init_checkpoint")
        self.check_learning_rate()

    def check_learning_rate(self) -> None:
        """Raises a ConfigError if an option of the learning rate has no effect."""
        if self.schedule != "exponential":
            self.check_default(f"with --schedule {self.schedule}", "decay_rate", "decay_steps")
        elif self.decay_rate == 1:
            self.check_default("with --decay-rate 1", "decay_steps", "min_learning_rate")
        if self.schedule == "constant":
            self.check_default("with --schedule constant", "min_learning_rate")

    def check_default(self, where: str, *names: str) -> None:
        """Raises a ConfigError if one of these options, which have no effect, is given."""
        for field in dataclasses.fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ConfigError(f"--{field.name.replace('_', '-')} has no effect {where}")

    def check_resumes(self, started: "TrainConfig", *, may_change_rate: bool = True) -> None:
        """Raises a ConfigError if an option that shapes the parameters differs from the run's.

        Args:
          started: the options of the run.
          may_change_rate: whether those of the learning rate may differ.
        """
        if self.steps is not None and self.epochs not in (None, started.epochs):
            raise ConfigError(
                f"--epochs has no effect on the run in {self.run_dir}, which ends after --steps"
                f" {self.steps}"
            )
        for name in (*self.shaping(), *(() if may_change_rate else OF_LEARNING_RATE)):
            now, then = getattr(self, name), getattr(started, name)
            if now != then:
                option = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{option} must stay {then} to resume the run in {self.run_dir}, got {now}"
                )


def check_dataset_name(name: str | None) -> None:
    """Raises a ConfigError for a name that no data set can have."""
    if name is not None and not data.is_name(name):
        names = ", ".join(data.names())
        raise ConfigError(f"--dataset must be one of {names}, or tfds:NAME, got {name!r}")


def check_together(configs: Sequence[TrainConfig]) -> None:
    """Raises a ConfigError unless these runs can be trained at once."""
    if len(configs) == 1:
        return
    if len({dataclasses.replace(c, seed=0, run_dir=Path()) for c in configs}) > 1:
        raise ConfigError("runs that train together must differ in --seed and --run-dir only")
    for option in configs[0].stopping:
        raise ConfigError(f"{option} is for one run: several would end at different steps")
    if len({c.run_dir for c in configs} - {None}) < len(configs):
        raise ConfigError("runs that train together need a --run-dir each")


_OF_THE_CALL = ("run_dir", "resume", "auto_resume")
# Changes of these on the way are recorded, see RunConfig.
OF_LEARNING_RATE = (
    "learning_rate",
    "schedule",
    "warmup_steps",
    "decay_rate",
    "decay_steps",
    "min_learning_rate",
)
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
