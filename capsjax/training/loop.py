"""The training loop: from options to a finished run directory."""

import collections
import dataclasses
import datetime
import signal
import time
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from capsjax import models
from capsjax.data import Batch, Dataset, Split, evaluation_samples, load
from capsjax.errors import ConfigError, DivergedError
from capsjax.routing import algorithm
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.config import TrainConfig
from capsjax.training.picture import write_picture
from capsjax.training.programs import NEVER, StepSums
from capsjax.training.reporting import Report
from capsjax.training.run_directory import DataDescription, RunConfig, RunDirectory, write_json
from capsjax.training.session import Evaluation, Pace, Session, option_error
from capsjax.training.step import TrainState
from capsjax.training.stopping import StopRequest

_PICTURED = 16


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      run_dir: its directory.
      step: steps taken.
      test: evaluation of the last parameters on the whole test set; None if the run was stopped.
      validation_error: of the last checkpoint that was validated, or None.
      first_step: the step at which this process began: 0, or that of the resumed checkpoint.
      seconds: time in this process, compilation included.
      stopped_by: the signal that stopped the run before its end, or None.
    """

    run_dir: Path
    step: int
    test: Evaluation | None
    validation_error: float | None
    first_step: int
    seconds: float
    stopped_by: signal.Signals | None = None


def train(
    config: TrainConfig,
    *,
    model: models.ModelConfig | None = None,
    dataset: Dataset | None = None,
) -> Result:
    """Trains a network, or goes on with a run.

    Args:
      config: the options.
      model: the network's configuration; the preset's for the data set when None. A resumed run
        keeps its own.
      dataset: the images; loaded by the options when None.

    Returns:
      What the run came to.

    Raises:
      ConfigError: an option cannot be.
      capsjax.data.DataError: the data set cannot be had.
      CheckpointError: a checkpoint cannot be written or read.
      DivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    started = time.monotonic()
    directory = RunDirectory(_run_dir(config))
    before = None
    if config.resume:
        before = directory.read_config()
        config.check_resumes(before.train)
        model = before.model
    else:
        directory.check_new()  # before anything is loaded
    if dataset is None:
        dataset = load(config.dataset, data_dir=config.data_dir)
    if before is not None:
        before.data.check(DataDescription.of(dataset))
    model = model or _configure(config, dataset)
    session = Session(config, model, dataset)
    if before is None:
        directory.create()
    elif (finished := directory.finished_at()) is not None and finished >= session.total_steps:
        raise ConfigError(
            f"the run in {directory.path} is finished at step {finished:,}; more --epochs or"
            " --steps go on with it"
        )
    # Of a resumed run too: it may have become longer, and may have to be resumed again.
    directory.write_config(RunConfig(config, model, DataDescription.of(dataset)))
    with StopRequest() as stop:
        checkpoints = Checkpoints(directory.checkpoints, keep=config.keep)
        try:
            return _Loop(session, directory, checkpoints, stop).run(started)
        finally:
            checkpoints.close()


def draw_reconstructions(session: Session, state: TrainState, path: Path, test: Split) -> bool:
    """Draws test images over their reconstructions; False for a network without a decoder."""
    if not getattr(session.model, "decoder_features", ()):
        return False
    chosen = np.linspace(0, len(test.labels) - 1, min(_PICTURED, len(test.labels))).astype(int)
    split = Batch(jnp.asarray(test.images), jnp.asarray(test.labels))
    sample, labels = evaluation_samples(
        session.task, split, jnp.asarray(chosen), num_classes=session.model.num_classes
    )
    variables = jax.device_get(state.variables)
    prediction, _ = jax.jit(session.apply)(variables, sample.images)
    # Of each image the classes that are predicted, as many as it shows.
    _, said = jax.lax.top_k(prediction.scores, labels.size // len(chosen))
    masks = jax.nn.one_hot(said, session.model.num_classes)
    drawn, _ = jax.jit(session.apply)(variables, sample.images, target=masks)
    # Of pairs what is shown; else what is to be drawn, which is not standardised.
    shown = sample.drawings if sample.drawings.ndim == sample.images.ndim else sample.images
    rows = [shown, *jnp.moveaxis(drawn.reconstruction, 1, 0)]
    write_picture(path, [np.asarray(row) for row in rows])
    return True


class _Loop:
    """One process's part of a run."""

    def __init__(
        self,
        session: Session,
        directory: RunDirectory,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ):
        self.session = session
        self.config = session.config
        self.directory = directory
        self.checkpoints = checkpoints
        self.stop = stop
        self.pending: collections.deque[tuple[int, int, StepSums]] = collections.deque()
        self.pace = Pace(session.config.steps_per_dispatch)
        self.validation_error: float | None = None
        self.state = session.initial_state()
        self.step = 0
        self.validated = 0  # the last step that was
        if self.config.resume:
            if checkpoints.steps():
                self.step = checkpoints.choose("last")
                self.state = checkpoints.restore(self.step, self.state)
            if self.step > session.total_steps:
                raise ConfigError(
                    f"the run in {directory.path} stands at step {self.step:,} already, beyond the"
                    f" {session.total_steps:,} that were asked for"
                )
            for record in directory.forget_metrics_after(self.step):
                if record["split"] == "validation":
                    self.validated, self.validation_error = record["step"], record["error"]
        self.first_step = self.step
        self._clear_window()
        self.completed = time.monotonic()

    def run(self, started: float) -> Result:
        total, every = self.session.total_steps, self.config.checkpoint_every
        every = every or self.session.steps_per_epoch
        with Report(
            self.directory,
            total_steps=total,
            step=self.step,
            tensorboard=self.config.tensorboard,
        ) as self.report:
            self.report.say(self._headline())
            self.completed = time.monotonic()
            due = self.step > 0 and (self.step % every == 0 or self.step == total)
            if due and self.session.validation is not None and self.validated < self.step:
                self._checkpoint()  # the run was stopped while it validated this step
            while self.step < total and self.stop.signal is None:
                boundary = min(
                    total,
                    _next_multiple(self.step, every),
                    _next_multiple(self.step, self.config.log_every),
                    _next_multiple(self.step, self.session.steps_per_epoch),
                )
                self._dispatch(self.pace.amount(boundary - self.step))
                if self.step % self.config.log_every == 0 or self.step == total:
                    self._drain()
                    self._log()
                if self.step % every == 0 or self.step == total:
                    self._drain()
                    self._checkpoint()
            self._drain()
            if self.step < total:
                return self._stopped(started)
            with self.report.evaluating("testing"):
                test = self.session.evaluator(
                    self.state,
                    self.session.test,
                    lambda: self.stop.signal is not None,
                    number=self.config.test_size,
                )
            if test is None:
                return self._stopped(started)
            return self._finished(test, started)

    def _dispatch(self, num_steps: int) -> None:
        """Starts steps, then hears of those before: the devices never wait for the host."""
        self.state, sums = self.session.run_steps(self.state, self.step, num_steps)
        self.step += num_steps
        self.pending.append((self.step, num_steps, sums))
        if len(self.pending) > 1:
            self._complete()

    def _complete(self) -> None:
        step, num_steps, pending = self.pending.popleft()
        sums: StepSums = jax.device_get(pending)
        now = time.monotonic()
        seconds, self.completed = now - self.completed, now
        self.pace.observe(num_steps, seconds)
        if sums.bad_step != NEVER:
            self._diverged(int(sums.bad_step), "the loss is not finite")
        self.window_steps += num_steps
        self.window_loss += float(sums.loss)
        self.window_error += float(sums.error)
        self.report.progress(
            step,
            self.window_loss / self.window_steps,
            self.window_error / self.window_steps,
            num_steps * self.config.batch_size / seconds,
        )

    def _drain(self) -> None:
        while self.pending:
            self._complete()

    def _log(self) -> None:
        if self.window_steps:
            seconds = time.monotonic() - self.window_start
            self.report.record(
                "train",
                self.step,
                loss=self.window_loss / self.window_steps,
                error=self.window_error / self.window_steps,
                examples_per_second=self.window_steps * self.config.batch_size / seconds,
            )
        self._clear_window()

    def _clear_window(self) -> None:
        self.window_steps, self.window_loss, self.window_error = 0, 0.0, 0.0
        self.window_start = time.monotonic()

    def _checkpoint(self) -> None:
        if not _all_finite(self.state.params):
            self._diverged(self.step, "the parameters are not finite")
        line = f"step {self.step:,} of {self.session.total_steps:,}"
        error = None
        if self.session.validation is not None:
            with self.report.evaluating("validating"):
                validation = self.session.evaluator(
                    self.state, self.session.validation, lambda: self.stop.signal is not None
                )
            if validation is None:
                return  # asked to stop: the run saves where it stands
            error = self.validation_error = validation.error
            self.validated = self.step
            self.report.record(
                "validation",
                self.step,
                loss=validation.loss,
                error=validation.error,
                count=validation.count,
            )
            line += f": validation error {validation.error:.2%}, loss {validation.loss:.4f}"
        self.checkpoints.save(self.state, self.step, error)
        self.report.say(line)
        # Neither an evaluation nor a save belongs to the speed of training.
        self.completed = self.window_start = time.monotonic()

    def _stopped(self, started: float) -> Result:
        if self.step not in self.checkpoints.steps():
            if not _all_finite(self.state.params):
                self._diverged(self.step, "the parameters are not finite")
            self.checkpoints.save(self.state, self.step, None)
        self.checkpoints.finish()
        seconds = time.monotonic() - started
        return Result(
            self.directory.path,
            self.step,
            None,
            self.validation_error,
            self.first_step,
            seconds,
            self.stop.signal,
        )

    def _finished(self, test: Evaluation, started: float) -> Result:
        self.report.record("test", self.step, loss=test.loss, error=test.error, count=test.count)
        self.checkpoints.finish()
        draw_reconstructions(self.session, self.state, self.directory.picture, self.session.test)
        seconds = time.monotonic() - started
        result = Result(
            self.directory.path, self.step, test, self.validation_error, self.first_step, seconds
        )
        write_json(
            self.directory.result,
            {
                "step": self.step,
                "test_error": test.error,
                "test_wrong": test.wrong,
                "test_count": test.count,
                "test_loss": test.loss,
                "validation_error": self.validation_error,
                "parameters": self.session.num_parameters,
                "seconds": round(seconds, 1),
            },
        )
        return result

    def _diverged(self, step: int, what: str) -> None:
        self.checkpoints.finish()
        steps = self.checkpoints.steps()
        good = f"the last good checkpoint is of step {steps[-1]}" if steps else "no checkpoint yet"
        raise DivergedError(
            f"{what} at step {step}; {good}, in {self.checkpoints.path}; a lower --learning-rate"
            " may help"
        )

    def _headline(self) -> str:
        config, session = self.config, self.session
        validation = 0 if session.validation is None else len(session.validation.labels)
        test = len(session.test.labels) if config.test_size is None else config.test_size
        devices = session.driver.devices
        where = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
        begun = f", from step {self.step:,}" if self.step else ""
        return (
            f"{config.preset} ({session.num_parameters:,} parameters) on {config.dataset}:"
            f" {len(session.train.labels):,} training, {validation:,} validation,"
            f" {test:,} test images; {config.driver} on {where};"
            f" {session.total_steps:,} steps of {config.batch_size}{begun}\n"
            f"run directory: {self.directory.path}"
        )


def _run_dir(config: TrainConfig) -> Path:
    if config.run_dir is not None:
        return config.run_dir
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.dataset}-{config.preset}-{now}"


def _configure(config: TrainConfig, dataset: Dataset) -> models.ModelConfig:
    chosen = {"routing": config.routing, "num_iterations": config.num_iterations}
    overrides: dict[str, Any] = {name: v for name, v in chosen.items() if v is not None}
    preset = models.configure(config.preset)
    if not config.reconstruction:
        if not getattr(preset, "decoder_features", ()):
            raise ConfigError(f"--no-reconstruction: {config.preset} has no decoder anyway")
        overrides["decoder_features"] = ()
    for name in overrides:
        if not hasattr(preset, name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is for capsule networks, not for {config.preset}")
    try:
        preset = models.configure(config.preset, **overrides)
    except ValueError as error:
        raise option_error(error) from None
    routing = getattr(preset, "routing", "")
    if config.num_iterations is not None and not algorithm(routing).iterates:
        raise ConfigError(f"--num-iterations is not for routing {routing!r}, which makes one pass")
    try:
        return models.configure(
            config.preset,
            **overrides,
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            dtype=config.dtype,
        )
    except ValueError as error:
        raise ConfigError(f"data set {dataset.name} does not suit the network: {error}") from None


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


@jax.jit
def _all_finite(params: chex.ArrayTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
