"""Capsule functions as workloads: squash, votes and routing, stacked layers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from capsjax import routing
from capsjax.bench.sizes import CAPSULE_SIZES, CapsuleSizes
from capsjax.bench.workloads.workload import Direction, Dtype, JaxFunction, directed, on_one_device
from capsjax.errors import ConfigError
from capsjax.ops import dense_votes, squash
from capsjax.routing import Routed
from capsjax.routing._passes import Passes
from capsjax.routing.fused import Implementation

LoopForm = Literal["fori_loop", "scan", "unrolled"]
_PAPER = CAPSULE_SIZES["paper"]


def implementations() -> tuple[str, ...]:
    """Returns implementations of votes and routing; ``default`` depends on platform and shape."""
    return (*get_args(Implementation), "default")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squash:
    """The squash of capsules ``[batch, capsules, features]``."""

    batch: int = _PAPER.batch
    capsules: int = _PAPER.children
    features: int = _PAPER.in_features
    direction: Direction = "forward"
    dtype: Dtype = "float32"

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        shape = (self.batch, self.capsules, self.features)
        return on_one_device(directed(squash, self.direction), devices, (shape,), self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Votes and their routing.

    ``sizes`` names a row of :data:`capsjax.bench.CAPSULE_SIZES`; ``batch``, ``children`` and the
    others replace single sizes of it. ``loop`` is the form of the loop over the iterations: that of
    the algorithm (``fori_loop``), a ``lax.scan``, or unrolled in Python.
    """

    algorithm: Annotated[str, routing.algorithms] = "dynamic"
    iterations: int = 3
    loop: LoopForm = "fori_loop"
    implementation: Annotated[str, implementations] = "reference"
    direction: Direction = "forward"
    sizes: Annotated[str, CAPSULE_SIZES.keys] = "paper"
    batch: int | None = None
    children: int | None = None
    in_features: int | None = None
    parents: int | None = None
    features: int | None = None
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Checks that the algorithm has this form."""
        record = routing.algorithm(self.algorithm)
        names = implementations() if record.fused else ("reference",)
        if self.implementation not in names:
            raise ConfigError(
                f"implementation of {self.algorithm!r} must be one of {', '.join(names)}, got"
                f" {self.implementation!r}"
            )
        has_passes = record.passes is not None and self.implementation == "reference"
        if self.loop != "fori_loop" and not has_passes:
            raise ConfigError(
                f"loop must be 'fori_loop' for algorithm {self.algorithm!r} with implementation"
                f" {self.implementation!r}, got {self.loop!r}"
            )
        if self.iterations != 3 and not record.iterates:
            raise ConfigError(f"algorithm {self.algorithm!r} has no option iterations")

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        given = {name: getattr(self, name) for name in CapsuleSizes._fields}
        sizes = CAPSULE_SIZES[self.sizes]._replace(**{n: s for n, s in given.items() if s})
        record = routing.algorithm(self.algorithm)
        poses, weights = sizes.arguments()
        shapes = {"poses": poses.shape}
        if not record.makes_votes:
            shapes["weights"] = weights.shape
        shapes |= {name: p.shape for name, p in record.parameters(sizes.layer).items()}
        function = directed(functools.partial(self.route, tuple(shapes)), self.direction)
        return on_one_device(function, devices, tuple(shapes.values()), self.dtype)

    def route(self, names: tuple[str, ...], *arrays: jax.Array) -> jax.Array:
        """Returns the parents' poses from poses, weights and learned parameters."""
        given: dict[str, Any] = dict(zip(names, arrays, strict=True))
        poses, weights = given.pop("poses"), given.pop("weights", None)
        record = routing.algorithm(self.algorithm)
        if record.iterates:
            given["num_iterations"] = self.iterations
        if record.fused is not None and self.implementation != "reference":
            name = None if self.implementation == "default" else self.implementation
            return record.fused(poses, weights, implementation=name, **given).poses
        votes = None if weights is None else dense_votes(poses, weights)
        children = routing.Children(poses)
        if self.loop == "fori_loop":
            return record.route(votes, children, given).poses
        assert record.passes is not None  # checked above
        del given["num_iterations"]
        return self._looped(record.passes(votes, **record.keyword_arguments(children, given))).poses

    def _looped(self, passes: Passes) -> Routed:
        """Runs the passes of the algorithm in another form of loop."""
        last = self.iterations - 1
        carry = passes.first
        if self.loop == "scan":
            carry, _ = lax.scan(
                lambda carry, t: (passes.update(t, carry), None), carry, jnp.arange(last)
            )
        else:
            for t in range(last):
                carry = passes.update(jnp.int32(t), carry)
        return passes.finish(last, carry)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Stacked layers of class capsules, each with dynamic routing."""

    layers: int = 2
    iterations: int = 3
    loop: LoopForm = "fori_loop"
    direction: Direction = "gradient"
    batch: int = 32
    capsules: int = 32
    features: int = 16

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Makes the function."""
        layer = Routing(iterations=self.iterations, loop=self.loop)
        shape = (self.capsules, self.features, self.capsules, self.features)

        def stacked(poses: jax.Array, *weights: jax.Array) -> jax.Array:
            for each in weights:
                poses = layer.route(("poses", "weights"), poses, each)
            return poses

        shapes = ((self.batch, self.capsules, self.features), *[shape] * self.layers)
        return on_one_device(directed(stacked, self.direction), devices, shapes, "float32")
