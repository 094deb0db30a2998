"""The interface of workloads: parameters, from which function and argument shapes are built."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

Direction = Literal["forward", "gradient"]
Dtype = Literal["float32", "bfloat16"]


class JaxFunction(NamedTuple):
    """A function for XLA to compile.

    Attributes:
      function: a function returned by ``jax.jit`` or ``jax.pmap``.
      arguments: shapes of its arguments, with their shardings.
      make_arguments: makes arguments of these shapes; when None, they are random numbers.
      donated: position of the donated argument, or None. The first result replaces it in the next
        call.
      devices: number of devices that the program runs on.
    """

    function: Any
    arguments: tuple[Any, ...]
    make_arguments: Callable[[], tuple[Any, ...]] | None = None
    donated: int | None = None
    devices: int = 1


class Peer(NamedTuple):
    """A program of another compiler, for comparison.

    Attributes:
      compile: compiles the program and returns a call without arguments.
      flops: floating-point operations of a call, or None if unknown.
      argument_bytes: size of its arguments, or None if unknown.
      command: the compiler's command line, if there is one.
    """

    compile: Callable[[], Callable[[], Any]]
    flops: float | None = None
    argument_bytes: int | None = None
    command: str | None = None


class Workload(Protocol):
    """A frozen dataclass whose fields are the parameters."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction | Peer:
        """Makes the function for these devices; most workloads use only the first."""
        ...


def directed(function: Callable[..., Any], direction: Direction) -> Callable[..., Any]:
    """Returns the function, or one that adds the gradients of all arguments to its result."""
    if direction == "forward":
        return function

    def gradient(*arguments: jax.Array) -> Any:
        result, pull_back = jax.vjp(function, *arguments)
        return result, pull_back(jnp.ones_like(result))

    return gradient


def on_one_device(
    function: Callable[..., Any],
    devices: Sequence[jax.Device],
    shapes: Sequence[tuple[int, ...]],
    dtype: str,
) -> JaxFunction:
    """Returns a jitted function of arrays on the first device."""
    arguments = tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes)
    return JaxFunction(jax.jit(function), placed(arguments, devices[0]))


def placed(tree: Any, device: jax.Device) -> Any:
    """Returns the same shapes on a device, which may be absent."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
