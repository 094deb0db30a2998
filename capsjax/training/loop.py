"""The training loop: dispatch steps, record metrics, validate, save."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn

import chex
import jax
import jax.numpy as jnp
import numpy as np

from capsjax.data import Batch
from capsjax.data.dataset import AnySplit
from capsjax.errors import CheckpointError, ConfigError, DamagedCheckpointError, DivergedError
from capsjax.training import processes
from capsjax.training.checkpoints import Checkpoints
from capsjax.training.counting import Evaluation, count_errors
from capsjax.training.drivers import local
from capsjax.training.programs import NEVER, Pace, StepSums, stack, unstack
from capsjax.training.reporting import Report, say
from capsjax.training.run_directory import Record, RunDirectory, seconds_of
from capsjax.training.setup import Setup
from capsjax.training.step import TrainState
from capsjax.training.stopping import StopRequest


@dataclasses.dataclass
class Progress:
    """Progress of the runs: everything that the loop changes.

    Attributes:
      state: train state on the devices.
      step: number of steps dispatched.
      saved: last saved step.
      validated: last validated step.
      history: result of each validation so far, for each run: the error, or the loss for
        regression.
      seconds: time that training had taken before the runs were resumed.
    """

    state: TrainState
    step: int = 0
    saved: int = 0
    validated: int = 0
    history: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop uses but does not change.

    Attributes:
      setup: what the runs compute.
      directories: run directory of each run.
      checkpoints: checkpoints of each run; empty in processes other than the first.
      report: report of all runs.
      stop: request to stop, which is checked between dispatches.
    """

    setup: Setup
    directories: Sequence[RunDirectory]
    checkpoints: Sequence[Checkpoints]
    report: Report
    stop: StopRequest


@dataclasses.dataclass
class _Window:
    """Sums of the metrics since the last record.

    Attributes:
      steps: number of steps.
      loss: sum of their losses, for each run.
      error: sum of their error rates, for each run.
      seconds: time that they took, without validating and saving.
    """

    steps: int = 0
    loss: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    error: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    seconds: float = 0.0


def train_and_test(run: Run, progress: Progress) -> list[Evaluation] | None:
    """Trains to the end and tests; returns None if asked to stop before."""
    setup, config, total = run.setup, run.setup.config, run.setup.total_steps
    every = config.checkpoint_every or setup.steps_per_epoch

    def is_due(interval: int) -> bool:
        return progress.step % interval == 0 or progress.step == total

    unvalidated = setup.validation is not None and progress.validated < progress.step
    if unvalidated and is_due(every):
        _checkpoint(run, progress)  # the run was stopped while it validated this step
    pace, window = Pace(config.steps_per_dispatch), _Window()
    while not run.stop.requested() and not is_over(setup, progress.step, progress.history):
        target = min(total, *(_next_multiple(progress.step, n) for n in (every, config.log_every)))
        _advance(run, progress, target, pace, window)
        if is_due(config.log_every):
            _log(run, progress, window)
            window = _Window()
        if is_due(every):
            _checkpoint(run, progress)
    if config.patience is not None and _since_best(progress.history) >= config.patience:
        best = min(score for (score,) in progress.history)
        run.report.say(
            f"no improvement in the last {_since_best(progress.history)} validations; the best had"
            f" {f'loss {best:.4f}' if setup.is_regression else f'error {best:.2%}'}, and its"
            " checkpoint is kept as --checkpoint best"
        )
    tests = None
    if is_over(setup, progress.step, progress.history):
        with run.report.evaluating("testing"):
            examples = setup.feed.place(setup.test)
            tests = _evaluate(run, progress, examples, config.test_size)
    if tests is None:
        if progress.step != progress.saved or not progress.step:
            _check_finite(run, progress)
            _save(run, progress, [None] * len(run.directories))
    else:
        run.report.record("test", progress.step, [_metrics(test) for test in tests])
    run.report.flush()
    with _owned(run):
        for checkpoints in run.checkpoints:
            checkpoints.finish()
    return tests


def _advance(run: Run, progress: Progress, target: int, pace: Pace, window: _Window) -> None:
    """Trains up to a step or until asked to stop, and waits for the devices."""
    setup, completed = run.setup, time.monotonic()
    calls: collections.deque[tuple[int, int, StepSums]] = collections.deque()

    def complete() -> None:
        """Waits for the oldest dispatch."""
        nonlocal completed
        step, number, pending = calls.popleft()
        sums: StepSums = jax.device_get(pending)
        now = time.monotonic()
        seconds, completed = now - completed, now
        pace.observe(number, seconds)
        if (bad_step := int(np.min(sums.bad_step))) != NEVER:
            index = int(np.argmin(np.atleast_1d(sums.bad_step)))
            jax.block_until_ready(progress.state)  # before this process leaves the others
            _diverged(run, bad_step, "the loss is not finite", index)
        window.steps += number
        window.seconds += seconds
        window.loss = window.loss + np.atleast_1d(sums.loss)
        window.error = window.error + np.atleast_1d(sums.error)
        loss, error = (float(np.mean(x)) / window.steps for x in (window.loss, window.error))
        examples = number * setup.config.batch_size * len(setup.configs)
        run.report.progress(step, loss, error, examples / seconds)
        run.report.measure(number, seconds)

    while progress.step < target and not run.stop.requested():
        end = min(target, setup.feed.call_end(progress.step))
        number = processes.decide(pace.amount(end - progress.step))
        progress.state, sums = setup.run_steps(progress.state, progress.step, number)
        progress.step += number
        calls.append((progress.step, number, sums))
        if len(calls) > 1:  # one dispatch behind, so that the devices never wait for the host
            complete()
    while calls:
        complete()


def _log(run: Run, progress: Progress, window: _Window) -> None:
    """Records the means over the window."""
    if not window.steps:
        return
    examples = window.steps * run.setup.config.batch_size
    speed = examples / window.seconds
    means = zip(window.loss / window.steps, window.error / window.steps, strict=True)
    records = [
        {"loss": float(loss), "error": float(error), "examples_per_second": speed}
        for loss, error in means
    ]
    run.report.record("train", progress.step, records)


def _checkpoint(run: Run, progress: Progress) -> None:
    """Validates and saves; if asked to stop meanwhile, leaves the saving to the end of the run."""
    _check_finite(run, progress)
    setup = run.setup
    scores: Sequence[float | None] = [None] * len(run.directories)
    line = f"step {progress.step:,} of {setup.total_steps:,}"
    if setup.validation is not None:
        with run.report.evaluating("validating"):
            found = _evaluate(run, progress, setup.validation, None)
        if found is None:
            return
        values = tuple(each.loss if setup.is_regression else each.error for each in found)
        if setup.is_regression and not np.isfinite(values).all():
            bad = int(np.argmin(np.isfinite(values)))
            _diverged(run, progress.step, "the validation loss is not finite", bad)
        progress.validated, scores = progress.step, values
        progress.history.append(values)
        run.report.record("validation", progress.step, [_metrics(each) for each in found])
        loss = f"loss {np.mean([each.loss for each in found]):.4f}"
        error = "" if setup.is_regression else f"error {np.mean(values):.2%}, "
        line += f": validation {error}{loss}"
    _save(run, progress, scores)
    run.report.say(line)


def _save(run: Run, progress: Progress, scores: Sequence[float | None]) -> None:
    progress.saved = progress.step
    if not run.checkpoints:
        return
    run.report.flush()  # a resumed run finds the records of all steps up to its checkpoint
    states = unstack(local(progress.state), len(run.checkpoints))
    with _owned(run):
        for checkpoints, state, score in zip(run.checkpoints, states, scores, strict=True):
            checkpoints.save(state, progress.step, score)


@contextlib.contextmanager
def _owned(run: Run) -> Iterator[None]:
    """Reports that a run was taken over, if that is why a checkpoint cannot be written."""
    try:
        yield
    except CheckpointError:
        for directory in run.directories:
            directory.lock.check()
        raise


def _evaluate(
    run: Run, progress: Progress, examples: Batch | AnySplit, number: int | None
) -> list[Evaluation] | None:
    return count_errors(
        run.setup.feed.evaluate,
        progress.state.variables,
        examples,
        len(examples.labels) if number is None else number,
        batch_size=run.setup.config.batch_size,
        should_stop=run.stop.requested,
    )


def _metrics(evaluation: Evaluation) -> dict[str, Any]:
    values = {"loss": evaluation.loss, "error": evaluation.error, "count": evaluation.count}
    return values | ({"metrics": evaluation.metrics} if evaluation.metrics else {})


def begin(
    setup: Setup,
    directories: Sequence[RunDirectory],
    checkpoints: Sequence[Checkpoints],
    *,
    skip_damaged: bool,
) -> Progress:
    """Restores the last step of which all runs have a checkpoint, or starts at step 0.

    Args:
      setup: what the runs compute.
      directories: of the runs.
      checkpoints: of the runs; none in processes other than the first.
      skip_damaged: whether to go back to an earlier checkpoint if the last one is damaged.
    """
    steps = processes.first(lambda: [each.steps() for each in checkpoints], list[list[int]])
    saved = [set(each) for each in steps]
    common = set.intersection(*saved)
    if not common and any(saved):
        raise ConfigError(
            f"the runs in {', '.join(str(d.path) for d in directories)} have no checkpoint of the"
            " same step; resume each one alone"
        )
    step, state = max(common, default=0), setup.initial
    if step:
        like = jax.eval_shape(lambda state: unstack(state, len(directories))[0], state)
        candidates = sorted(common) if skip_damaged else [step]

        def restore() -> TrainState:
            while True:
                last = candidates.pop()
                try:
                    found = stack([each.restore(last, like) for each in checkpoints])
                except DamagedCheckpointError as error:
                    if not candidates:
                        raise
                    say(f"{error}; resuming from step {candidates[-1]:,} instead")
                    continue
                restored.append(last)
                return found

        restored: list[int] = []
        state = processes.share(restore, state)
        step = processes.first(lambda: restored[0], int)
    progress = Progress(setup.driver.replicate(state), step, saved=step)
    if step > setup.total_steps:
        raise ConfigError(
            f"the run in {directories[0].path} is already at step {step:,}, beyond the"
            f" {setup.total_steps:,} steps requested"
        )
    for each in checkpoints:
        each.forget_after(step)  # steps that other runs of the group have not reached
    kept = [directory.forget_metrics_after(step) for directory in directories]
    progress.validated, progress.history = read_history(setup, kept)
    progress.seconds = max(map(seconds_of, kept))
    return progress


def read_history(
    setup: Setup, metrics: Sequence[Sequence[Record]]
) -> tuple[int, list[tuple[float, ...]]]:
    """Returns the last step that all runs validated, or 0, and the history of :class:`Progress`."""
    validations = [[r for r in records if r["split"] == "validation"] for records in metrics]
    # A crash may have occurred between the records of two runs.
    validations = [each[: min(map(len, validations))] for each in validations]
    name: Literal["loss", "error"] = "loss" if setup.is_regression else "error"
    scores = [[math.inf if (v := r[name]) is None else v for r in each] for each in validations]
    last = [each[-1]["step"] for each in validations if each]
    return min(last, default=0), list(zip(*scores, strict=True))


def is_over(setup: Setup, step: int, history: Sequence[tuple[float, ...]]) -> bool:
    """Whether the runs end at this step, given these validations."""
    goal, patience = setup.config.until_error, setup.config.patience
    if step >= setup.total_steps:
        return True
    if goal is not None and history and all(error <= goal for error in history[-1]):
        return True
    return patience is not None and _since_best(history) >= patience


def _since_best(history: Sequence[tuple[float, ...]]) -> int:
    """Number of validations of one run since its best one, the first in case of ties."""
    scores = [score for (score,) in history]
    return len(scores) - 1 - int(np.argmin(scores)) if scores else 0


def _check_finite(run: Run, progress: Progress) -> None:
    if not _all_finite(local(progress.state.params)):
        _diverged(run, progress.step, "the parameters are not finite")


def _diverged(run: Run, step: int, what: str, number: int = 0) -> NoReturn:
    for each in run.checkpoints:
        each.finish()
    good = "there is no checkpoint yet"
    if last := run.directories[number].last_checkpoint():
        path = run.directories[number].checkpoints
        good = f"the last good checkpoint is that of step {last}, in {path}"
    raise DivergedError(
        f"{what} at step {step}; {good}; a lower --learning-rate may help, also with --resume"
    )


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


@jax.jit
def _all_finite(params: chex.ArrayTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
