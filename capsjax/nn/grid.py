"""Capsules of a whole grid, whose positions share weights."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from capsjax.nn.shared import SharedWeights, kernel_init_per_child
from capsjax.ops._checks import as_sizes, check_flags
from capsjax.routing import Children, Routed, Sizes
from capsjax.routing.fused import Implementation


class GridCapsules(SharedWeights):
    r"""All children on a grid vote for one set of parents; all positions share the weights.

    .. math::
      \hat u_{j|(p,i)} = W_{ij}\, u_{p,i} + x_p, \qquad v = \mathrm{routing}(\hat u)

    for a child of type i at position p and a parent j. The grid may have any size. The coordinates
    :math:`x_p` are added only if ``coordinates``.

    Args:
      in_types: types I of child capsules per position.
      in_features: dimension K of a child's pose.
      out_capsules: number J of parent capsules.
      out_features: dimension D of a parent's pose.
      coordinates: whether to add the position of a child, (row + ½) / rows and (column + ½) /
        columns, to the first components of its votes, one per spatial axis.
      num_spatial_dims: number of axes of the grid: 2 for images, 1 for series, 3 for volumes.
      routing: name of the algorithm, one of :func:`capsjax.routing.algorithms`; the layer owns its
        parameters, which all positions share.
      use_bias: whether the parents' sums have a bias ``[J, D]``, for algorithms with one.
      dtype: dtype of the computation; the promotion of inputs and parameters when None. Routing
        sums are float32.
      param_dtype: dtype of the parameters.
      precision: precision of the votes' matrix product.
      kernel_init: initialiser of the weights ``[I, K, J, D]``.
      bias_init: initialiser of the bias.
      implementation: of votes and dynamic routing, as in :func:`capsjax.dense_capsules`. None
        stores the votes: other implementations need a copy of the weights for every position.
      rngs: random streams; uses ``params``.
      **options: options of the routing function, such as ``num_iterations``.

    Raises:
      TypeError: a size is not an integer, a switch is not a bool, a dtype is not floating point, an
        initialiser is not a function or returns no floating-point array, or ``rngs`` is not an
        ``nnx.Rngs``.
      ValueError: the algorithm, one of its options, the precision or the implementation is unknown,
        the algorithm makes its own votes, a size is not positive, an initialiser returns another
        shape, or there are more coordinates than ``out_features``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import GridCapsules
      >>> layer = GridCapsules(8, 16, 10, 16, rngs=nnx.Rngs(0))
      >>> routed = jax.jit(layer)(jnp.ones((2, 7, 7, 8, 16)))
      >>> routed.poses.shape, routed.activations.shape, routed.coupling.shape
      ((2, 10, 16), (2, 10), (2, 392, 10))

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, section 4.
    """

    def __init__(
        self,
        in_types: int,
        in_features: int,
        out_capsules: int,
        out_features: int,
        *,
        coordinates: bool = False,
        num_spatial_dims: int = 2,
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
        in_types, *sizes, num_spatial_dims = as_sizes(
            in_types=in_types,
            in_features=in_features,
            out_capsules=out_capsules,
            out_features=out_features,
            num_spatial_dims=num_spatial_dims,
        )
        check_flags(coordinates=coordinates)
        self.coordinates = coordinates
        super().__init__(
            in_types,
            Sizes(in_types, *sizes),
            num_spatial_dims=num_spatial_dims,
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
        if coordinates and max(self._coordinate_components()) >= out_features:
            raise ValueError(
                f"coordinates of num_spatial_dims={num_spatial_dims} do not fit poses of"
                f" {out_features} out_features"
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
          implementation: overrides the layer's implementation.

        Returns:
          :class:`capsjax.Routed`: poses ``[..., J, D]``, activations ``[..., J]`` and coupling
          ``[..., H * W * I, J]``, which is None if the votes are not stored.

        Raises:
          TypeError: activations are not floating point, or ``where`` is not bool.
          ValueError: an argument has the wrong shape, or the implementation is unknown.
        """
        poses, activations, where = self._check_inputs(poses, activations, where)
        poses, kernel = promote_dtype((poses, self.kernel[...]), dtype=self.dtype)
        grid = self._grid(poses)
        if where is not None:
            where = self._flat(where, 0)

        def make_votes() -> jax.Array:
            votes = self._make_votes(poses, kernel)
            if self.coordinates:
                votes = self._add_coordinates(votes, grid)
            return self._flat(votes, 2)

        return self.router(
            Children(
                self._flat(poses, 1),
                None if activations is None else self._flat(activations, 0),
                where=where,
            ),
            make_votes,
            weights=None if self.coordinates else self._dense_weights(kernel),
            precision=self.precision,
            implementation=self.implementation if implementation is None else implementation,
            places=math.prod(grid),
        )

    def _coordinate_components(self) -> Sequence[int]:
        return range(self.num_spatial_dims)

    def _add_coordinates(self, votes: jax.Array, grid: Sequence[int]) -> jax.Array:
        """Adds the positions on the grid to votes ``[..., H, W, I, J, D]``."""
        axes = ((jnp.arange(n) + 0.5) / n for n in grid)
        places = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)[..., None, None, :]
        components = jnp.array(self._coordinate_components())
        shift = jnp.zeros((*grid, 1, 1, votes.shape[-1])).at[..., components].set(places)
        return votes + jnp.broadcast_to(shift.astype(votes.dtype), votes.shape)

    def _flat(self, x: jax.Array, trailing: int) -> jax.Array:
        """Flattens positions and types to one axis of children, before `trailing` other axes."""
        last = x.ndim - trailing
        return jax.lax.collapse(x, last - 1 - self.num_spatial_dims, last)
