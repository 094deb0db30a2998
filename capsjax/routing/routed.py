"""What every routing function returns."""

from typing import NamedTuple

import jax
from jax import export


class Routed(NamedTuple):
    """Parent capsules and how the children were assigned to them.

    Attributes:
      poses: parent poses, ``[..., J, D]``.
      activations: probability that each parent is present, ``[..., J]``.
      coupling: share of each child that goes to each parent, ``[..., I, J]``; None from
        :func:`capsjax.dense_capsules` and the layers over it, unless their implementation is
        ``"reference"``.
    """

    poses: jax.Array
    activations: jax.Array
    coupling: jax.Array | None


# Without this an exported function that returns one could be called, but not stored.
export.register_namedtuple_serialization(Routed, serialized_name="capsjax.Routed")
