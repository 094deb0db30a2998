"""What is compiled: named workloads with parameters, and functions of the user's own.

A workload is a dataclass: its fields are the parameters, its ``build`` makes the function and the
shapes of its arguments. Nothing is computed until a program is run.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args, get_type_hints

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

from capsjax import routing
from capsjax.ops import dense_votes, squash
from capsjax.routing import Routed
from capsjax.routing._passes import Passes
from capsjax.routing.fused import Implementation
from capsjax.routing.trace import traced

Direction = Literal["forward", "gradient"]
LoopForm = Literal["fori_loop", "scan", "unrolled"]
Algorithm = Literal[
    "dynamic",
    "em",
    "self",
    "attention",
    "variational",
    "heinsen",
    "efficient",
    "kmeans",
    "uniform",
    "random",
]
Dtype = Literal["float32", "bfloat16"]

_DTYPES = {"f": "float", "bf": "bfloat", "i": "int", "u": "uint"}


class WorkloadError(ValueError):
    """A workload or a parameter is unknown, or they do not go together; one line."""


class Built(NamedTuple):
    """A function to compile.

    Attributes:
      function: what ``jax.jit`` or ``jax.pmap`` returns.
      arguments: shapes of its arguments, with the devices where they lie.
      donated: whether the first argument's memory is given to the results.
      devices: number of devices that the program runs on.
    """

    function: Any
    arguments: tuple[Any, ...]
    donated: bool = False
    devices: int = 1


class Workload(Protocol):
    """A frozen dataclass whose fields are the parameters."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function for these devices; most workloads use the first alone."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squash:
    """The squash of capsules ``[batch, capsules, features]``."""

    batch: int = 128
    capsules: int = 1152
    features: int = 8
    direction: Direction = "forward"
    dtype: Dtype = "float32"

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function."""
        shape = (self.batch, self.capsules, self.features)
        return _one_device(_directed(squash, self.direction), devices, (shape,), self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Votes and their routing; sizes are those of the paper's class capsules.

    ``loop`` is the form of the loop over the iterations: as the algorithm has it (``fori_loop``), a
    ``lax.scan``, or unrolled in Python. ``implementation`` is that of ``dense_capsules``.
    """

    algorithm: Algorithm = "dynamic"
    iterations: int = 3
    loop: LoopForm = "fori_loop"
    implementation: str = "reference"
    direction: Direction = "forward"
    batch: int = 128
    children: int = 1152
    in_features: int = 8
    parents: int = 10
    features: int = 16
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Checks that there is such a form of such an algorithm."""
        names = get_args(Implementation) if self.algorithm == "dynamic" else ("reference",)
        if self.implementation not in names:
            raise WorkloadError(
                f"implementation of {self.algorithm!r} must be {_either(names)}, got"
                f" {self.implementation!r}"
            )
        iterates = self.algorithm in traced() and self.implementation == "reference"
        if self.loop != "fori_loop" and not iterates:
            raise WorkloadError(
                f"loop must be 'fori_loop' for algorithm {self.algorithm!r} with implementation"
                f" {self.implementation!r}, got {self.loop!r}"
            )
        if self.iterations != 3 and not routing.algorithm(self.algorithm).iterates:
            raise WorkloadError(f"algorithm {self.algorithm!r} has no iterations to choose")

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function."""
        shapes: dict[str, tuple[int, ...]] = {
            "poses": (self.batch, self.children, self.in_features)
        }
        sizes = (self.children, self.in_features, self.parents, self.features)
        record = routing.algorithm(self.algorithm)
        if not record.makes_votes:
            shapes["weights"] = sizes
        shapes |= {n: p.shape for n, p in record.parameters(routing.Sizes(*sizes)).items()}
        function = _directed(functools.partial(self._route, tuple(shapes)), self.direction)
        return _one_device(function, devices, tuple(shapes.values()), self.dtype)

    def _route(self, names: tuple[str, ...], *arrays: jax.Array) -> jax.Array:
        given: dict[str, Any] = dict(zip(names, arrays, strict=True))
        poses, weights = given.pop("poses"), given.pop("weights", None)
        record = routing.algorithm(self.algorithm)
        if record.iterates:
            given["num_iterations"] = self.iterations
        if record.fused is not None and self.implementation != "reference":
            return record.fused(poses, weights, implementation=self.implementation, **given).poses
        votes = None if weights is None else dense_votes(poses, weights)
        children = routing.Children(poses)
        if self.loop == "fori_loop":
            return record.route(votes, children, given).poses
        assert record.passes is not None  # checked above
        del given["num_iterations"]
        return self._looped(record.passes(votes, **record.keyword_arguments(children, given))).poses

    def _looped(self, passes: Passes) -> Routed:
        """The same passes as the algorithm makes, in another form of the loop."""
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
    """Layers of class capsules one upon the other, each with dynamic routing."""

    layers: int = 2
    iterations: int = 3
    loop: LoopForm = "fori_loop"
    direction: Direction = "gradient"
    batch: int = 32
    capsules: int = 32
    features: int = 16

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function."""
        layer = Routing(iterations=self.iterations, loop=self.loop)
        shape = (self.capsules, self.features, self.capsules, self.features)

        def stacked(poses: jax.Array, *weights: jax.Array) -> jax.Array:
            for each in weights:
                poses = layer._route(("poses", "weights"), poses, each)
            return poses

        shapes = ((self.batch, self.capsules, self.features), *[shape] * self.layers)
        return _one_device(_directed(stacked, self.direction), devices, shapes, "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HotOS:
    """The convolutional-capsule primitive of Barham and Isard (HotOS 2019).

    Poses ``[batch, channels, size, size, 4, 4]`` and weights ``[channels, out, 3, 3, 4, 4]``, with
    stride 2: ``V[n,o,x,y] = sum over c, i, j of P[n,c,2x+i,2y+j] · W[c,o,i,j]``, a sum of products
    of 4 x 4 matrices.
    """

    formulation: Literal["einsum", "patches", "conv", "shifts"] = "einsum"
    direction: Direction = "forward"
    batch: int = 8
    channels: int = 32
    out: int = 32
    size: int = 15

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function."""
        from capsjax.bench import hotos

        function = _directed(hotos.FORMULATIONS[self.formulation], self.direction)
        shapes = hotos.shapes(self.batch, self.channels, self.out, self.size)
        return _one_device(function, devices, shapes, "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """A whole network on a batch of images."""

    preset: str = "small"
    batch: int = 128
    implementation: str = ""
    dtype: Dtype = "float32"

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function."""
        from capsjax.training import split_network

        network = _abstract_network(self.preset, self.implementation, self.dtype)
        apply, variables = split_network(network)
        images = jax.ShapeDtypeStruct((self.batch, *network.config.image_shape), jnp.float32)

        def forward(variables: Any, images: jax.Array) -> Any:
            return apply(variables, images)[0]

        return Built(jax.jit(forward), _placed((variables, images), devices[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """The train step of a network on one device, its state donated."""

    preset: str = "small"
    batch: int = 128
    implementation: str = ""
    dtype: Dtype = "float32"

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function."""
        step, state, batch, key = _train_step(self, None)
        function = jax.jit(step, donate_argnums=0)
        return Built(function, _placed((state, batch, key), devices[0]), donated=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmappedTrainingStep:
    """The train step mapped over all devices of the target; ``batch`` is that of each device."""

    preset: str = "small"
    batch: int = 128
    implementation: str = ""
    dtype: Dtype = "float32"

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Makes the function."""
        step, state, batch, key = _train_step(self, "batch")
        number = len(devices)
        function = jax.pmap(
            step,
            axis_name="batch",
            in_axes=(None, 0, None),
            out_axes=None,
            devices=list(devices),
            donate_argnums=0,
        )
        parts = jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape), x.dtype), batch)
        return Built(function, (state, parts, key), donated=True, devices=number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A jittable function ``module:function`` with the shapes of its arguments."""

    function: str
    shapes: str = ""

    def build(self, devices: Sequence[jax.Device]) -> Built:
        """Imports the function; the working directory may hold its module."""
        function = import_function(self.function)
        arguments = tuple(parse_shape(shape) for shape in self.shapes.split())
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        return Built(jitted, _placed(arguments, devices[0]))


WORKLOADS: dict[str, type] = {
    "squash": Squash,
    "routing": Routing,
    "stack": Stack,
    "hotos": HotOS,
    "forward": Forward,
    "train_step": TrainingStep,
    "pmap_train_step": PmappedTrainingStep,
}


def make_workload(name: str, parameters: Mapping[str, Any]) -> Workload:
    """Returns a workload with parameters, which may be text.

    Args:
      name: one of ``squash``, ``routing``, ``stack``, ``hotos``, ``hotos_gcc``, ``forward``,
        ``train_step``, ``pmap_train_step``; or ``module:function``, with the parameter ``shapes``.
      parameters: values by name; the others are the defaults.

    Raises:
      WorkloadError: the name, a parameter or its value is unknown.

    Example:
      >>> from capsjax.bench import make_workload
      >>> make_workload("routing", {"iterations": "5", "loop": "scan"}).iterations
      5
    """
    if ":" in name:
        return UserFunction(function=name, **_converted(UserFunction, name, parameters))
    if name not in workloads():
        raise WorkloadError(f"workload must be {_either(workloads())}, got {name!r}")
    kind = workloads()[name]
    made: Workload = kind(**_converted(kind, name, parameters))
    return made


def workloads() -> dict[str, type]:
    """Workloads by name."""
    from capsjax.bench.gcc import GccHotOS

    return {**WORKLOADS, "hotos_gcc": GccHotOS}


def import_function(name: str) -> Callable[..., Any]:
    """Imports ``module:function``.

    Raises:
      WorkloadError: there is no such module or function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module does
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkloadError(f"workload {name!r}: {said}") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise WorkloadError(f"workload {name!r}: module {module!r} has no function {attribute!r}")
    return function


def parse_shape(text: str) -> jax.ShapeDtypeStruct:
    """Returns the shape of ``float32[128,784]``; ``f32``, ``bf16``, ``i32`` and ``u8`` will do.

    Raises:
      WorkloadError: it is none.

    Example:
      >>> from capsjax.bench.workloads import parse_shape
      >>> parse_shape("bf16[2,3]").shape
      (2, 3)
    """
    short = re.sub(r"^(f|bf|i|u)(?=\d)", lambda m: _DTYPES[m[1]], text)
    found = re.fullmatch(r"(\w+)\[([\d,]*)\]", short)
    if found is None:
        raise WorkloadError(f"shape must be like f32[128,784], got {text!r}")
    sizes = tuple(int(size) for size in found[2].split(",") if size)
    try:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(found[1]))
    except TypeError:
        raise WorkloadError(f"shape {text!r} has no dtype that jax knows") from None


def _converted(kind: type, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the types of the dataclass' fields."""
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for parameter, value in parameters.items():
        if parameter not in known:
            raise WorkloadError(f"workload {name!r} has {_either(known)}, no {parameter!r}")
        choices = get_args(hints[parameter])
        if choices and value not in choices:
            raise WorkloadError(f"{parameter} must be {_either(choices)}, got {value!r}")
        if hints[parameter] is int:
            value = _positive(parameter, value)
        values[parameter] = value
    return values


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise WorkloadError(f"{name} must be a positive integer, got {value!r}")
    return number


def _either(names: Any) -> str:
    return f"one of {', '.join(map(str, names))}"


def _directed(function: Callable[..., Any], direction: Direction) -> Callable[..., Any]:
    """The function, or with the gradients of all its arguments for a given one of its result."""
    if direction == "forward":
        return function

    def gradient(*arguments: jax.Array) -> Any:
        result, pull_back = jax.vjp(function, *arguments)
        return result, pull_back(jnp.ones_like(result))

    return gradient


def _one_device(
    function: Callable[..., Any],
    devices: Sequence[jax.Device],
    shapes: Sequence[tuple[int, ...]],
    dtype: str,
) -> Built:
    arguments = tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes)
    return Built(jax.jit(function), _placed(arguments, devices[0]))


def _placed(tree: Any, device: jax.Device) -> Any:
    """The same shapes on a device, which may be one that is not there."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _abstract_network(preset: str, implementation: str, dtype: str) -> Any:
    from flax import nnx

    from capsjax import models

    overrides: dict[str, Any] = {"dtype": dtype}
    if implementation:
        overrides["implementation"] = implementation
    return nnx.eval_shape(lambda: models.create(preset, rngs=nnx.Rngs(0), **overrides))


def _train_step(workload: TrainingStep | PmappedTrainingStep, axis_name: str | None) -> Any:
    """The step, and the shapes of its state, batch and key."""
    from capsjax.data import Batch, Sampler, Shifted
    from capsjax.training import init_state, make_train_step, paper_optimizer, split_network
    from capsjax.training.objectives import LOSSES, choose_loss

    network = _abstract_network(workload.preset, workload.implementation, workload.dtype)
    apply, variables = split_network(network)
    config, optimizer = network.config, paper_optimizer()
    objective = LOSSES[choose_loss(None, workload.preset, config)]
    train_step = make_train_step(apply, optimizer, objective, axis_name=axis_name)
    sampler, indices = Sampler(Shifted(), config.num_classes), jnp.arange(workload.batch)

    def step(state: Any, batch: Batch, key: jax.Array) -> Any:
        first = 0 if axis_name is None else lax.axis_index(axis_name) * workload.batch
        return train_step(state, sampler.train(batch, key, first + indices, indices))

    state = jax.eval_shape(lambda variables: init_state(variables, optimizer), variables)
    images = jax.ShapeDtypeStruct((workload.batch, *config.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((workload.batch,), jnp.int32)
    batch = jax.eval_shape(Batch, images, labels)
    return step, state, batch, jax.eval_shape(lambda: jax.random.key(0))
