"""Fully connected capsules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from capsjax.nn._checks import check_numerics, check_rngs, named_inits
from capsjax.nn.router import Router
from capsjax.ops import dense_votes
from capsjax.ops._checks import (
    as_array,
    as_floating,
    as_sizes,
    broadcast,
    taking_part,
)
from capsjax.routing import Children, Routed, Sizes, algorithm
from capsjax.routing.fused import Implementation, check_implementation


class DenseCapsules(nnx.Module):
    r"""Fully connected capsules: every child votes for every parent; with any routing algorithm.

    .. math::
      \hat u_{j|i} = W_{ij} u_i, \qquad v = \mathrm{routing}(\hat u)

    Args:
      in_capsules: number I of child capsules.
      in_features: dimension K of a child's pose.
      out_capsules: number J of parent capsules.
      out_features: dimension D of a parent's pose.
      routing: name of the algorithm, one of :func:`capsjax.routing.algorithms`; the layer owns its
        parameters, see :class:`capsjax.nn.Router`.
      use_bias: whether the parents' sums have a bias ``[J, D]``, for algorithms with one.
      dtype: dtype of the computation; the promotion of inputs and parameters when None. Routing
        sums are float32.
      param_dtype: dtype of the parameters.
      precision: precision of the votes' matrix product, as in :func:`capsjax.dense_capsules`.
      kernel_init: initialiser of the weights ``[I, K, J, D]``.
      bias_init: initialiser of the bias.
      implementation: of votes and dynamic routing, as in :func:`capsjax.dense_capsules`:
        ``"reference"`` returns the coupling and supports forward-mode differentiation. Other
        algorithms always store their votes and return the coupling.
      rngs: random streams; uses ``params``.
      **options: options of the routing function, such as ``num_iterations``.

    Raises:
      TypeError: a size is not an integer, a switch is not a bool, a dtype is not floating point, an
        initialiser is not a function or returns no floating-point array, or ``rngs`` is not an
        ``nnx.Rngs``.
      ValueError: the algorithm, one of its options, the precision or the implementation is unknown,
        a size is not positive, or an initialiser returns another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import DenseCapsules
      >>> layer = DenseCapsules(1152, 8, 10, 16, num_iterations=3, rngs=nnx.Rngs(0))
      >>> jax.jit(layer)(jnp.ones((2, 1152, 8))).poses.shape
      (2, 10, 16)
      >>> layer = DenseCapsules(288, 8, 10, 16, routing="em", rngs=nnx.Rngs(0))
      >>> routed = jax.jit(layer)(jnp.ones((2, 288, 8)), activations=jnp.ones((2, 288)))
      >>> routed.activations.shape
      (2, 10)

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
        routing: str = "dynamic",
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.normal(0.1),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_rngs(rngs)
        check_numerics(dtype, param_dtype, precision)
        kernel_init, bias_init = named_inits(kernel_init=kernel_init, bias_init=bias_init)
        sizes = Sizes(in_capsules, in_features, out_capsules, out_features)
        self.sizes = sizes = Sizes(*as_sizes(**sizes._asdict()))
        self.kernel: nnx.Param[jax.Array] | None
        if algorithm(routing).makes_votes:
            self.kernel = nnx.data(None)
        else:
            self.kernel = nnx.Param(kernel_init(rngs.params(), sizes, param_dtype))
        self.router = Router(
            routing,
            sizes,
            options=options,
            use_bias=use_bias,
            bias_init=bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dtype = dtype
        self.precision = precision
        check_implementation(implementation, routing)
        self.implementation = implementation

    def __call__(
        self,
        poses: jax.Array,
        *,
        activations: jax.Array | None = None,
        logits: ArrayLike | None = None,
        where: ArrayLike | None = None,
        implementation: Implementation | None = None,
    ) -> Routed:
        """Computes the parent capsules.

        Args:
          poses: child poses, ``[..., I, K]``.
          activations: activations of the children, broadcastable to ``[..., I]``, for algorithms
            that take them; the lengths of the poses when None.
          logits: prior logits, broadcastable to ``[..., I, J]``, for algorithms that take them;
            votes are then stored.
          where: children that take part, bool, broadcastable to ``[..., I]``. The others have no
            influence and no gradient, whatever their poses, activations and logits are.
          implementation: overrides the layer's implementation; ``"reference"`` returns the
            coupling.

        Returns:
          :class:`capsjax.Routed`: poses ``[..., J, D]``, activations ``[..., J]``, and the coupling
          ``[..., I, J]``, which is None if the votes are not stored.

        Raises:
          TypeError: activations are not floating point, or ``where`` is not bool.
          ValueError: an argument has the wrong shape, or the routing algorithm or the
            implementation does not support it.
        """
        if implementation is None:
            implementation = self.implementation
        poses = as_array("poses", poses)
        if poses.shape[-2:] != self.sizes[:2]:
            children, features = self.sizes[:2]
            raise ValueError(
                f"poses must have shape [..., I, K] = [..., {children}, {features}], got shape"
                f" {poses.shape}"
            )
        if activations is not None:  # for an algorithm that does not take them, too
            activations = as_floating("activations", activations)
            activations = broadcast("activations", activations, poses.shape[:-1])
        if where is not None:
            mask, poses = taking_part(where, poses)
            where = mask[..., 0]
        kernel = None if self.kernel is None else self.kernel[...]
        poses, kernel = promote_dtype((poses, kernel), dtype=self.dtype)
        return self.router(
            Children(poses, activations, logits, where),
            lambda: (
                None if kernel is None else dense_votes(poses, kernel, precision=self.precision)
            ),
            weights=kernel,
            precision=self.precision,
            implementation=implementation,
        )
