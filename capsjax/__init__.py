"""Capsule networks for JAX.

The pure functions of :mod:`capsjax.ops` and :mod:`capsjax.routing` can be imported from here.
Layers are in :mod:`capsjax.nn`, networks in :mod:`capsjax.models`, data sets in
:mod:`capsjax.data`, and training in :mod:`capsjax.training`. All are imported on first use, so that
commands which only print their help start fast.
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
    """Imports a subpackage, or a name that this module exports from one."""
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
