"""Several trainings of one recipe at once, in a few long device programs.

Unlike :func:`capsjax.training.train` nothing is said on the way but a line for each call of the
device: for a machine that is lent for minutes. Seeds are mapped over by ``vmap``; each trial is the
one that ``train`` makes with its seed. What has been done is on disk after every call.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.data import Batch, Dataset, Split, Task, epoch_order
from capsjax.errors import ConfigError, DivergedError
from capsjax.training.drivers import make_driver
from capsjax.training.objectives import LOSSES, choose_loss
from capsjax.training.programs import gather_batch, make_evaluate
from capsjax.training.recipes import Recipe
from capsjax.training.run_directory import DataDescription
from capsjax.training.session import check_dataset, choose_task, hold_out
from capsjax.training.step import (
    TrainState,
    init_state,
    make_train_step,
    paper_optimizer,
    split_network,
)

_HELD_OUT = 5000


@dataclasses.dataclass(frozen=True)
class Trial:
    """One finished training.

    Attributes:
      recipe: its name.
      seed: of initialisation, order and augmentation.
      steps: that were taken.
      errors: share of wrong predictions by data set, of the last parameters.
      counts: number of test images by data set.
      seconds: that the trials of this recipe took together, compilation included, over all calls.
      together: how many trials ran at once.
      of: what was trained, on what data.
    """

    recipe: str
    seed: int
    steps: int
    errors: dict[str, float]
    counts: dict[str, int]
    seconds: float
    together: int
    of: dict[str, Any]


def describe(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What a trial depends on beside its seed, as JSON: how the recipe trains, and the data."""
    said = ("table", "title", "published", "spread", "measured", "ensemble", "also_tested_on")
    trained = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in said}
    described: dict[str, Any] = json.loads(
        json.dumps({**trained, "data": dataclasses.asdict(DataDescription.of(dataset))})
    )
    return described


def check_alike(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raises a ConfigError where what was trained is not what is to be trained."""
    for key in now:
        if then.get(key) != now[key]:
            raise ConfigError(
                f"{path} is of {key.replace('_', ' ')} {then.get(key)}, not {now[key]}; move it"
                " away, or choose another --output"
            )


class Trials:
    """Trains a recipe with several seeds at once.

    Args:
      recipe: what to train.
      dataset: the images.
      seeds: one for each trial.
      folder: for what has been done so far.
      steps: in place of the recipe's number.
      dtype: of the computation.
      others: further data sets whose test images are taken too.

    Raises:
      ConfigError: the data set does not go with the network, or what an earlier run has left in the
        folder cannot be gone on with.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        seeds: Sequence[int],
        folder: Path,
        *,
        steps: int | None = None,
        dtype: str = "float32",
        others: Sequence[Dataset] = (),
    ):
        self.recipe, self.seeds, self.folder = recipe, tuple(seeds), folder
        self.total_steps = recipe.steps if steps is None else steps
        self.tested = (dataset, *others)
        self.of = describe(recipe, dataset)
        try:
            self.model = recipe.configure(
                image_shape=dataset.image_shape, num_classes=dataset.num_classes, dtype=dtype
            )
        except ValueError as error:
            raise ConfigError(f"recipe {recipe.name}: {error}") from None
        for each in self.tested:
            check_dataset(each, self.model)
        self.task = choose_task(dataset, recipe.max_shift)
        held_out = (
            0 if recipe.until_error is None else min(_HELD_OUT, len(dataset.train.labels) // 10)
        )
        self.train, self.validation = hold_out(dataset.train, held_out)
        self.steps_per_epoch = len(self.train.labels) // recipe.batch_size
        if not self.steps_per_epoch:
            raise ConfigError(f"recipe {recipe.name} needs {recipe.batch_size} training images")
        loss = choose_loss(
            recipe.loss, recipe.preset, self.model, several_classes=self.task.classes_per_image > 1
        )
        self.objective = LOSSES[loss]
        self.optimizer = paper_optimizer(recipe.learning_rate, decay_steps=recipe.decay_steps)
        self._keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(
            jnp.array(self.seeds, jnp.uint32)
        )
        # The network is a function alone; each trial's variables are made from its own key.
        self.apply, _ = split_network(nnx.eval_shape(lambda: self._network(jax.random.key(0))))
        self._examples = _as_arrays(self.train)
        self._run = jax.jit(self._epochs, donate_argnums=0)
        self.done, self.seconds, self.states = 0, 0.0, self._initial()
        self._last: dict[str, Any] | None = None
        self._resume()

    def run(
        self,
        *,
        seconds: float = float("inf"),
        seconds_per_call: float = 30.0,
        say: Callable[[str], None] = print,
    ) -> list[Trial] | None:
        """Trains to the end and tests, or until the time is over.

        Args:
          seconds: after which no further call of the device is begun.
          seconds_per_call: about how long a call may take; calls end with an epoch.
          say: is given a line after each call.

        Returns:
          The trials; None if the time was over first: the next run goes on from there.
        """
        started, epochs, timed = time.monotonic(), 1, False
        while not self._is_finished():
            begun = time.monotonic()
            if begun - started > seconds:
                return None
            first = self.done // self.steps_per_epoch
            self.states, sums = self._run(
                self.states,
                self._examples,
                self._keys,
                np.int32(first),
                np.int32(epochs),
                np.int32(self.total_steps),
            )
            loss, error, steps = map(np.asarray, jax.device_get(sums))
            self.done += int(steps)
            took = time.monotonic() - begun
            self.seconds += took
            point = {
                "recipe": self.recipe.name,
                "seeds": self.seeds,
                "step": self.done,
                "loss": (loss / steps).tolist(),
                "error": (error / steps).tolist(),
                "seconds": round(took, 2),
                "validation": self._validate(),
            }
            if not np.isfinite(loss).all():
                raise DivergedError(
                    f"recipe {self.recipe.name}: the loss is not finite at step {self.done:,}; what"
                    f" was saved before is in {self.folder}"
                )
            self._save(point)
            speed = int(steps) * self.recipe.batch_size * len(self.seeds) / took
            say(
                f"{self.recipe.name}: step {self.done:,} of {self.total_steps:,}, training error"
                f" {np.mean(point['error']):.3%}, {speed:,.0f} examples/s"
            )
            # The first call includes the compilation. Where the error decides, every epoch is
            # looked at, on slow machines and fast ones.
            if timed and self.recipe.until_error is None:
                epochs = max(1, min(4 * epochs, int(epochs * seconds_per_call / took)))
            timed = True
        return self._test()

    def scores(self, dataset: Dataset, number: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores of every trial for test samples, ``[trials, N, J]``, and their labels."""
        from capsjax.data import evaluation_samples

        split, number = dataset.test, number or len(dataset.test.labels)
        arrays = _as_arrays(split)

        @jax.jit
        def some(variables: Any, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
            sample, labels = evaluation_samples(
                dataset.task, arrays, numbers, num_classes=self.model.num_classes
            )
            apply = functools.partial(self.apply, images=sample.images)
            return _map_trials(lambda v: apply(v)[0].scores)(variables), labels

        scores, labels = [], []
        for first in range(0, number, 500):
            numbers = jnp.minimum(first + jnp.arange(500), number - 1)
            keep = min(500, number - first)
            a, b = some(self.states.variables, numbers)
            scores.append(np.asarray(a)[:, :keep])
            labels.append(np.asarray(b)[:keep])
        return np.concatenate(scores, axis=1), np.concatenate(labels)

    def _network(self, key: jax.Array) -> models.Network:
        return models.build(self.model, rngs=nnx.Rngs(key))

    def _initial(self) -> TrainState:
        @jax.jit
        def make(keys: jax.Array) -> TrainState:
            def one(key: jax.Array) -> TrainState:
                _, variables = split_network(self._network(key))
                return init_state(variables, self.optimizer)

            return jax.vmap(one)(keys)

        states: TrainState = make(self._keys[:, 0])
        return states

    def _epochs(
        self,
        states: TrainState,
        examples: Batch,
        keys: jax.Array,
        first: jax.Array,
        number: jax.Array,
        total: jax.Array,
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array, jax.Array]]:
        """Whole epochs, the last one up to the total number of steps."""
        size, count = self.recipe.batch_size, examples.labels.shape[0]
        train_step = make_train_step(
            self.apply,
            self.optimizer,
            self.objective,
            num_classes=self.model.num_classes,
            task=self.task,
        )

        def one_step(
            state: TrainState, order: jax.Array, key: jax.Array, step: jax.Array, start: jax.Array
        ) -> Any:
            chosen = jax.lax.dynamic_slice(order, (start,), (size,))
            step_key = jax.random.fold_in(key, step)
            batch = gather_batch(self.task, examples, step_key, jnp.arange(size), chosen)
            return train_step(state, batch, step_key)

        def epoch(n: jax.Array, carry: Any) -> Any:
            orders = jax.vmap(lambda key: epoch_order(jax.random.fold_in(key, n), count))(
                keys[:, 1]
            )
            begin = n * self.steps_per_epoch

            def step(t: jax.Array, carry: Any) -> Any:
                states, (loss, error, steps) = carry
                one = functools.partial(one_step, step=begin + t, start=t * size)
                states, metrics = _map_trials(one)(states, orders, keys[:, 2])
                return states, (loss + metrics.loss, error + metrics.error, steps + 1)

            steps = jnp.clip(total - begin, 0, self.steps_per_epoch)
            return jax.lax.fori_loop(0, steps, step, carry)

        zeros = jnp.zeros(len(self.seeds))
        carry = (states, (zeros, zeros, jnp.int32(0)))
        result: Any = jax.lax.fori_loop(first, first + number, epoch, carry)
        return result

    def _is_finished(self) -> bool:
        if self.done >= self.total_steps:
            return True
        goal = self.recipe.until_error
        validated = self._last.get("validation") if self._last else None
        return goal is not None and validated is not None and max(validated) <= goal

    def _validate(self) -> list[float] | None:
        if self.validation is None:
            return None
        return self._errors(self.validation, self.task)

    def _errors(self, split: Split, task: Task) -> list[float]:
        """Of each trial, on all images of a split."""
        driver = make_driver("jit", batch_size=500)
        evaluate = make_evaluate(
            self.apply,
            self.objective,
            driver,
            batch_size=500,
            num_classes=self.model.num_classes,
            task=task,
        )
        examples, batches = _as_arrays(split), -(-len(split.labels) // 500)
        errors = []
        for trial in range(len(self.seeds)):
            variables = jax.tree.map(lambda x, n=trial: x[n], self.states.variables)
            sums = evaluate(variables, examples, np.int32(0), np.int32(batches))
            errors.append(int(sums.wrong) / int(sums.examples))
        return errors

    def _test(self) -> list[Trial]:
        errors = {d.name: self._errors(d.test, d.task) for d in self.tested}
        counts = {d.name: len(d.test.labels) for d in self.tested}
        return [
            Trial(
                self.recipe.name,
                seed,
                self.done,
                {name: e[n] for name, e in errors.items()},
                counts,
                round(self.seconds, 1),
                len(self.seeds),
                self.of,
            )
            for n, seed in enumerate(self.seeds)
        ]

    @property
    def _stem(self) -> str:
        return f"{self.recipe.name}-seeds-{'-'.join(map(str, self.seeds))}"

    def _save(self, point: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._last = point
        with (self.folder / f"{self._stem}.curve.jsonl").open("a") as file:
            file.write(json.dumps(point) + "\n")
        path = self.folder / f"{self._stem}.npz"
        temporary = path.with_suffix(".tmp")
        about = {"done": self.done, "seconds": self.seconds, "last": point, "of": self.of}
        with temporary.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **_named(jax.device_get(self.states)))
        os.replace(temporary, path)

    def _resume(self) -> None:
        """Takes up what an earlier run has left."""
        path = self.folder / f"{self._stem}.npz"
        if not path.exists():
            return
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                arrays = {name: stored[name] for name in stored.files if name != "about"}
            of, last = dict(about["of"]), dict(about["last"])
            done, seconds = int(about["done"]), float(about["seconds"])
        except Exception as error:  # a damaged file raises nearly anything
            raise ConfigError(
                f"{path} is damaged: {error or type(error).__name__}; move it away to start afresh"
            ) from None
        check_alike(of, self.of, path)
        expected = _named(self.states)
        if _kinds(arrays) != _kinds(expected):
            raise ConfigError(f"{path} is of another network; move it away to start afresh")
        structure = jax.tree.structure(self.states)
        self.states = jax.tree.unflatten(structure, [jnp.asarray(arrays[n]) for n in expected])
        self.done, self.seconds, self._last = done, seconds, last


def _map_trials(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps over the leading axis; one trial is called as it is, without the cost of ``vmap``."""

    def mapped(*trees: Any) -> Any:
        if jax.tree.leaves(trees)[0].shape[0] > 1:
            return jax.vmap(function)(*trees)
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], trees)))

    return mapped


def _kinds(arrays: dict[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes by name."""
    return {name: (x.shape, np.dtype(x.dtype)) for name, x in arrays.items()}


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _as_arrays(split: Split) -> Batch:
    return Batch(jnp.asarray(split.images), jnp.asarray(split.labels, jnp.int32))
