"""Votes and dynamic routing, one implementation beside the other."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from capsjax.bench.measurement import Measurement, compile_for, timed
from capsjax.bench.targets import parse_target
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


def benchmark_routing(
    sizes: RoutingSizes, *, rounds: int = 7, target: str | None = None
) -> list[Measurement]:
    """Measures every implementation of :func:`capsjax.dense_capsules`.

    Args:
      sizes: of the layer.
      rounds: counted calls of each program, in alternation.
      target: what to compile for, see :func:`capsjax.bench.parse_target`; None is the default
        device. Programs for a device that is not in this machine are compiled and not called.

    Returns:
      A :class:`Measurement` for each direction and implementation, the reference first.

    Raises:
      TargetError: this machine cannot serve the target.
      ValueError: there are no rounds.

    Example:
      >>> from capsjax.bench import RoutingSizes, benchmark_routing
      >>> rows = benchmark_routing(RoutingSizes(batch=2, children=32), rounds=1)
      >>> [row.name for row in rows if row.kind == "forward"]
      ['reference', 'blocked', 'pallas_tpu', 'pallas_gpu']
    """
    place = parse_target(target or jax.default_backend())
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(sizes.dtype)
    poses = squash(jax.random.normal(keys[0], (sizes.batch, sizes.children, sizes.in_features)))
    shape = (sizes.children, sizes.in_features, sizes.parents, sizes.features)
    weights = 0.1 * jax.random.normal(keys[1], shape)
    gradient = jax.random.normal(keys[2], (sizes.batch, *shape[2:]))
    arguments = [x.astype(dtype) for x in (poses, weights, gradient)]
    rows = []
    for direction in get_args(Direction):
        programs = [
            compile_for(
                place, direction, name, _function(name, direction, sizes.num_iterations), arguments
            )
            for name in get_args(Implementation)
        ]
        found = [program.measurement for program in programs]
        calls = {
            program.measurement.name: functools.partial(program.call, *arguments)
            for program in programs
            if not program.measurement.reason and not place.is_absent
        }
        rows += timed(calls, found, rounds=rounds)
    return rows


def _function(
    implementation: Implementation, direction: Direction, num_iterations: int
) -> Callable[..., Any]:
    def forward(poses: jax.Array, weights: jax.Array) -> jax.Array:
        return dense_capsules(
            poses, weights, num_iterations=num_iterations, implementation=implementation
        ).poses

    def backward(poses: jax.Array, weights: jax.Array, gradient: jax.Array) -> Any:
        v, pull_back = jax.vjp(forward, poses, weights)
        return v, pull_back(gradient)

    return (
        backward if direction == "gradient" else lambda poses, weights, _: forward(poses, weights)
    )
