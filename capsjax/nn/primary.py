"""Primary capsules: from feature maps to the first capsule layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from capsjax.nn._checks import check_rngs
from capsjax.ops import conv_general_dilated, squash
from capsjax.ops._checks import as_array, check_callable, check_number, check_sizes


class PrimaryCapsules(nnx.Module):
    r"""A convolution whose output channels are grouped into capsules and squashed.

    .. math::
      u_{p,q,t} = \mathrm{squash}\bigl(c \cdot (x * k)_{p,q,t} + b_t\bigr)

    Channels run over the capsule types first and the dimensions within a type second: the
    components of one capsule are neighbouring channels at one grid position. There is no ReLU, and
    the convolution is VALID by default.

    Args:
      in_features: channels of the input.
      num_types: capsule types :math:`t`; every grid position holds one capsule of each.
      features: dimension K of a capsule.
      kernel_size: rows and columns of the kernel.
      strides: of the convolution.
      padding: of the convolution.
      keep_grid: return ``[..., H, W, num_types, K]`` and not one axis of capsules, for
        :class:`capsjax.nn.ConvCapsules`.
      coupling: :math:`c`, a constant that multiplies the convolution before the bias is added: 1
        in the paper; 1 / ``num_types`` in the authors' code, which sends these capsules through its
        routing function with a single input capsule.
      dtype: dtype of the computation; the promotion of inputs and parameters when None. Norms are
        float32.
      param_dtype: dtype of the parameters.
      precision: of the convolution.
      kernel_init: initialiser of the kernel ``[KH, KW, C, num_types * features]``.
      bias_init: initialiser of the bias ``[num_types * features]``.
      rngs: random streams; uses ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import PrimaryCapsules
      >>> layer = PrimaryCapsules(256, 32, 8, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 20, 20, 256))).shape
      (2, 1152, 8)

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
        check_callable(kernel_init=kernel_init, bias_init=bias_init)
        check_sizes(in_features=in_features, num_types=num_types, features=features)
        check_number("coupling", coupling)
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.conv = nnx.Conv(
            in_features,
            num_types * features,
            size,
            strides,
            padding=padding,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            conv_general_dilated=conv_general_dilated,
            rngs=rngs,
        )
        self.bias = nnx.Param(bias_init(rngs.params(), (num_types * features,), param_dtype))
        self.features = features
        self.keep_grid = keep_grid
        self.coupling = coupling

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes the capsules.

        Args:
          inputs: feature maps, ``[..., H, W, C]``.

        Returns:
          Poses ``[..., I, K]``, with I = rows · columns · types in this order; or on their grid.
        """
        channels = self.conv(as_array("inputs", inputs))
        if self.coupling != 1:
            channels = channels * self.coupling
        bias = self.bias[...].astype(channels.dtype)
        channels = channels + jnp.broadcast_to(bias, channels.shape)
        types = channels.shape[-1] // self.features
        capsules = channels.reshape(*channels.shape[:-1], types, self.features)
        return squash(capsules if self.keep_grid else jax.lax.collapse(capsules, -4, -1))
