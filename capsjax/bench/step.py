"""The whole train step of a capsule network, beside one in PyTorch."""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.bench.measurement import Measurement, compile_for, timed
from capsjax.bench.targets import parse_target
from capsjax.data import Batch, Sampler, Shifted
from capsjax.routing.fused import Implementation
from capsjax.training import (
    init_state,
    make_train_step,
    paper_loss,
    paper_optimizer,
    split_network,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Which step of which network."""

    preset: Literal["paper", "official", "small"] = "paper"
    """Network."""

    batch: int = 128
    """Examples, B."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation."""

    def __post_init__(self) -> None:
        """Checks the batch."""
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")


def benchmark_step(
    sizes: StepSizes, *, rounds: int = 7, target: str | None = None, torch: bool = True
) -> list[Measurement]:
    """Measures the train step with each implementation of the class capsules, and PyTorch's.

    All take a batch of uint8 images that is on the device, compute the paper's loss with
    reconstruction and all gradients, and update by Adam. Those of capsjax shift the images too.

    Args:
      sizes: of the network and its batch.
      rounds: counted calls of each, in alternation.
      target: what to compile for, see :func:`capsjax.bench.parse_target`; None is the default
        device. Programs for a device that is not in this machine are compiled and not called.
      torch: whether PyTorch takes part, if it is installed and sees the same device.

    Returns:
      A :class:`Measurement` of each; ``"default"`` first, where the implementation is None. Of
      PyTorch, only the time of its first call and its times.

    Raises:
      TargetError: this machine cannot serve the target.
      ValueError: there are no rounds.

    Example:
      >>> from capsjax.bench import StepSizes, benchmark_step
      >>> rows = benchmark_step(StepSizes(preset="small", batch=2), rounds=1, torch=False)
      >>> [row.name for row in rows]
      ['default', 'reference', 'blocked', 'pallas_tpu', 'pallas_gpu']
    """
    place = parse_target(target or jax.default_backend())
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sizes.batch, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, sizes.batch, dtype=np.int32)
    calls: dict[str, Callable[[], Any]] = {}
    found = []
    for implementation in (None, *get_args(Implementation)):
        name = implementation or "default"
        step, state = _step(sizes, implementation)
        arguments = (state, Batch(jnp.asarray(images), jnp.asarray(labels)), jax.random.key(0))
        program = compile_for(place, "step", name, step, arguments, donate_argnums=0)
        found.append(program.measurement)
        if not program.measurement.reason and not place.is_absent:
            calls[name] = _stepping(program.call, *arguments)
    if torch and not place.is_absent:
        for name, call in _torch_steps(sizes, images, labels, place.platform):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            found.append(Measurement("step", name, compile_seconds=seconds))
            calls[name] = call
    return timed(calls, found, rounds=rounds, pause=0.3)


def _step(sizes: StepSizes, implementation: Implementation | None) -> tuple[Any, Any]:
    network = models.create(
        sizes.preset, rngs=nnx.Rngs(0), dtype=sizes.dtype, implementation=implementation
    )
    apply, variables = split_network(network)
    optimizer = paper_optimizer()
    train_step = make_train_step(apply, optimizer, paper_loss)
    sampler, all_of_them = Sampler(Shifted(), num_classes=10), jnp.arange(sizes.batch)

    def step(state: Any, batch: Batch, key: jax.Array) -> Any:
        return train_step(state, sampler.train(batch, key, all_of_them, indices=all_of_them))

    return step, init_state(variables, optimizer)


def _stepping(program: Callable[..., Any], state: Any, *arguments: Any) -> Callable[[], Any]:
    """A call without arguments that goes on from the state that the last one left."""

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, *arguments)
        return state, metrics

    return call


def _torch_steps(
    sizes: StepSizes, images: np.ndarray, labels: np.ndarray, platform: str
) -> list[tuple[str, Callable[[], float]]]:
    device = {"cpu": "cpu", "gpu": "cuda"}.get(platform)
    if importlib.util.find_spec("torch") is None or device is None:
        return []
    from capsjax.bench import torch_step

    config = models.configure(sizes.preset, dtype=sizes.dtype)
    if not isinstance(config, models.CapsNetConfig):
        return []
    make = functools.partial(torch_step.make_step, config, images, labels, device=device)
    return [("torch eager", make(compiled=False)), ("torch.compile", make(compiled=True))]
