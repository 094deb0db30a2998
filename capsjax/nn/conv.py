"""Convolutional capsules: the children in a receptive field vote for the parents there."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike
from jax.typing import ArrayLike

from capsjax.nn.shared import SharedWeights, kernel_init_per_child
from capsjax.ops import ReceptiveFields
from capsjax.ops._checks import as_sizes, is_constant, spatial_padding, spatial_sizes
from capsjax.routing import Children, Routed, Sizes
from capsjax.routing.fused import Implementation


class ConvCapsules(SharedWeights):
    r"""Convolutional capsules: children in a receptive field vote for the parents at its position.

    .. math::
      \hat u_{(q,j)|(p,i)} = W_{p - sq,\, i,\, j}\, u_{p,i}, \qquad
      v_q = \mathrm{routing}\bigl(\hat u_{q|\cdot}\bigr)

    for a child of type i at position p and a parent of type j at position q. All receptive fields
    share the weights. A child may lie in several of them. In EM and variational routing its
    responsibilities sum to 1 over the parents at all positions that it votes for, as in the paper;
    in the other algorithms they sum to 1 over the parents at each position.

    The length of ``kernel_size`` sets the number of spatial axes: one for series, two for images,
    three for volumes.

    Args:
      in_types: types I of child capsules per position.
      in_features: dimension K of a child's pose.
      out_types: types J of parent capsules per position.
      out_features: dimension D of a parent's pose.
      kernel_size: size of a receptive field along each spatial axis; an integer means two axes.
      strides: strides of the receptive fields, one integer or one per spatial axis.
      padding: ``"VALID"``, ``"SAME"``, ``"SAME_LOWER"``, an integer, or an integer or (low, high)
        per spatial axis. Padded positions have no children.
      routing: name of the algorithm, one of :func:`capsjax.routing.algorithms`; the layer owns its
        parameters.
      use_bias: whether the parents' sums have a bias ``[J, D]``, for algorithms with one.
      dtype: dtype of the computation; the promotion of inputs and parameters when None. Routing
        sums are float32.
      param_dtype: dtype of the parameters.
      precision: precision of the votes' matrix product; see :func:`capsjax.dense_capsules` for
        dynamic routing.
      kernel_init: initialiser of the weights ``[prod(kernel_size) * I, K, J, D]``.
      bias_init: initialiser of the bias.
      implementation: of votes and dynamic routing, as in :func:`capsjax.dense_capsules`.
      rngs: random streams; uses ``params``.
      **options: options of the routing function, such as ``num_iterations``.

    Raises:
      TypeError: a size is not an integer, a switch is not a bool, a dtype is not floating point, an
        initialiser is not a function or returns no floating-point array, or ``rngs`` is not an
        ``nnx.Rngs``.
      ValueError: the algorithm, one of its options, the precision or the implementation is unknown,
        the algorithm makes its own votes, a size is not positive, kernel size, strides or padding
        are invalid, or an initialiser returns another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import ConvCapsules
      >>> layer = ConvCapsules(8, 16, 4, 16, kernel_size=3, strides=2, rngs=nnx.Rngs(0))
      >>> routed = jax.jit(layer)(jnp.ones((2, 7, 7, 8, 16)))
      >>> routed.poses.shape, routed.activations.shape
      ((2, 3, 3, 4, 16), (2, 3, 3, 4))

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, sections 2 to 4.
    """

    def __init__(
        self,
        in_types: int,
        in_features: int,
        out_types: int,
        out_features: int,
        *,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: PaddingLike = "VALID",
        routing: str = "dynamic",
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = kernel_init_per_child,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        in_types, *sizes = as_sizes(
            in_types=in_types,
            in_features=in_features,
            out_types=out_types,
            out_features=out_features,
        )
        self.kernel_size = spatial_sizes("kernel_size", kernel_size)
        self.strides = spatial_sizes("strides", strides, self.kernel_size)
        self.padding = spatial_padding(padding, self.kernel_size, ("VALID", "SAME", "SAME_LOWER"))
        children = math.prod(self.kernel_size) * in_types
        super().__init__(
            in_types,
            Sizes(children, *sizes),
            num_spatial_dims=len(self.kernel_size),
            routing=routing,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
            options=options,
        )

    def __call__(
        self,
        poses: jax.Array,
        *,
        activations: jax.Array | None = None,
        where: ArrayLike | None = None,
        implementation: Implementation | None = None,
    ) -> Routed:
        """Computes the parent capsules.

        Args:
          poses: child poses, ``[..., H, W, I, K]``; ``[..., L, I, K]`` with one spatial axis,
            ``[..., Z, H, W, I, K]`` with three.
          activations: activations of the children, ``[..., H, W, I]``, for algorithms that take
            them; the lengths of the poses when None.
          where: children that take part, bool, broadcastable to ``[..., H, W, I]``. The others have
            no influence and no gradient, whatever their poses and activations are.
          implementation: overrides the layer's implementation; ``"reference"`` returns the
            coupling.

        Returns:
          :class:`capsjax.Routed` on the grid of receptive fields: poses ``[..., P, Q, J, D]``,
          activations ``[..., P, Q, J]`` and coupling ``[..., P, Q, KH * KW * I, J]``. The coupling
          of dynamic routing is None unless the implementation is ``"reference"``.

        Raises:
          TypeError: activations are not floating point, or ``where`` is not bool.
          ValueError: an argument has the wrong shape, the kernel is larger than the grid, the size
            of the grid is symbolic, or the implementation is unknown.
        """
        poses, activations, where = self._check_inputs(poses, activations, where)
        poses, kernel = promote_dtype((poses, self.kernel[...]), dtype=self.dtype)
        grid = self._grid(poses)
        if not is_constant(grid):
            raise ValueError(f"poses must have a grid of constant size, got shape {poses.shape}")
        fields = ReceptiveFields.of(grid, self.kernel_size, self.strides, self.padding)
        if min(fields.shape) < 1:
            raise ValueError(
                f"poses must have a grid at least as large as the kernel {self.kernel_size}, got"
                f" {grid}"
            )

        def collect(x: jax.Array, *trailing: int) -> jax.Array:
            """Gathers positions of a field and types into one axis of children."""
            x = fields.gather(jax.lax.collapse(x, x.ndim - 1 - len(trailing)))
            # In two steps, which explicit sharding needs.
            x = x.reshape(*x.shape[:-1], self.in_types, *trailing)
            end = x.ndim - len(trailing)
            return jax.lax.collapse(x, end - 2, end)

        field_poses = collect(poses, poses.shape[-1])
        inside = jnp.broadcast_to(
            collect(jnp.ones((*grid, self.in_types), bool)), field_poses.shape[:-1]
        )
        if where is not None:
            where = inside & collect(where)

        def normalize(logits: jax.Array) -> jax.Array:
            # Padded positions have no responsibilities, but NaN there would reach the gradients.
            return _softmax_over_fields(fields, jnp.where(inside[..., None], logits, 0))

        children = Children(
            field_poses,
            None if activations is None else collect(activations),
            where=inside if where is None else where,
            normalize=normalize,
        )
        return self.router(
            children,
            lambda: self._make_votes(field_poses, kernel),
            weights=self._dense_weights(kernel),
            precision=self.precision,
            implementation=self.implementation if implementation is None else implementation,
        )


def _softmax_over_fields(fields: ReceptiveFields, logits: jax.Array) -> jax.Array:
    """Softmax of ``[..., P, Q, KH * KW * I, J]`` over each child's parents at all positions."""

    def per_place(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], fields.size, x.shape[-1] // fields.size)

    def per_child(x: jax.Array) -> jax.Array:
        return jax.lax.collapse(x, x.ndim - 2)[..., None]

    highest = fields.max(per_place(jax.lax.stop_gradient(jnp.max(logits, axis=-1))))
    # Positions in no field have no logits, and are not used.
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    shifted = logits - per_child(fields.gather(highest))
    exponentials = jnp.exp(shifted)
    total = fields.sum(per_place(jnp.sum(exponentials, axis=-1)))
    return exponentials / per_child(fields.gather(total, fill=1))
