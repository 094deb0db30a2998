"""Votes and dynamic routing, one implementation beside the other (floor 5)."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from capsjax.bench.timing import Times, alternate
from capsjax.ops import squash
from capsjax.routing.fused import Implementation, dense_capsules

Direction = Literal["forward", "gradient"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingSizes:
    """Sizes of a layer of class capsules; those of the paper's network if not given."""

    batch: int = 128
    """Examples, B."""

    children: int = 1152
    """Child capsules, I."""

    in_features: int = 8
    """Dimensions of a child's pose, K."""

    parents: int = 10
    """Parent capsules, J."""

    features: int = 16
    """Dimensions of a parent's pose, D."""

    num_iterations: int = 3
    """Routing iterations."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of poses and weights."""

    def __post_init__(self) -> None:
        """Checks that all sizes are positive."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")


class RoutingRow(NamedTuple):
    """What was measured of one implementation in one direction.

    Attributes:
      implementation: its name.
      direction: forward, or with the gradients of poses and weights.
      compile_seconds: time to trace, lower and compile, once.
      times: of the compiled program.
      temporary_bytes: memory that it takes beside arguments and results; -1 where the compiler
        does not tell.
    """

    implementation: str
    direction: Direction
    compile_seconds: float
    times: Times
    temporary_bytes: int


def benchmark_routing(sizes: RoutingSizes, *, rounds: int = 7) -> list[RoutingRow]:
    """Measures every implementation of :func:`capsjax.dense_capsules` on the default device.

    Args:
      sizes: of the layer.
      rounds: counted calls of each program, in alternation.

    Returns:
      A row for each implementation and direction, the reference first.

    Raises:
      ValueError: there are no rounds.

    Example:
      >>> from capsjax.bench import RoutingSizes, benchmark_routing
      >>> rows = benchmark_routing(RoutingSizes(batch=2, children=32), rounds=1)
      >>> [row.implementation for row in rows if row.direction == "forward"]
      ['reference', 'blocked']
    """
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(sizes.dtype)
    poses = squash(jax.random.normal(keys[0], (sizes.batch, sizes.children, sizes.in_features)))
    shape = (sizes.children, sizes.in_features, sizes.parents, sizes.features)
    weights = 0.1 * jax.random.normal(keys[1], shape)
    gradient = jax.random.normal(keys[2], (sizes.batch, *shape[2:]))
    poses, weights, gradient = (x.astype(dtype) for x in (poses, weights, gradient))
    rows = []
    for direction in get_args(Direction):
        made = {}
        for implementation in get_args(Implementation):
            function = _function(implementation, direction, sizes.num_iterations, gradient)
            start = time.perf_counter()
            program = jax.jit(function).lower(poses, weights).compile()
            made[implementation] = program, time.perf_counter() - start
        times = alternate(
            {
                name: functools.partial(program, poses, weights)
                for name, (program, _) in made.items()
            },
            rounds=rounds,
        )
        for name, (program, seconds) in made.items():
            memory = getattr(program.memory_analysis(), "temp_size_in_bytes", -1)
            rows.append(RoutingRow(name, direction, seconds, times[name], memory))
    return rows


def _function(
    implementation: Implementation, direction: Direction, num_iterations: int, gradient: jax.Array
) -> Callable[..., Any]:
    def forward(poses: jax.Array, weights: jax.Array) -> jax.Array:
        return dense_capsules(
            poses, weights, num_iterations=num_iterations, implementation=implementation
        ).poses

    def backward(poses: jax.Array, weights: jax.Array) -> Any:
        v, pull_back = jax.vjp(forward, poses, weights)
        return v, pull_back(gradient)

    return forward if direction == "forward" else backward
