"""Receptive fields of a kernel on a grid."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]

# With this many channels, copying in two steps costs more than it saves in compilation.
_MANY_CHANNELS = 8


@dataclasses.dataclass(frozen=True)
class ReceptiveFields:
    """The receptive fields of a kernel on a grid, which may overlap.

    Attributes:
      grid: rows H and columns W of the grid.
      kernel: rows KH and columns KW of the kernel.
      strides: strides of the kernel along both axes.
      pads: positions added before and after the grid along both axes.
    """

    grid: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]

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
        rows, columns = ((int(low), int(high)) for low, high in padding)
        return cls(_pair(grid), _pair(kernel), _pair(strides), (rows, columns))

    @property
    def size(self) -> int:
        """Number of positions in a field, KH · KW."""
        return math.prod(self.kernel)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows P and columns Q of fields, below 1 if the kernel is larger than the grid."""
        rows, columns = (
            (self.grid[n] + sum(self.pads[n]) - self.kernel[n]) // self.strides[n] + 1
            for n in (0, 1)
        )
        return rows, columns

    def gather(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """Copies ``[..., H, W, C]`` into the fields, ``[..., P, Q, KH * KW, C]``."""
        channels = x.shape[-1]
        if any(p for pair in self.pads for p in pair):
            x = self._pad(x, fill, [(low, high, 0) for low, high in self.pads])
        if channels < _MANY_CHANNELS:
            # Columns first, then rows of the result: only KH + KW slices to compile.
            x = self._shifted(x, [(0, w) for w in range(self.kernel[1])], (1,))
            x = self._shifted(x, [(h, 0) for h in range(self.kernel[0])], (0,))
        else:
            x = self._shifted(x, self._offsets(), (0, 1))
        return x.reshape(*x.shape[:-1], self.size, channels)

    def _shifted(
        self, x: jax.Array, offsets: Sequence[tuple[int, int]], axes: Sequence[int]
    ) -> jax.Array:
        """Concatenates the values of all fields at these offsets along rows, columns or both."""
        parts = []
        for offset in offsets:
            part = x
            for n in axes:
                last = offset[n] + self.strides[n] * (self.shape[n] - 1) + 1
                part = lax.slice_in_dim(part, offset[n], last, self.strides[n], axis=n - 3)
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

    def _offsets(self) -> list[tuple[int, int]]:
        return [(h, w) for h in range(self.kernel[0]) for w in range(self.kernel[1])]

    @staticmethod
    def _pad(x: jax.Array, fill: float, config: list[tuple[int, int, int]]) -> jax.Array:
        """Pads (or, where negative, crops) rows and columns of ``[..., H, W, C]``."""
        free = [(0, 0, 0)] * (x.ndim - 3)
        return lax.pad(x, jnp.asarray(fill, x.dtype), [*free, *config, (0, 0, 0)])


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    first, second = sizes
    return int(first), int(second)
