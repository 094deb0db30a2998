"""Fully connected capsules (floor 3)."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from capsjax.ops import dense_votes
from capsjax.routing import Routed, dynamic_routing


class DenseCapsules(nnx.Module):
    r"""Every child votes for every parent through a matrix of its own; routing by agreement.

    .. math::
      \hat u_{j|i} = W_{ij} u_i, \qquad v = \mathrm{dynamic\_routing}(\hat u)

    Args:
      in_capsules: number I of child capsules.
      in_features: dimension K of a child's pose.
      out_capsules: number J of parent capsules.
      out_features: dimension D of a parent's pose.
      num_iterations: routing iterations.
      use_bias: whether :math:`s_j` has a bias ``[J, D]``, added in every iteration.
      leaky: whether a child may go to no parent; see :func:`capsjax.dynamic_routing`.
      stop_gradient: whether gradients skip the logit updates.
      dtype: dtype of the computation; the promotion of inputs and parameters when None. Routing
        sums are float32.
      param_dtype: dtype of the parameters.
      precision: of the votes' matrix product.
      kernel_init: initialiser of the weights ``[I, K, J, D]``.
      bias_init: initialiser of the bias.
      rngs: random streams; uses ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import DenseCapsules
      >>> layer = DenseCapsules(1152, 8, 10, 16, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 1152, 8))).poses.shape
      (2, 10, 16)

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, section 4.
    """

    def __init__(
        self,
        in_capsules: int,
        in_features: int,
        out_capsules: int,
        out_features: int,
        *,
        num_iterations: int = 3,
        use_bias: bool = False,
        leaky: bool = False,
        stop_gradient: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.normal(0.1),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        shape = (in_capsules, in_features, out_capsules, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias: nnx.Param[jax.Array] | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), shape[2:], param_dtype))
        else:
            self.bias = nnx.data(None)
        self.num_iterations = num_iterations
        self.leaky = leaky
        self.stop_gradient = stop_gradient
        self.dtype = dtype
        self.precision = precision

    def __call__(
        self,
        poses: jax.Array,
        *,
        logits: ArrayLike | None = None,
        where: ArrayLike | None = None,
    ) -> Routed:
        """Computes the parent capsules.

        Args:
          poses: child poses, ``[..., I, K]``.
          logits: prior logits, broadcastable to ``[..., I, J]``.
          where: children that take part, bool, broadcastable to ``[..., I]``.

        Returns:
          :class:`capsjax.Routed`: poses ``[..., J, D]``, activations ``[..., J]``, coupling
          ``[..., I, J]``.
        """
        bias = None if self.bias is None else self.bias[...]
        poses, kernel, bias = promote_dtype((poses, self.kernel[...], bias), dtype=self.dtype)
        votes = dense_votes(poses, kernel, precision=self.precision)
        return dynamic_routing(
            votes,
            num_iterations=self.num_iterations,
            logits=logits,
            bias=bias,
            where=where,
            leaky=self.leaky,
            stop_gradient=self.stop_gradient,
        )
