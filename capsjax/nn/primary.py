"""Primary capsules, the first capsule layer after feature maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from capsjax.nn._checks import as_constant, check_numerics, check_rngs, named_inits
from capsjax.nn._convolution import convolve, make_conv
from capsjax.ops._checks import as_number, as_sizes, check_flags
from capsjax.ops.bias import add_bias
from capsjax.ops.capsule import squash_channels


class PrimaryCapsules(nnx.Module):
    r"""A convolution whose output channels are grouped into capsules and squashed.

    .. math::
      u_{p,q,t} = \mathrm{squash}\bigl(c \cdot (x * k)_{p,q,t} + b_t\bigr)

    The components of one capsule are neighbouring channels at one position. There is no ReLU, and
    the convolution is VALID by default. The length of ``kernel_size`` sets the number of spatial
    axes: one for series, two for images, three for volumes. On TPUs a NaN or an overflow in one
    capsule spreads to the others at its position.

    Args:
      in_features: channels of the input.
      num_types: capsule types :math:`t`; every position has one capsule of each.
      features: dimension K of a capsule.
      kernel_size: size of the kernel along each spatial axis; an integer means two axes.
      strides: strides of the convolution, one integer or one per spatial axis.
      padding: ``"VALID"``, ``"SAME"``, ``"SAME_LOWER"``, ``"CIRCULAR"``, ``"REFLECT"``, or
        ``"CAUSAL"`` with one spatial axis; an integer; or an integer or (low, high) per spatial
        axis.
      keep_grid: whether to return ``[..., H, W, num_types, K]``, for
        :class:`capsjax.nn.ConvCapsules`, instead of one axis of capsules.
      coupling: :math:`c`, a constant factor of the convolution: 1 in the paper; 1 / ``num_types``
        in the authors' code, which routes these capsules from a single input capsule, or
        1 / (``num_types`` + 1) with its leaky routing.
      dtype: dtype of the computation; the promotion of inputs and parameters when None. Norms are
        float32.
      param_dtype: dtype of the parameters.
      precision: precision of the convolution.
      kernel_init: initialiser of the kernel ``[*kernel_size, C, num_types * features]``.
      bias_init: initialiser of the bias ``[num_types * features]``.
      rngs: random streams; uses ``params``.

    Raises:
      TypeError: as :class:`DenseCapsules`, or ``coupling`` is not a number.
      ValueError: kernel size, strides or padding are invalid, a size is not positive, the precision
        is unknown, or an initialiser returns another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import PrimaryCapsules
      >>> layer = PrimaryCapsules(16, 32, 8, rngs=nnx.Rngs(0))
      >>> jax.jit(layer)(jnp.ones((2, 20, 20, 16))).shape
      (2, 1152, 8)
      >>> layer = PrimaryCapsules(3, 2, 8, kernel_size=(9,), rngs=nnx.Rngs(0))
      >>> jax.jit(layer)(jnp.ones((4, 50, 3))).shape  # time series of 50 steps
      (4, 42, 8)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 4.
    """

    def __init__(
        self,
        in_features: int,
        num_types: int,
        features: int,
        *,
        kernel_size: int | Sequence[int] = 9,
        strides: int | Sequence[int] = 2,
        padding: PaddingLike = "VALID",
        keep_grid: bool = False,
        coupling: float = 1.0,
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
        as_number("coupling", coupling)
        check_flags(keep_grid=keep_grid)
        self.conv = make_conv(
            in_features,
            num_types * features,
            kernel_size,
            strides,
            padding,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.bias = nnx.Param(bias_init(rngs.params(), (num_types * features,), param_dtype))
        self.features = features
        self.keep_grid = keep_grid
        self.coupling: float = as_constant("coupling", coupling)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes the capsules.

        Args:
          inputs: feature maps, ``[..., H, W, C]``; ``[..., L, C]`` with one spatial axis,
            ``[..., Z, H, W, C]`` with three.

        Returns:
          Poses ``[..., I, K]``, where I runs over rows, columns and types in this order; or poses
          on their grid if ``keep_grid``.

        Raises:
          ValueError: the inputs have the wrong shape, or are smaller than the kernel.
        """
        channels = convolve(self.conv, inputs)
        if self.coupling != 1:
            channels = channels * self.coupling
        channels = add_bias(channels, self.bias[...])
        return squash_channels(channels, self.features, self._arrange)

    def _arrange(self, channels: jax.Array) -> jax.Array:
        types = channels.shape[-1] // self.features
        capsules = channels.reshape(*channels.shape[:-1], types, self.features)
        if self.keep_grid:
            return capsules
        return jax.lax.collapse(capsules, -2 - len(self.conv.kernel_size), -1)
