"""Convolution by Fourier transforms, which needs fewer operations for large kernels."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from capsjax.ops._checks import accumulator
from capsjax.ops.fields import ReceptiveFields

# Cost of one number of a transform in operations of a product, tuned on a CPU.
_TRANSFORM = 200
# Larger transforms cost many times that: their cost per number grows with the positions.
_MOST_POSITIONS = 2048


def conv_by_fourier(
    images: jax.Array,
    kernel: jax.Array,
    fields: ReceptiveFields,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
) -> jax.Array:
    r"""Convolves by multiplying discrete Fourier transforms.

    Images x and kernel k are split into phases: the rows and columns with the same remainder modulo
    the stride. Each phase is convolved with stride 1.

    .. math::
      \hat y_{f,b,o} = \sum_{\varphi,c} \hat x_{f,b,\varphi,c} \; \overline{\hat k_{f,\varphi,c,o}}

    Transforms are products with small matrices. They compute half of the frequencies f, as the
    others are conjugates. They are as long as a phase, so that values which wrap around do not
    reach the results. With F frequencies and strides S, T, the products take 4·F·S·T·C
    multiplications per image and feature, and a sum over fields P·Q·KH·KW·C.

    Args:
      images: ``[B, H, W, C]``, or with any other number of spatial axes.
      kernel: ``[KH, KW, C, O]``.
      fields: receptive fields of the kernel on the images.
      precision: precision of the matrix products; the platform's default when None.
      preferred_element_type: dtype of the result; that of the images when None.

    Returns:
      ``[B, P, Q, O]``. Sums are float32 or wider; `precision` sets the rounding of factors.
    """
    sizes = _Sizes.of(fields)
    wide = accumulator(images.dtype)
    batch, features = images.shape[0], kernel.shape[-1]
    rank = len(fields.grid)
    positions, phases = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    inputs = math.prod(fields.strides) * images.shape[-1]

    def transform(waves: np.ndarray, x: jax.Array) -> jax.Array:
        # XLA:CPU makes no transposed copies of two-dimensional factors, even in the gradient.
        flat = x.reshape(len(x), math.prod(x.shape[1:]))
        flat = jnp.matmul(jnp.asarray(waves, wide), flat, precision=precision)
        return flat.reshape(len(waves), *x.shape[1:])

    def product(x_hat: jax.Array, k_hat: jax.Array) -> jax.Array:
        return jnp.einsum("fbc,fco->fbo", x_hat, k_hat, precision=precision)

    x = _phases(images.astype(wide), fields, sizes.grid, fields.pads)
    x = x.transpose(*positions, 0, *phases, -1).reshape(math.prod(sizes.grid), batch, inputs)
    k = _phases(kernel.astype(wide)[None], fields, sizes.taps)
    k = k.transpose(0, *positions, *phases, -2, -1)
    k = k.reshape(math.prod(sizes.taps), inputs, features)
    cosines, sines = sizes.waves(sizes.grid)
    x_hat = transform(np.concatenate([cosines, -sines]), x)
    # Real parts of the batch, then imaginary parts: two products with the kernel suffice.
    x_hat = jnp.concatenate(jnp.split(x_hat, 2), axis=1)
    cosines, sines = sizes.waves(sizes.taps)
    with_real = product(x_hat, transform(cosines, k))
    with_imaginary = product(x_hat, transform(sines, k))
    real = with_real[:, :batch] - with_imaginary[:, batch:]
    imaginary = with_imaginary[:, :batch] + with_real[:, batch:]
    cosines, sines = sizes.waves(fields.shape, weigh=True)
    waves = np.concatenate([cosines, -sines])
    y = transform(waves.T, jnp.concatenate([real, imaginary])).transpose(1, 0, 2)
    return y.reshape(batch, *fields.shape, features).astype(preferred_element_type or images.dtype)


def gains_by_fourier(images: jax.Array, kernel: jax.Array, fields: ReceptiveFields) -> bool:
    """Whether Fourier transforms cost less than a product with each field, on a CPU."""
    # An exported function may have a symbolic batch size: assume a common one.
    batch = images.shape[0] if isinstance(images.shape[0], int) else 128
    channels, features = kernel.shape[-2:]
    sizes = _Sizes.of(fields)
    if math.prod(sizes.grid) > _MOST_POSITIONS:
        return False
    frequencies = len(sizes.frequencies)
    inputs = channels * math.prod(fields.strides)
    products = 8 * frequencies * batch * inputs * features
    numbers = 2 * frequencies * (batch * (inputs + features) + inputs * features)
    direct = 2 * batch * math.prod(fields.shape) * fields.size * channels * features
    return products + _TRANSFORM * numbers < direct


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of a phase of the images and of the kernel, such as rows and columns."""

    grid: tuple[int, ...]
    taps: tuple[int, ...]

    @classmethod
    def of(cls, fields: ReceptiveFields) -> "_Sizes":
        taps = tuple(
            math.ceil(size / stride)
            for size, stride in zip(fields.kernel, fields.strides, strict=True)
        )
        return cls(tuple(p + t - 1 for p, t in zip(fields.shape, taps, strict=True)), taps)

    @property
    def frequencies(self) -> list[tuple[int, ...]]:
        """One of each pair of frequencies whose transforms are conjugates."""

        def conjugate(frequency: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(-f % size for f, size in zip(frequency, self.grid, strict=True))

        return [f for f in itertools.product(*map(range, self.grid)) if f <= conjugate(f)]

    def waves(
        self, shape: tuple[int, ...], *, weigh: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines ``[F, positions]``, with the inverse transform's weights if `weigh`."""
        frequencies, periods = np.array(self.frequencies), np.array(self.grid)
        angles = 2 * math.pi * (frequencies / periods) @ np.indices(shape).reshape(len(shape), -1)
        if not weigh:
            return np.cos(angles), np.sin(angles)
        own_conjugate = np.all(2 * frequencies % periods == 0, axis=1, keepdims=True)
        weights = np.where(own_conjugate, 1, 2) / math.prod(self.grid)
        return weights * np.cos(angles), weights * np.sin(angles)


def _phases(
    x: jax.Array,
    fields: ReceptiveFields,
    sizes: tuple[int, ...],
    pads: Sequence[tuple[int, int]] | None = None,
) -> jax.Array:
    """Splits ``[B, H, W, ...]`` into ``[B, rows, stride, columns, stride, ...]``."""
    zero = jnp.zeros((), x.dtype)
    config = [(0, 0, 0)] * x.ndim
    lows = [0] * len(sizes) if pads is None else [low for low, _ in pads]
    for n, (size, stride, low) in enumerate(zip(sizes, fields.strides, lows, strict=True), 1):
        config[n] = (low, size * stride - low - x.shape[n], 0)
    x = lax.pad(x, zero, config)
    split = itertools.chain.from_iterable(zip(sizes, fields.strides, strict=True))
    return x.reshape(x.shape[0], *split, *x.shape[len(sizes) + 1 :])
