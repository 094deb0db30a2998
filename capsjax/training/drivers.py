"""Where a program runs: pmap over devices, jit on one, or jit over a sharded mesh.

A driver hides two differences: how a function over replicated arguments is compiled, and which
part of a batch one run of that function works on. Everything else is the same code.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DriverName = Literal["pmap", "jit", "shard"]
AXIS = "batch"
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Driver:
    """Compiles and feeds functions whose arguments are replicated over devices.

    Attributes:
      name: ``"pmap"``: the function is mapped over the devices with a named axis, each device
        works on its part of the batch and averages explicitly. ``"shard"``: one global program,
        the batch is sharded over a mesh and the compiler inserts the communication. ``"jit"``:
        one device.
      devices: the devices used.
    """

    name: DriverName
    devices: tuple[jax.Device, ...]

    @property
    def axis_name(self) -> str | None:
        """The mapped axis inside of a compiled function, or None."""
        return AXIS if self.name == "pmap" else None

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,))

    def replicated(self) -> NamedSharding:
        """The sharding of every argument: a copy on each device."""
        return NamedSharding(self._mesh, PartitionSpec())

    def replicate(self, tree: Tree) -> Tree:
        """Copies arrays to each device, once."""
        placed: Tree = jax.device_put(tree, self.replicated())
        return placed

    def compile(self, function: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
        """Compiles a function of replicated arguments and results.

        Args:
          function: a function of arrays. Under pmap it sees the axis :attr:`axis_name`, and its
            results must be equal on all devices.
          donate: whether the first argument's memory is given to the results.
        """
        if self.name == "pmap":
            # pmap wants one argument that is mapped; the state stays replicated and unstacked.
            @functools.wraps(function)
            def mapped(_: jax.Array, first: Any, rest: tuple[Any, ...]) -> Any:
                return function(first, *rest)

            compiled = jax.pmap(
                mapped,
                axis_name=AXIS,
                in_axes=(0, None, None),
                out_axes=None,
                devices=self.devices,
                donate_argnums=(1,) if donate else (),
            )
            shards = np.arange(len(self.devices))
            return lambda first, *rest: compiled(shards, first, rest)
        return jax.jit(
            function, out_shardings=self.replicated(), donate_argnums=(0,) if donate else ()
        )

    def batch_positions(self, batch_size: int) -> jax.Array:
        """Inside of a compiled function: the positions in the batch to work on, int32."""
        if self.name == "pmap":
            part = batch_size // len(self.devices)
            return jax.lax.axis_index(AXIS) * part + jnp.arange(part)
        positions = jnp.arange(batch_size)
        if self.name == "shard":
            sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
            positions = jax.lax.with_sharding_constraint(positions, sharding)
        return positions

    def sum(self, tree: Tree) -> Tree:
        """Inside of a compiled function: sums over the parts of the batch."""
        total: Tree = jax.lax.psum(tree, AXIS) if self.name == "pmap" else tree
        return total


def make_driver(
    name: str, *, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> Driver:
    """Makes a driver for batches of a size.

    Args:
      name: ``"pmap"``, ``"jit"`` or ``"shard"``.
      batch_size: examples in the whole batch.
      devices: the devices to use; all of them, or the first for ``"jit"``, when None.

    Returns:
      A :class:`Driver`.

    Raises:
      ValueError: the name is unknown, ``"jit"`` was given several devices, or the batch cannot be
        divided among the devices.

    Example:
      >>> from capsjax.training import make_driver
      >>> make_driver("jit", batch_size=128).name
      'jit'
    """
    if name not in get_args(DriverName):
        raise ValueError(f"driver must be one of {', '.join(get_args(DriverName))}, got {name!r}")
    chosen = tuple(devices or (jax.devices()[:1] if name == "jit" else jax.devices()))
    if name == "jit" and len(chosen) != 1:
        raise ValueError(f"driver 'jit' runs on one device, got {len(chosen)}")
    if batch_size % len(chosen):
        raise ValueError(
            f"batch_size must be divisible by the number of devices, {len(chosen)}, got"
            f" {batch_size}"
        )
    return Driver(name, chosen)  # type: ignore[arg-type]
