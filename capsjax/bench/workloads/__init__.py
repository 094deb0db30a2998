"""Workloads: named ones with parameters, and the user's own functions."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp

from capsjax.bench.workloads.capsules import Routing, Squash, Stack
from capsjax.bench.workloads.convolutions import Convolution
from capsjax.bench.workloads.gcc import GccHotOS
from capsjax.bench.workloads.hotos import HotOS
from capsjax.bench.workloads.networks import (
    Forward,
    PmappedTrainingStep,
    TrainingStep,
    TrainingSteps,
)
from capsjax.bench.workloads.workload import JaxFunction, Workload, placed
from capsjax.errors import ConfigError

WORKLOADS: Mapping[str, type] = MappingProxyType(
    {
        "squash": Squash,
        "routing": Routing,
        "stack": Stack,
        "hotos": HotOS,
        "hotos_gcc": GccHotOS,
        "convolution": Convolution,
        "forward": Forward,
        "train_step": TrainingStep,
        "train_steps": TrainingSteps,
        "pmap_train_step": PmappedTrainingStep,
    }
)
_DTYPES = {"f": "float", "bf": "bfloat", "i": "int", "u": "uint"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A jittable function ``module:function`` with the shapes of its arguments."""

    function: str
    shapes: str = ""

    def __post_init__(self) -> None:
        self._arguments()  # raises if a shape is wrong

    def _arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(parse_shape(shape) for shape in self.shapes.split())

    def build(self, devices: Sequence[jax.Device]) -> JaxFunction:
        """Imports the function; the working directory may hold its module."""
        function = import_function(self.function)
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        return JaxFunction(jitted, placed(self._arguments(), devices[0]))


def make_workload(name: str, parameters: Mapping[str, Any]) -> Workload:
    """Returns a workload.

    Args:
      name: a key of :data:`capsjax.bench.WORKLOADS`; or ``module:function``, with the parameter
        ``shapes``.
      parameters: values by name, which may be text; the others take their defaults.

    Raises:
      ConfigError: the name, a parameter or its value is unknown.

    Example:
      >>> from capsjax.bench import make_workload
      >>> make_workload("routing", {"iterations": "5", "loop": "scan"}).iterations
      5
    """
    if ":" in name:
        return UserFunction(function=name, **_converted(UserFunction, name, parameters))
    kind = _kind(name)
    made: Workload = kind(**_converted(kind, name, parameters))
    return made


def choices(name: str, parameter: str) -> tuple[str, ...]:
    """Returns the values that a parameter can take; empty if it is a number.

    Raises:
      ConfigError: the workload or the parameter is unknown.

    Example:
      >>> from capsjax.bench.workloads import choices
      >>> choices("routing", "loop")
      ('fori_loop', 'scan', 'unrolled')
    """
    kind = _kind(name)
    _check_parameter(kind, name, parameter)
    return _choices(get_type_hints(kind, include_extras=True)[parameter])


def import_function(name: str) -> Callable[..., Any]:
    """Imports ``module:function``.

    Raises:
      ConfigError: there is no such module or function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except SystemExit as error:
        raise ConfigError(f"workload {name!r}: module {module!r} calls sys.exit") from error
    except Exception as error:  # whatever the user's module does
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"workload {name!r}: {message}") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ConfigError(f"workload {name!r}: module {module!r} has no function {attribute!r}")
    return function


def parse_shape(text: str) -> jax.ShapeDtypeStruct:
    """Parses a shape such as ``float32[128,784]``, or with ``f32``, ``bf16``, ``i32`` or ``u8``.

    Raises:
      ConfigError: the text is not of this form, or has a dtype that jax does not know or enable.

    Example:
      >>> from capsjax.bench.workloads import parse_shape
      >>> parse_shape("bf16[2,3]").shape
      (2, 3)
    """
    short = re.sub(r"^(f|bf|i|u)(?=\d)", lambda m: _DTYPES[m[1]], text)
    found = re.fullmatch(r"(\w+)\[([\d,]*)\]", short)
    if found is None:
        raise ConfigError(f"shape must be like f32[128,784], got {text!r}")
    sizes = tuple(int(size) for size in found[2].split(",") if size)
    try:
        dtype = jnp.dtype(found[1])
    except TypeError:
        raise ConfigError(f"shape {text!r} has no dtype that jax knows") from None
    if (narrow := jax.dtypes.canonicalize_dtype(dtype)) != dtype:
        raise ConfigError(f"shape {text!r} would be {narrow}: set JAX_ENABLE_X64=1 for {dtype}")
    return jax.ShapeDtypeStruct(sizes, dtype)


def _kind(name: str) -> type:
    if name not in WORKLOADS:
        raise ConfigError(f"workload must be {_one_of(WORKLOADS)}, got {name!r}")
    return WORKLOADS[name]


def _check_parameter(kind: type, name: str, parameter: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    if parameter not in known:
        only = ", ".join(known)
        raise ConfigError(f"workload {name!r} has no parameter {parameter!r}, only {only}")


def _converted(kind: type, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Converts parameters to the types of the dataclass's fields."""
    hints = get_type_hints(kind, include_extras=True)
    values = {}
    for parameter, value in parameters.items():
        _check_parameter(kind, name, parameter)
        known = _choices(hints[parameter])
        if known and value not in known:
            raise ConfigError(f"{parameter} must be {_one_of(known)}, got {value!r}")
        if hints[parameter] in (int, int | None):
            value = _positive(parameter, value)
        values[parameter] = value
    return values


def _choices(hint: Any) -> tuple[str, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    # These names are looked up on demand, because more can be registered.
    return tuple(hint.__metadata__[0]()) if get_origin(hint) is Annotated else ()


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
    return number


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"
