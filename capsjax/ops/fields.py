"""Receptive fields of a kernel on a grid."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]

# With this many channels, copying in two steps costs more than it saves in compilation.
_MANY_CHANNELS = 8


def channels_last(num_spatial_dims: int) -> lax.ConvDimensionNumbers:
    """The layout of images ``[B, H, W, C]`` and kernels ``[KH, KW, C, O]``."""
    spatial = tuple(range(num_spatial_dims))
    image = (0, num_spatial_dims + 1, *(n + 1 for n in spatial))
    kernel = (num_spatial_dims + 1, num_spatial_dims, *spatial)
    return lax.ConvDimensionNumbers(image, kernel, image)


@dataclasses.dataclass(frozen=True)
class ReceptiveFields:
    """The receptive fields, which may overlap, of a kernel on a grid of any number of axes.

    Shapes are given for two spatial axes.

    Attributes:
      grid: size of each spatial axis of the grid, such as rows H and columns W.
      kernel: sizes of the kernel, such as rows KH and columns KW.
      strides: strides of the kernel along each spatial axis.
      pads: positions added before and after the grid along each spatial axis.
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        kernel: Sequence[int],
        strides: Sequence[int],
        padding: Padding,
    ) -> "ReceptiveFields":
        """Makes the fields from ``"SAME"``, ``"VALID"``, or (low, high) per axis."""
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(grid, kernel, strides, padding)
        pads = tuple((int(low), int(high)) for low, high in padding)
        sizes, kernel_sizes, steps = (tuple(map(int, x)) for x in (grid, kernel, strides))
        return cls(sizes, kernel_sizes, steps, pads)

    @property
    def size(self) -> int:
        """Number of positions in a field, KH · KW on an image."""
        return math.prod(self.kernel)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of fields per axis, (P, Q); below 1 if the kernel is larger than the grid."""
        return tuple(
            (size + sum(pads) - kernel) // stride + 1
            for size, kernel, stride, pads in zip(
                self.grid, self.kernel, self.strides, self.pads, strict=True
            )
        )

    def gather(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """Copies ``[..., H, W, C]`` into the fields, ``[..., P, Q, KH * KW, C]``."""
        channels = x.shape[-1]
        if any(p for pair in self.pads for p in pair):
            x = self._pad(x, fill, [(low, high, 0) for low, high in self.pads])
        rank = len(self.kernel)
        if channels < _MANY_CHANNELS or rank > 2:
            # Columns first, then rows of the result: only KH + KW slices to compile.
            for axis in reversed(range(rank)):
                x = self._shifted(x, [(offset,) for offset in range(self.kernel[axis])], (axis,))
        else:
            x = self._shifted(x, self._offsets(), range(rank))
        return x.reshape(*x.shape[:-1], self.size, channels)

    def _shifted(
        self, x: jax.Array, offsets: Iterable[Sequence[int]], axes: Sequence[int]
    ) -> jax.Array:
        """Concatenates the values of all fields at these offsets along some spatial axes."""
        first, parts = x.ndim - 1 - len(self.kernel), []
        for offset in offsets:
            part = x
            for n, start in zip(axes, offset, strict=True):
                last = start + self.strides[n] * (self.shape[n] - 1) + 1
                part = lax.slice_in_dim(part, start, last, self.strides[n], axis=first + n)
            parts.append(part)
        return jnp.concatenate(parts, axis=-1)

    def sum(self, fields: jax.Array) -> jax.Array:
        """Sums the values of the fields, ``[..., P, Q, KH * KW, C]``, at each grid position."""
        return self._spread(fields, 0, jnp.add)

    def max(self, fields: jax.Array) -> jax.Array:
        """Largest value of the fields at each grid position; -inf at positions in no field."""
        return self._spread(fields, -jnp.inf, jnp.maximum)

    def _spread(
        self,
        fields: jax.Array,
        fill: float,
        combine: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        spread = [
            self._pad(
                fields[..., position, :],
                fill,
                [
                    (
                        offset - self.pads[n][0],
                        # From the position in the last field to the end of the grid.
                        self.grid[n]
                        - 1
                        + self.pads[n][0]
                        - offset
                        - self.strides[n] * (self.shape[n] - 1),
                        self.strides[n] - 1,
                    )
                    for n, offset in enumerate(offsets)
                ],
            )
            for position, offsets in enumerate(self._offsets())
        ]
        return functools.reduce(combine, spread)

    def _offsets(self) -> Iterable[tuple[int, ...]]:
        return itertools.product(*map(range, self.kernel))

    @staticmethod
    def _pad(x: jax.Array, fill: float, config: list[tuple[int, int, int]]) -> jax.Array:
        """Pads (or, where negative, crops) the spatial axes of ``[..., H, W, C]``."""
        free = [(0, 0, 0)] * (x.ndim - 1 - len(config))
        return lax.pad(x, jnp.asarray(fill, x.dtype), [*free, *config, (0, 0, 0)])
