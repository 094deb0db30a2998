"""Layers of matrix capsules, whose poses are square matrices and whose votes are their products."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from capsjax.nn._checks import check_numerics, check_rngs, named_inits
from capsjax.nn._convolution import convolve, make_conv
from capsjax.nn.conv import ConvCapsules
from capsjax.nn.grid import GridCapsules
from capsjax.nn.shared import SharedWeights
from capsjax.ops import matrix_votes
from capsjax.ops._checks import as_integer, as_sizes
from capsjax.routing import Sizes


class MatrixPrimaryCapsules(nnx.Module):
    r"""The first layer of matrix capsules: a convolution to poses and activations.

    .. math::
      u_{p,q,t} = (x * k)_{p,q,t} + b_t, \qquad a_{p,q,t} = \sigma\bigl((x * l)_{p,q,t} + c_t\bigr)

    Args:
      in_features: channels of the input.
      num_types: capsule types :math:`t`; every grid position holds one capsule of each.
      features: dimension K of a pose: 16 for 4 × 4 matrices, flattened by rows.
      kernel_size: as in :class:`PrimaryCapsules`.
      strides: as in :class:`PrimaryCapsules`.
      padding: as in :class:`PrimaryCapsules`.
      dtype: dtype of the computation; the promotion of inputs and parameters when None.
      param_dtype: dtype of the parameters.
      precision: precision of the convolution.
      kernel_init: initialiser of the kernel ``[*kernel_size, C, num_types * (features + 1)]``,
        whose last ``num_types`` channels are the activations.
      bias_init: initialiser of the bias.
      rngs: random streams; uses ``params``.

    Raises:
      TypeError: as :class:`PrimaryCapsules`.
      ValueError: as :class:`PrimaryCapsules`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import MatrixPrimaryCapsules
      >>> layer = MatrixPrimaryCapsules(64, 8, 16, rngs=nnx.Rngs(0))
      >>> poses, activations = jax.jit(layer)(jnp.ones((2, 12, 12, 64)))
      >>> poses.shape, activations.shape
      ((2, 12, 12, 8, 16), (2, 12, 12, 8))

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, section 4.
    """

    def __init__(
        self,
        in_features: int,
        num_types: int,
        features: int = 16,
        *,
        kernel_size: int | Sequence[int] = 1,
        strides: int | Sequence[int] = 1,
        padding: PaddingLike = "VALID",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        check_rngs(rngs)
        check_numerics(dtype, param_dtype, precision)
        kernel_init, bias_init = named_inits(kernel_init=kernel_init, bias_init=bias_init)
        in_features, num_types, features = as_sizes(
            in_features=in_features, num_types=num_types, features=features
        )
        self.conv = make_conv(
            in_features,
            num_types * (features + 1),
            kernel_size,
            strides,
            padding,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.num_types = num_types
        self.features = features

    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the capsules.

        Args:
          inputs: feature maps, ``[..., H, W, C]``; ``[..., L, C]`` with one spatial axis,
            ``[..., Z, H, W, C]`` with three.

        Returns:
          Poses ``[..., P, Q, num_types, K]`` and activations ``[..., P, Q, num_types]``.

        Raises:
          ValueError: the inputs have the wrong shape, or are smaller than the kernel.
        """
        channels = convolve(self.conv, inputs)
        poses, activations = jnp.split(channels, [self.num_types * self.features], axis=-1)
        poses = poses.reshape(*poses.shape[:-1], self.num_types, self.features)
        return poses, jax.nn.sigmoid(activations)


class _MatrixVotes(SharedWeights):
    """Votes of matrix poses, which are always stored."""

    def _kernel_shape(self, sizes: Sizes) -> tuple[int, ...]:
        children, features, parents, _ = sizes
        side = math.isqrt(features)
        if side * side != features:
            raise ValueError(f"features must be a square number, got {features}")
        return children, side, parents, side

    def _make_votes(self, poses: jax.Array, kernel: jax.Array) -> jax.Array:
        return matrix_votes(poses, kernel, precision=self.precision)

    def _dense_weights(self, kernel: jax.Array) -> None:
        return None


class MatrixConvCapsules(_MatrixVotes, ConvCapsules):
    r"""Convolutional capsules with matrix poses.

    .. math::
      V_{(q,j)|(p,i)} = M_{p,i}\, W_{p - sq,\, i,\, j}

    As :class:`ConvCapsules`, but with n² instead of n⁴ weights per pair of capsules, for n × n
    matrices.

    Args:
      in_types: types I of child capsules per position.
      out_types: types J of parent capsules per position.
      features: dimension of a pose, a square number: 16 for 4 × 4 matrices, flattened by rows.
      kernel_size: as in :class:`ConvCapsules`.
      strides: as in :class:`ConvCapsules`.
      padding: as in :class:`ConvCapsules`.
      routing: name of the algorithm, one of :func:`capsjax.routing.algorithms`.
      rngs: random streams; uses ``params``.
      **options: other keyword arguments of :class:`ConvCapsules`; ``kernel_init`` initialises
        ``[prod(kernel_size) * I, n, J, n]``.

    Raises:
      ValueError: as :class:`ConvCapsules`, or ``features`` is not a square number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import MatrixConvCapsules
      >>> layer = MatrixConvCapsules(8, 4, 16, kernel_size=3, strides=2, rngs=nnx.Rngs(0))
      >>> poses, activations = jnp.ones((2, 7, 7, 8, 16)), jnp.ones((2, 7, 7, 8))
      >>> routed = jax.jit(layer)(poses, activations=activations)
      >>> routed.poses.shape, routed.activations.shape, routed.coupling.shape
      ((2, 3, 3, 4, 16), (2, 3, 3, 4), (2, 3, 3, 72, 4))

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, sections 2 to 4.
    """

    def __init__(
        self,
        in_types: int,
        out_types: int,
        features: int = 16,
        *,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: PaddingLike = "VALID",
        routing: str = "em",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        features = as_integer("features", features)
        super().__init__(
            in_types,
            features,
            out_types,
            features,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            routing=routing,
            rngs=rngs,
            **options,
        )


class MatrixGridCapsules(_MatrixVotes, GridCapsules):
    r"""The last layer of matrix capsules: all positions share the weights.

    .. math::
      V_{j|(p,i)} = M_{p,i}\, W_{ij} + x_p

    where the coordinates :math:`x_p`, (row + ½) / rows and (column + ½) / columns, are added to the
    first components of the right-hand column, one per spatial axis.

    Args:
      in_types: types I of child capsules per position.
      out_capsules: number J of parent capsules.
      features: dimension of a pose, a square number: 16 for 4 × 4 matrices, flattened by rows.
      coordinates: whether to add the coordinates.
      num_spatial_dims: number of axes of the grid.
      routing: name of the algorithm, one of :func:`capsjax.routing.algorithms`.
      rngs: random streams; uses ``params``.
      **options: other keyword arguments of :class:`GridCapsules`; ``kernel_init`` initialises
        ``[I, n, J, n]``.

    Raises:
      ValueError: as :class:`GridCapsules`, or ``features`` is not a square number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import MatrixGridCapsules
      >>> layer = MatrixGridCapsules(4, 10, 16, rngs=nnx.Rngs(0))
      >>> poses, activations = jnp.ones((2, 3, 3, 4, 16)), jnp.ones((2, 3, 3, 4))
      >>> routed = jax.jit(layer)(poses, activations=activations)
      >>> routed.poses.shape, routed.activations.shape
      ((2, 10, 16), (2, 10))

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, section 4.
    """

    def __init__(
        self,
        in_types: int,
        out_capsules: int,
        features: int = 16,
        *,
        coordinates: bool = True,
        num_spatial_dims: int = 2,
        routing: str = "em",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        features = as_integer("features", features)
        super().__init__(
            in_types,
            features,
            out_capsules,
            features,
            coordinates=coordinates,
            num_spatial_dims=num_spatial_dims,
            routing=routing,
            rngs=rngs,
            **options,
        )

    def _coordinate_components(self) -> list[int]:
        side = math.isqrt(self.sizes.out_features)
        return [(n + 1) * side - 1 for n in range(self.num_spatial_dims)]
