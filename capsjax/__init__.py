"""Capsule networks for JAX.

The pure functions of :mod:`capsjax.ops` and :mod:`capsjax.routing` are names of this module; layers
are in :mod:`capsjax.nn`, whole networks in :mod:`capsjax.models`, data sets in
:mod:`capsjax.data`, training in :mod:`capsjax.training`. All of them are imported when first used,
so that a command that only prints its help does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from capsjax.version import __version__

if TYPE_CHECKING:
    from capsjax import bench, data, errors, models, nn, ops, reproduce, routing, training, viz
    from capsjax.models import load_pretrained
    from capsjax.ops import *
    from capsjax.routing import *

_ROOMS = (
    "bench",
    "data",
    "errors",
    "models",
    "nn",
    "ops",
    "reproduce",
    "routing",
    "training",
    "viz",
)


def __getattr__(name: str) -> Any:
    """Imports a room, or one of the names that this module takes from them."""
    if name in _ROOMS:
        return importlib.import_module(f"capsjax.{name}")
    if name == "load_pretrained":
        return __getattr__("models").load_pretrained
    ops, routing = __getattr__("ops"), __getattr__("routing")
    if name == "__all__":
        own = ("__version__", "load_pretrained", "nn", "routing")
        return sorted({*own, *ops.__all__, *routing.__all__})
    for room in (ops, routing):
        if name in room.__all__:
            globals()[name] = getattr(room, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *__getattr__("__all__")})
