"""The result of routing."""

from typing import NamedTuple

import jax
from jax import export


class Routed(NamedTuple):
    """The result of a routing function.

    Attributes:
      poses: parent poses, ``[..., J, D]``.
      activations: probability that each parent is present, ``[..., J]``.
      coupling: share of each child that goes to each parent, ``[..., I, J]``; None from
        :func:`capsjax.dense_capsules` and the layers that use it, unless their implementation is
        ``"reference"``.
    """

    poses: jax.Array
    activations: jax.Array
    coupling: jax.Array | None


# Without this, an exported function that returns one could not be stored.
export.register_namedtuple_serialization(Routed, serialized_name="capsjax.Routed")
