"""Where programs run: pmap over devices, jit over a sharded mesh, or jit on one device.

A driver hides two differences between them: how a function of replicated arguments is compiled, and
which part of a batch one execution of it works on. All other code is shared.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capsjax.ops._checks import as_integer, check_choice

AXIS = "batch"
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Driver(abc.ABC):
    """Compiles and feeds functions whose arguments are replicated over devices.

    Attributes:
      devices: the devices used.
      axis_name: name of the mapped axis inside a compiled function, or None.
      most_devices: largest number of devices; None for no limit.
    """

    axis_name: ClassVar[str | None] = None
    most_devices: ClassVar[int | None] = None
    devices: tuple[jax.Device, ...]

    @property
    def local_devices(self) -> tuple[jax.Device, ...]:
        """The devices of this process; all devices, also absent ones, if it is the only process."""
        if jax.process_count() == 1:
            return self.devices
        process = jax.process_index()
        return tuple(d for d in self.devices if d.process_index == process)

    def replicate(self, tree: Tree) -> Tree:
        """Copies arrays, which must be equal in all processes, to each device."""
        return _replicate(tree, self.sharding())

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns the sharding of the leading dimensions over these axes, replicated for none."""
        return _sharding(self.devices, *axes)

    def local_positions(self, batch_size: int) -> np.ndarray:
        """Returns the positions in the batch that this process's devices work on, int ``[b]``."""
        part, here = batch_size // len(self.devices), self.local_devices
        firsts = [n * part for n, device in enumerate(self.devices) if device in here]
        return (np.array(firsts)[:, None] + np.arange(part)).ravel()

    @abc.abstractmethod
    def place_chunk(self, chunk: Tree) -> Tree:
        """Places batches on the devices that work on them.

        Args:
          chunk: arrays ``[S, b, ...]`` of S batches, at the positions of :meth:`local_positions`.
        """

    @abc.abstractmethod
    def compile(
        self, function: Callable[..., Any], *, donate: bool = False, chunk: str | None = None
    ) -> Callable[..., Any]:
        """Compiles a function of replicated arguments and results.

        Args:
          function: a function of arrays. Where it sees the axis :attr:`axis_name`, its results must
            be equal on all devices.
          donate: whether the first argument's memory is given to the results.
          chunk: name of the argument that is not replicated but comes from :meth:`place_chunk`;
            the function sees the positions of :meth:`batch_positions`, ``[S, B, ...]``.
        """

    @abc.abstractmethod
    def batch_positions(self, batch_size: int) -> jax.Array:
        """Inside a compiled function, returns the positions in the batch to work on, int32."""

    @abc.abstractmethod
    def sum(self, tree: Tree) -> Tree:
        """Inside a compiled function, sums over the parts of the batch."""


class Jit(Driver):
    """One device, which processes the whole batch."""

    most_devices: ClassVar[int | None] = 1

    def place_chunk(self, chunk: Tree) -> Tree:
        """Shards each batch over the devices."""
        place = functools.partial(jax.make_array_from_process_local_data, self.sharding(None, AXIS))
        placed: Tree = jax.tree.map(place, chunk)
        return placed

    def compile(
        self, function: Callable[..., Any], *, donate: bool = False, chunk: str | None = None
    ) -> Callable[..., Any]:
        """Compiles one program for all devices."""
        return jax.jit(
            function, out_shardings=self.sharding(), donate_argnums=(0,) if donate else ()
        )

    def batch_positions(self, batch_size: int) -> jax.Array:
        """All positions."""
        return jnp.arange(batch_size)

    def sum(self, tree: Tree) -> Tree:
        """Returns the tree unchanged: the one program has summed over the whole batch."""
        return tree


class Shard(Jit):
    """One global program; the batch is sharded and the compiler inserts the communication."""

    most_devices: ClassVar[int | None] = None

    def batch_positions(self, batch_size: int) -> jax.Array:
        """All positions, sharded over the devices."""
        positions = super().batch_positions(batch_size)
        return jax.lax.with_sharding_constraint(positions, self.sharding(AXIS))


class Pmap(Driver):
    """The function is mapped over the devices and averages explicitly over a named axis."""

    axis_name = AXIS

    def place_chunk(self, chunk: Tree) -> Tree:
        """Places each device's part of every batch on it: ``[D, S, B / D, ...]`` over D devices."""
        local = self.local_devices
        sharding = _sharding(local, AXIS)

        def place(array: np.ndarray) -> jax.Array:
            parts = array.reshape(array.shape[0], len(local), -1, *array.shape[2:])
            return jax.device_put(parts.swapaxes(0, 1), sharding)

        placed: Tree = jax.tree.map(place, chunk)
        return placed

    def compile(
        self, function: Callable[..., Any], *, donate: bool = False, chunk: str | None = None
    ) -> Callable[..., Any]:
        """Compiles one program for each device; the results are on this process's devices."""

        # pmap needs a mapped argument; the state stays replicated and unstacked.
        @functools.wraps(function)
        def mapped(_: jax.Array, *arguments: Any) -> Any:
            return function(*arguments)

        parameters = inspect.signature(function).parameters
        compiled = jax.pmap(
            mapped,
            axis_name=AXIS,
            in_axes=(0, *[0 if name == chunk else None for name in parameters]),
            out_axes=None,
            devices=self.devices,
            donate_argnums=(1,) if donate else (),
        )
        return functools.partial(compiled, np.arange(len(self.local_devices)))

    def replicate(self, tree: Tree) -> Tree:
        """Copies arrays to each device of the process, laid out like :meth:`compile`'s results."""
        return _replicate(tree, _sharding(self.local_devices))

    def batch_positions(self, batch_size: int) -> jax.Array:
        """The positions of this device's part."""
        part = batch_size // len(self.devices)
        return jax.lax.axis_index(AXIS) * part + jnp.arange(part)

    def sum(self, tree: Tree) -> Tree:
        """Sums over the devices."""
        total: Tree = jax.lax.psum(tree, AXIS)
        return total


_DRIVERS: dict[str, type[Driver]] = {"pmap": Pmap, "jit": Jit, "shard": Shard}

if TYPE_CHECKING:
    DriverName = str
else:
    DriverName = Literal[tuple(_DRIVERS)]


def make_driver(
    name: str, *, batch_size: int | None = None, devices: Sequence[jax.Device] | None = None
) -> Driver:
    """Makes a driver.

    Args:
      name: ``"pmap"``, ``"jit"`` or ``"shard"``.
      batch_size: examples in the whole batch, which must be divisible by the number of devices; not
        checked when None.
      devices: the devices to use; when None, all devices of all processes, or the first device of
        this process for ``"jit"``.

    Returns:
      A :class:`Driver`.

    Raises:
      TypeError: `devices` is not a sequence of devices, or `batch_size` is not an integer.
      ValueError: the name is unknown, ``"jit"`` was given several devices, there is no device, or
        the batch cannot be divided among the devices.

    Example:
      >>> from capsjax.training import make_driver
      >>> len(make_driver("jit", batch_size=128).devices)
      1
    """
    check_choice("driver", name, _DRIVERS)
    kind = _DRIVERS[name]
    if devices is not None:
        chosen = _as_devices(devices)
    elif kind.most_devices is None:
        chosen = tuple(jax.devices())
    else:
        chosen = tuple(jax.local_devices()[: kind.most_devices])
    if kind.most_devices is not None and len(chosen) > kind.most_devices:
        raise ValueError(f"driver {name!r} runs on one device, got {len(chosen)}")
    if batch_size is not None and as_integer("batch_size", batch_size) % len(chosen):
        raise ValueError(
            f"batch_size must be divisible by the number of devices, {len(chosen)}, got"
            f" {batch_size}"
        )
    return kind(chosen)


def local(tree: Tree) -> Tree:
    """Returns one of this process's copies of replicated arrays, without communication."""
    first: Tree = jax.tree.map(lambda x: x.addressable_data(0), tree)
    return first


def _sharding(devices: Sequence[jax.Device], *axes: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(*axes))


def _replicate(tree: Tree, sharding: NamedSharding) -> Tree:
    placed: Tree
    if sharding.is_fully_addressable:
        placed = jax.device_put(tree, sharding)
        return placed
    devices = [d for d in sharding.mesh.devices.flat if d.process_index == jax.process_index()]

    def place(array: Any) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        # `device_put` would send the array to all processes to compare it.
        copies = [jax.device_put(array, device) for device in devices]
        return jax.make_array_from_single_device_arrays(copies[0].shape, sharding, copies)

    placed = jax.tree.map(place, tree)
    return placed


def _as_devices(devices: Any) -> tuple[jax.Device, ...]:
    if not isinstance(devices, Sequence) or not all(hasattr(d, "platform") for d in devices):
        raise TypeError(f"devices must be a sequence of devices, got {devices!r}")
    if not devices:
        raise ValueError("devices must hold at least one device, got none")
    return tuple(devices)
