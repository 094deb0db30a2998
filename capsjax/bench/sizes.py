"""The table of sizes shared by benchmarks, tests and ahead-of-time compilation."""

from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from capsjax.routing import Sizes


class CapsuleSizes(NamedTuple):
    """Sizes of a batch of dense capsules.

    Attributes:
      batch: examples, B.
      children: child capsules, I.
      in_features: dimensions of a child's pose, K.
      parents: parent capsules, J.
      features: dimensions of a parent's pose, D.
    """

    batch: int
    children: int
    in_features: int
    parents: int
    features: int

    @property
    def layer(self) -> Sizes:
        """Sizes of the layer, without the batch."""
        return Sizes(self.children, self.in_features, self.parents, self.features)

    def reduced(self) -> "CapsuleSizes":
        """Returns sizes in the same proportions that are small enough for a test.

        Example:
          >>> from capsjax.bench import CAPSULE_SIZES
          >>> CAPSULE_SIZES["paper"].reduced()
          CapsuleSizes(batch=8, children=48, in_features=4, parents=5, features=8)
        """
        divisors = CapsuleSizes(batch=16, children=24, in_features=2, parents=2, features=2)
        return CapsuleSizes(*(-(-size // by) for size, by in zip(self, divisors, strict=True)))

    def arguments(self, dtype: str = "float32") -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of poses ``[B, I, K]`` and weights ``[I, K, J, D]``.

        Example:
          >>> import jax
          >>> import capsjax
          >>> from capsjax.bench import CAPSULE_SIZES
          >>> poses, weights = CAPSULE_SIZES["small"].arguments()
          >>> jax.eval_shape(capsjax.dense_capsules, poses, weights).poses.shape
          (128, 10, 16)
        """
        shapes = (self.batch, self.children, self.in_features), tuple(self.layer)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes)


CAPSULE_SIZES = MappingProxyType(
    {
        "paper": CapsuleSizes(128, 1152, 8, 10, 16),
        "small": CapsuleSizes(128, 144, 16, 10, 16),
        "many_parents": CapsuleSizes(64, 1152, 8, 100, 16),
        "many_children": CapsuleSizes(4, 36_864, 8, 10, 16),
        "one_example": CapsuleSizes(1, 1152, 8, 10, 16),
        "large_batch": CapsuleSizes(512, 1152, 8, 10, 16),
    }
)
