"""Whole networks as workloads: prediction, and train steps on one or several devices."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.bench.workloads.capsules import implementations
from capsjax.bench.workloads.workload import Dtype, JaxFunction, Peer, placed

# Plain steps in PyTorch, for comparison with train steps; some are captured in one CUDA graph.
CAPTURED = ("torch.compile-graph", "torch.graph")
_TORCH = ("torch", "torch.compile", "torch.max-autotune", *CAPTURED)
# Of these, the network in PyTorch supports only the values of preset "paper".
_FIXED_IN_TORCH = (
    "routing",
    "padding",
    "primary_coupling",
    "routing_bias",
    "leaky",
    "stop_gradient",
)


def _step_implementations() -> tuple[str, ...]:
    return (*implementations(), *_TORCH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Network:
    """Parameters of all network workloads."""

    preset: Annotated[str, models.presets] = "small"
    batch: int = 128
    implementation: Annotated[str, implementations] = "default"
    dtype: Dtype = "float32"

    def configure(self) -> models.ModelConfig:
        """Returns the configuration of the network."""
        overrides: dict[str, Any] = {"dtype": self.dtype}
        if self.implementation not in ("default", *_TORCH):
            overrides["implementation"] = self.implementation
        return models.configure(self.preset, **overrides)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward(_Network):
    """A whole network on a batch of images."""

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        from capsjax.training import split_network

        config = self.configure()
        apply, variables = split_network(_abstract(config))
        images = jax.ShapeDtypeStruct((self.batch, *config.image_shape), jnp.float32)

        def forward(variables: Any, images: jax.Array) -> Any:
            return apply(variables, images)[0]

        return JaxFunction(jax.jit(forward), placed((variables, images), devices[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStep(_Network):
    """The train step of a network on one device, with donated state.

    Implementations whose names begin with ``torch`` are the paper's network as usually written in
    PyTorch, without the image shifts of the others. ``torch`` is eager. ``torch.compile`` and
    ``torch.max-autotune`` are compiled in PyTorch's mode of this name, the latter with CUDA graphs
    of the forward and of the backward pass. ``torch.compile-graph`` and ``torch.graph`` are
    captured with their optimizer in one CUDA graph, the latter tuned by ``max-autotune``.
    """

    implementation: Annotated[str, _step_implementations] = "default"

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction | Peer:
        """Makes the function."""
        if self.implementation in _TORCH:
            return _torch_steps(self, devices[0], steps=1)
        return _compiled_step(self, "jit", devices[:1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSteps(_Network):
    """Many train steps in one call, as in training on images that stay on the device.

    ``examples`` is the number of images, ``seeds`` the number of networks that train together.
    In PyTorch, where nothing waits for the device between steps, all steps see the same batch.
    """

    implementation: Annotated[str, _step_implementations] = "default"
    steps: int = 32
    examples: int = 6000
    seeds: int = 1

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction | Peer:
        """Makes the function."""
        if self.implementation in _TORCH:
            if self.seeds > 1:
                raise NotImplementedError("in PyTorch, networks do not train together")
            return _torch_steps(self, devices[0], steps=self.steps)
        from capsjax.data import Batch
        from capsjax.training.programs import make_run_steps

        parts, several = _training(self, "jit", devices[:1]), self.seeds > 1
        function = make_run_steps(
            parts.step, parts.sampler, parts.driver, batch_size=self.batch, several_seeds=several
        )

        def make_arguments() -> tuple[Any, ...]:
            orders = [jax.random.permutation(jax.random.key(seed), self.examples) for seed in seeds]
            each = [
                (parts.init_state(seed), order, jax.random.key(seed))
                for seed, order in zip(seeds, orders, strict=True)
            ]
            state, order, key = jax.tree.map(lambda *x: jnp.stack(x), *each) if several else each[0]
            examples = Batch(*_make_batch(self.examples, parts.config))
            return state, examples, order, key, jnp.int32(self.steps)

        seeds = range(self.seeds)
        arguments = placed(jax.eval_shape(make_arguments), devices[0])
        return JaxFunction(function, arguments, make_arguments, donated=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmappedTrainingStep(_Network):
    """The train step mapped over all devices of the target, with ``batch`` examples on each."""

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        return _compiled_step(self, "pmap", devices)


def _torch_steps(workload: _Network, device: jax.Device, *, steps: int) -> Peer:
    """Returns train steps in PyTorch on a random batch."""
    config, name = workload.configure(), {"cpu": "cpu", "gpu": "cuda"}.get(device.platform)
    if name is None or not isinstance(config, models.CapsNetConfig):
        raise NotImplementedError("PyTorch runs on cpu and gpu only, with presets of CapsNet")
    for field in _FIXED_IN_TORCH:
        expected, value = (getattr(each, field) for each in (models.configure("paper"), config))
        if value != expected:
            raise NotImplementedError(
                f"the network in PyTorch is like preset 'paper', with {field}={expected!r}, got"
                f" {value!r}"
            )
    if not config.decoder_features:
        raise NotImplementedError("the network in PyTorch has a decoder")
    if workload.implementation in CAPTURED and name != "cuda":
        raise NotImplementedError("CUDA graphs need a gpu")
    if importlib.util.find_spec("torch") is None:
        raise NotImplementedError("needs PyTorch, which is not installed: pip install torch")
    from capsjax.bench.workloads.torch_step import CapsNet, make_step

    images, labels = (np.asarray(x) for x in _make_batch(workload.batch, config))

    def compile_steps() -> Callable[[], float]:
        call = make_step(
            CapsNet(config),
            images,
            labels,
            implementation=workload.implementation,
            device=name,
            steps=steps,
        )
        # PyTorch compiles in the first step and records CUDA graphs in the next two.
        for _ in range(-(-3 // steps)):
            call()
        return call

    return Peer(compile_steps)


def _abstract(config: models.ModelConfig) -> Any:
    """Returns the network with shapes instead of arrays."""
    return nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))


def _make_batch(size: int, config: models.ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns random uint8 images and labels."""
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.randint(keys[0], (size, *config.image_shape), 0, 256, jnp.uint8)
    return images, jax.random.randint(keys[1], (size,), 0, config.num_classes)


class _Training(NamedTuple):
    """The parts of a train step."""

    config: models.ModelConfig
    optimizer: Any
    step: Any
    sampler: Any
    driver: Any
    batch_size: int

    def init_state(self, seed: int = 0) -> Any:
        """The state before the first step."""
        from capsjax import training

        _, variables = training.split_network(models.build(self.config, rngs=nnx.Rngs(seed)))
        return training.init_state(variables, self.optimizer)


def _training(workload: _Network, driver: str, devices: Sequence[jax.Device]) -> _Training:
    """Returns the parts of a network's train step, with shifted images."""
    # Imported here, because training needs packages that other workloads do not.
    from capsjax import training
    from capsjax.data import Sampler, Shifted
    from capsjax.training.objectives import LOSSES, choose_loss

    config, optimizer = workload.configure(), training.paper_optimizer()
    apply, _ = training.split_network(_abstract(config))
    objective = LOSSES[choose_loss(None, workload.preset, config)]
    batch_size = workload.batch * len(devices)
    on = training.make_driver(driver, batch_size=batch_size, devices=devices)
    step = training.make_train_step(apply, optimizer, objective, axis_name=on.axis_name)
    sampler = Sampler(Shifted(), config.num_classes)
    return _Training(config, optimizer, step, sampler, on, batch_size)


def _compiled_step(workload: _Network, driver: str, devices: Sequence[jax.Device]) -> JaxFunction:
    """Returns the step of training as this driver compiles it."""
    from capsjax.data import Batch
    from capsjax.training.programs import make_step

    parts = _training(workload, driver, devices)
    on, batch_size = parts.driver, parts.batch_size
    step = make_step(parts.step, parts.sampler, on, batch_size=batch_size)
    compiled = on.compile(step, donate=True)
    # The driver's result binds the argument that pmap maps over; compiling needs it.
    function, bound = getattr(compiled, "func", compiled), getattr(compiled, "args", ())

    def make_arguments() -> tuple[Any, ...]:
        # Only as many examples as a device needs: a call of many steps converts the layout of the
        # data set once, but here each call would.
        examples = Batch(*_make_batch(workload.batch, parts.config))
        order = jnp.arange(batch_size) % workload.batch
        return *bound, parts.init_state(), examples, order, jax.random.key(0)

    arguments = jax.eval_shape(make_arguments)
    if len(devices) == 1:
        arguments = placed(arguments, devices[0])
    return JaxFunction(
        function, arguments, make_arguments, donated=len(bound), devices=len(devices)
    )
