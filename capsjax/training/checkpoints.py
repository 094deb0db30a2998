"""Checkpoints: asynchronous, the latest few and the best, through Orbax."""

import contextlib
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, cast

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from capsjax.data.absl_log import without_warnings
from capsjax.errors import CheckpointError, ConfigError, DamagedCheckpointError
from capsjax.files import absolute, is_local, is_lost, remove_tree
from capsjax.training.files import read_json
from capsjax.training.step import TrainState, Variables

# What the best checkpoint has least of, by whether labels are numbers to predict.
_METRICS = {False: "validation_error", True: "validation_loss"}


class Checkpoints:
    """The checkpoints of a run, which process 0 writes and reads.

    Args:
      path: their directory; made if it is missing.
      keep: number of latest checkpoints to keep, besides the best.
      read_only: whether only to read.
      regression: whether the score of a checkpoint is its validation loss, instead of its error.
      run: the options that affect the run's parameters, as JSON values. They are written with each
        checkpoint and compared with those of a checkpoint that is read.

    Raises:
      CheckpointError: the directory cannot be used.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep: int = 3,
        read_only: bool = False,
        regression: bool = False,
        run: Mapping[str, Any] | None = None,
    ):
        self.path = absolute(path)
        self._run, self._regression = run, regression
        best = preservation_policy.BestN(
            get_metric_fn=_error, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        if not read_only:
            with contextlib.suppress(OSError):  # Orbax says why it cannot write there
                self.path.mkdir(parents=True, exist_ok=True)
        only = _this_process()
        options = ocp.CheckpointManagerOptions(
            best_fn=_error,
            best_mode="min",
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(keep), best]
            ),
            create=False,
            multiprocessing_options=only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,  # Orbax warns of others
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.path,
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(multiprocessing_options=only),
            )
        except Exception as error:
            _check_metric_files(folder for folder in path.glob("*") if folder.name.isdecimal())
            raise CheckpointError(f"checkpoints in {path} cannot be used: {_line(error)}") from None
        try:
            _check_metric_files(path / str(step) for step in self.steps())
        except CheckpointError:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes, without waiting for storage that may not answer."""
        if not is_lost(self.path, kind):
            self.close()

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, step: int, score: float | None) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        Args:
          state: what to save.
          step: of the state.
          score: the validation error, or loss for regression; None if it was not validated.

        Raises:
          CheckpointError: this or the previous checkpoint could not be written.
        """
        if step in self.steps():  # it was saved without the validation that it now has
            self._guard(step, lambda: self._manager.delete(step))
        elif not is_local(self.path):
            # What a process that this one took the run over from has left, or is writing.
            self._guard(step, lambda: remove_tree(self.path / str(step)))
        # Orbax refuses arrays of one process among several, but takes NumPy's.
        snapshot = jax.tree.map(np.array, jax.device_get(state))
        metric = _METRICS[self._regression]
        metrics = None if score is None else {metric: score}
        about = {"checksums": _checksums(snapshot), metric: score, "run": self._run}
        with without_warnings():  # Orbax's, that a checkpoint has no metrics
            self._guard(
                step,
                lambda: self._manager.save(
                    step,
                    args=ocp.args.StandardSave(snapshot),
                    metrics=metrics,
                    force=True,
                    custom_metadata=about,
                ),
            )

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps.

        Raises:
          CheckpointError: one could not be deleted.
        """
        for later in [other for other in self.steps() if other > step]:
            self._guard(later, lambda later=later: self._manager.delete(later))

    def finish(self) -> None:
        """Waits until everything is on disk.

        Raises:
          CheckpointError: a checkpoint could not be written.
        """
        self._guard(None, self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for what is being written and releases threads; never raises."""
        with contextlib.suppress(Exception):  # `finish` or `save` have reported it
            self._manager.close()

    def choose(self, which: str | int) -> int:
        """Returns the step of the ``"last"``, the ``"best"`` or a numbered checkpoint.

        Raises:
          CheckpointError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.path}")
        if which == "last":
            return steps[-1]
        if which == "best":
            for step in steps:
                self._check_metrics(step)
            best = self._manager.best_step()
            if best is None or _error(self._manager.metrics(best)) == math.inf:
                raise CheckpointError(f"no checkpoint in {self.path} was validated")
            return int(best)
        if isinstance(which, str) and not which.isdecimal():
            raise CheckpointError(f"checkpoint must be last, best or a step, got {which!r}")
        if int(which) not in steps:
            known = ", ".join(map(str, steps))
            raise CheckpointError(f"no checkpoint of step {which} in {self.path}, only {known}")
        return int(which)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a checkpoint into NumPy arrays with the shapes and dtypes of `like`.

        Raises:
          CheckpointError: it is of another network or run, or it cannot be read.
        """
        restored: TrainState = self._restore(step, jax.tree.map(_empty, like))
        return restored

    def restore_variables(self, step: int, like: Variables) -> Variables:
        """Reads the arrays of a checkpoint's network, whatever optimizer it was trained with.

        Args:
          step: of the checkpoint.
          like: arrays, or their shapes.

        Raises:
          CheckpointError: as in :meth:`restore`.
        """
        variables = {"params": like.params, "batch_stats": like.batch_stats}
        target = jax.tree.map(
            _empty, {**self._metadata(step), **variables}, is_leaf=lambda x: hasattr(x, "shape")
        )
        restored = self._restore(step, target)
        return Variables(restored["params"], restored["batch_stats"])

    def _metadata(self, step: int) -> dict[str, Any]:
        """Orbax's description of the arrays of a checkpoint."""
        try:
            return dict(self._manager.item_metadata(step).tree)
        except Exception as error:
            raise self._unreadable(step, error) from None

    def _restore(self, step: int, target: Any) -> Any:
        found, expected = _shapes(self._metadata(step)), _shapes(target)
        # The optimizer's arrays, which follow the parameters', come last.
        names = found.keys() | expected.keys()
        for name in sorted(names, key=lambda name: (name.startswith("opt_state"), name)):
            if found.get(name) != expected.get(name):
                kind = "optimizer" if name.startswith("opt_state") else "network"
                raise CheckpointError(
                    f"checkpoint {self.path / str(step)} is of another {kind}: {name} has shape"
                    f" {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
                )
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:
            raise self._unreadable(step, error) from None
        self._check_run(step)
        if about := self._about(step):
            expected_checksums = about.get("checksums", {})
            for name, checksum in _checksums(restored).items():
                if expected_checksums.get(name) != checksum:
                    raise self._unreadable(step, ValueError(f"{name} has another checksum"))
        return restored

    def _about(self, step: int) -> Mapping[str, Any]:
        """What was written with a checkpoint; nothing by an earlier version."""
        try:
            metadata = self._manager.metadata(step)
        except Exception as error:
            raise self._unreadable(step, error) from None
        if metadata.init_timestamp_nsecs is None:  # as Orbax returns it of a damaged file
            raise self._unreadable(step, ValueError("its description cannot be read"))
        return cast(Mapping[str, Any], metadata.custom_metadata or {})

    def _check_metrics(self, step: int) -> None:
        """Raises a CheckpointError unless the validation error is the one that was written."""
        about = self._about(step)
        metrics = self._manager.metrics(step) or {}
        for name in _METRICS.values():
            if name in about and about[name] != metrics.get(name):
                named = name.replace("_", " ")
                raise self._unreadable(step, ValueError(f"its {named} was changed"))

    def _check_run(self, step: int) -> None:
        """Raises a CheckpointError unless the checkpoint was written by this run as it is now."""
        stored = self._about(step).get("run")
        if not stored or self._run is None:
            return
        then, now = _flat(stored), _flat(self._run)
        for name in sorted(then.keys() & now.keys()):  # versions may differ in what they know
            if then[name] != now[name]:
                raise CheckpointError(
                    f"checkpoint {self.path / str(step)} is of another run: {name} is {then[name]},"
                    f" expected {now[name]}; was config.json changed?"
                )

    def _unreadable(self, step: int, error: Exception) -> DamagedCheckpointError:
        others = ", ".join(str(other) for other in self.steps() if other != step)
        rest = f"; move it away to use those of step {others}" if others else ""
        return DamagedCheckpointError(
            f"checkpoint {self.path / str(step)} is damaged or truncated ({_line(error)}){rest}"
        )

    def _guard(self, step: int | None, action: Any) -> None:
        try:
            action()
        except Exception as error:
            kept = self.steps()
            last = f"; complete up to step {kept[-1]}" if kept else ""
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            failed = CheckpointError(
                f"{which} could not be written to {self.path}: {_line(error)}{last}"
            )
            failed.exit_code = 1  # another try may succeed
            raise failed from None


class _Metrics(msgspec.Struct, omit_defaults=True):
    validation_error: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    validation_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.validation_error is None) == (self.validation_loss is None):
            raise ValueError("it must hold either validation_error or validation_loss")


def _check_metric_files(folders: Iterable[Path]) -> None:
    """Raises a CheckpointError if Orbax's metrics of a checkpoint are damaged."""
    for folder in folders:
        file = folder / "metrics" / "metrics"
        if file.exists():
            try:
                read_json(file, _Metrics)
            except ConfigError as error:
                raise CheckpointError(f"{error}; move {folder} away to use the others") from None


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Keeps Orbax from waiting for other processes."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process-{this}"
    )


def _empty(array: Any) -> np.ndarray:
    return np.empty(array.shape, array.dtype)


def _error(metrics: Any) -> float:
    values = [] if metrics is None else [metrics[n] for n in _METRICS.values() if n in metrics]
    return float(values[0]) if values else math.inf


def _line(error: BaseException) -> str:
    """The error in one line: the operating system's own words where it has some."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    for known in ("No space left on device", "Permission denied", "File too large"):
        if known in text:
            return known
    return text if len(text) <= 80 else text[:80] + " …"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path, the same for a state and for Orbax's description of one."""
    return {name: tuple(leaf.shape) for name, leaf in _leaves(tree)}


def _checksums(state: Any) -> dict[str, int]:
    """CRC-32 of each array, by path."""
    return {name: zlib.crc32(_bytes(jax.device_get(array))) for name, array in _leaves(state)}


def _bytes(array: Any) -> memoryview:
    # As bytes: NumPy gives no buffer of dtypes that it does not know, such as bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return [(jax.tree_util.keystr(k, simple=True, separator="."), leaf) for k, leaf in leaves]
