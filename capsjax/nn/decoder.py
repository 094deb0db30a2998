"""The decoder, which reconstructs an image from class capsules."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike

from capsjax.nn._checks import check_numerics, check_rngs, named_inits
from capsjax.ops._checks import as_array, as_floating, as_integers, as_sizes
from capsjax.ops.relu import relu


class Decoder(nnx.Module):
    r"""Reconstructs an image from the poses of the class capsules that a mask selects.

    .. math::
      \hat x = \sigma(A_n \, \mathrm{ReLU}(\dots \mathrm{ReLU}(A_1 \, \mathrm{vec}(m_j v_j))))

    Masked capsules are zeroed and receive no gradient.

    Args:
      in_capsules: number J of class capsules.
      in_features: dimension D of a class capsule.
      image_shape: rows, columns and channels of the image, or the shape of a series or a volume.
      hidden_features: widths of the hidden layers.
      dtype: dtype of the computation; the promotion of inputs and parameters when None.
      param_dtype: dtype of the parameters.
      precision: precision of the matrix products.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
      rngs: random streams; uses ``params``.

    Raises:
      TypeError: as :class:`DenseCapsules`.
      ValueError: a size is not positive, the precision is unknown, or an initialiser returns
        another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import Decoder
      >>> decoder = Decoder(10, 16, (28, 28, 1), rngs=nnx.Rngs(0))
      >>> jax.jit(decoder)(jnp.ones((2, 10, 16)), jax.nn.one_hot(jnp.array([3, 7]), 10)).shape
      (2, 28, 28, 1)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 4.1.
    """

    def __init__(
        self,
        in_capsules: int,
        in_features: int,
        image_shape: Sequence[int],
        *,
        hidden_features: Sequence[int] = (512, 1024),
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
        self.in_capsules, self.in_features = as_sizes(
            in_capsules=in_capsules, in_features=in_features
        )
        self.image_shape = as_integers("image_shape", image_shape)
        hidden_features = as_integers("hidden_features", hidden_features)
        sizes = (self.in_capsules * self.in_features, *hidden_features, math.prod(self.image_shape))
        self.layers = nnx.List(
            [
                nnx.Linear(
                    a,
                    b,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    precision=precision,
                    kernel_init=kernel_init,
                    bias_init=bias_init,
                    rngs=rngs,
                )
                for a, b in itertools.pairwise(sizes)
            ]
        )

    def __call__(self, poses: jax.Array, mask: jax.Array) -> jax.Array:
        """Reconstructs images.

        Args:
          poses: class capsules, ``[..., J, D]``.
          mask: selects class capsules, ``[..., J]``, bool or numeric, one-hot or multi-hot.

        Returns:
          Pixels in [0, 1], ``[..., *image_shape]``.

        Raises:
          TypeError: ``poses`` are not floating point.
          ValueError: ``poses`` do not have the sizes of the decoder, or ``mask`` does not have the
            shape of ``poses`` without D.
        """
        poses, mask = as_floating("poses", poses), as_array("mask", mask)
        capsules, features = self.in_capsules, self.in_features
        if poses.shape[-2:] != (capsules, features):
            raise ValueError(
                f"poses must have shape [..., J, D] = [..., {capsules}, {features}], got shape"
                f" {poses.shape}"
            )
        if mask.shape != poses.shape[:-1]:
            raise ValueError(
                f"mask must have shape [..., J] = {poses.shape[:-1]}, got {mask.shape}; for class"
                " numbers use jax.nn.one_hot"
            )
        weights = mask.astype(poses.dtype)[..., None]
        hidden = jnp.where(weights == 0, 0, poses) * weights
        hidden = jax.lax.collapse(hidden, -2)
        for layer in self.layers[:-1]:
            hidden = relu(layer(hidden))
        pixels = jax.nn.sigmoid(self.layers[-1](hidden))
        return pixels.reshape(*pixels.shape[:-1], *self.image_shape)
