"""Whole networks as workloads: prediction, and train steps on one device or on several."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsjax import models
from capsjax.bench.workloads.capsules import implementations
from capsjax.bench.workloads.workload import Dtype, JaxFunction, Peer, placed

# A plain step in PyTorch, which the train step is compared with.
_TORCH = ("torch", "torch.compile")


def _step_implementations() -> tuple[str, ...]:
    return (*implementations(), *_TORCH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Network:
    """Parameters that all workloads of networks have."""

    preset: Annotated[str, models.presets] = "small"
    batch: int = 128
    implementation: Annotated[str, implementations] = "default"
    dtype: Dtype = "float32"

    def configure(self) -> models.ModelConfig:
        """The configuration of the network."""
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
    """The train step of a network on one device, its state donated.

    The implementations ``torch`` and ``torch.compile`` are the paper's network as it is usually
    written in PyTorch, without the shifts of images that the others make.
    """

    implementation: Annotated[str, _step_implementations] = "default"

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction | Peer:
        """Makes the function."""
        if self.implementation in _TORCH:
            return self._torch(devices[0])
        step, make_arguments = _make_step(self)
        arguments = placed(jax.eval_shape(make_arguments), devices[0])
        return JaxFunction(jax.jit(step, donate_argnums=0), arguments, make_arguments, donated=True)

    def _torch(self, device: jax.Device) -> Peer:
        config, name = self.configure(), {"cpu": "cpu", "gpu": "cuda"}.get(device.platform)
        if importlib.util.find_spec("torch") is None:
            raise NotImplementedError("needs PyTorch, which is not installed: pip install torch")
        if name is None or not isinstance(config, models.CapsNetConfig):
            raise NotImplementedError("PyTorch takes part on cpu and gpu, with presets of CapsNet")
        from capsjax.bench.workloads.torch_step import make_step

        images, labels = (np.asarray(x) for x in _make_batch(self.batch, config))
        compiled = self.implementation == "torch.compile"

        def compile_step() -> Callable[[], float]:
            step = make_step(config, images, labels, compiled=compiled, device=name)
            step()  # PyTorch compiles in the first call
            return step

        return Peer(compile_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmappedTrainingStep(_Network):
    """The train step mapped over all devices of the target; ``batch`` is that of each device."""

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        step, make_one = _make_step(self, axis_name="batch")
        function = jax.pmap(
            step,
            axis_name="batch",
            in_axes=(None, 0, None),
            out_axes=None,
            devices=list(devices),
            donate_argnums=0,
        )

        def make_arguments() -> tuple[Any, ...]:
            state, batch, key = make_one()
            parts = jax.tree.map(lambda x: jnp.stack([x] * len(devices)), batch)
            return state, parts, key

        arguments = jax.eval_shape(make_arguments)
        return JaxFunction(function, arguments, make_arguments, donated=True, devices=len(devices))


def _abstract(config: models.ModelConfig) -> Any:
    """The network without values."""
    return nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))


def _make_batch(size: int, config: models.ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Random uint8 images and labels."""
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.randint(keys[0], (size, *config.image_shape), 0, 256, jnp.uint8)
    return images, jax.random.randint(keys[1], (size,), 0, config.num_classes)


def _make_step(
    workload: _Network, axis_name: str | None = None
) -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    """The train step, images shifted, and a function that makes its state, batch and key."""
    # Only here: what trains needs packages that other workloads do without.
    from capsjax.data import Batch, Sampler, Shifted
    from capsjax.training import init_state, make_train_step, paper_optimizer, split_network
    from capsjax.training.objectives import LOSSES, choose_loss

    config, optimizer = workload.configure(), paper_optimizer()
    apply, _ = split_network(_abstract(config))
    objective = LOSSES[choose_loss(None, workload.preset, config)]
    train_step = make_train_step(apply, optimizer, objective, axis_name=axis_name)
    sampler, indices = Sampler(Shifted(), config.num_classes), jnp.arange(workload.batch)

    def step(state: Any, batch: Batch, key: jax.Array) -> Any:
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * workload.batch
        return train_step(state, sampler.train(batch, key, first + indices, indices))

    def make_arguments() -> tuple[Any, ...]:
        _, variables = split_network(models.build(config, rngs=nnx.Rngs(0)))
        state = init_state(variables, optimizer)
        return state, Batch(*_make_batch(workload.batch, config)), jax.random.key(0)

    return step, make_arguments
