"""Convolutional capsules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from capsjax.nn.router import Router
from capsjax.ops import ReceptiveFields, dense_votes, matrix_votes
from capsjax.ops.fields import Padding
from capsjax.routing import Children, Routed, Sizes, algorithm
from capsjax.routing.fused import Implementation, check_implementation, dense_capsules

# Votes of the size of the poses, whatever the number of children.
_kernel_init = nnx.initializers.variance_scaling(
    1.0, "fan_in", "normal", in_axis=-3, out_axis=(-2, -1), batch_axis=(-4,)
)


# Names of an implementation that the layer's own votes can stand for.
_STORED = (None, "reference")


class ConvCapsules(nnx.Module):
    r"""Capsules on a grid: children of one receptive field vote for the parents at its place.

    .. math::
      \hat u_{(q,j)|(p,i)} = W_{p - sq,\, i,\, j}\, u_{p,i}, \qquad
      v_q = \mathrm{routing}\bigl(\hat u_{q|\cdot}\bigr)

    for a child of type i at the place p, and a parent of type j at the place q. The weights are
    shared by all receptive fields. A child lies in several of them: in EM and variational routing
    its responsibilities sum to 1 over all the parents at all the places that it votes for, as the
    paper of matrix capsules has it; in the other algorithms over the parents of each place by
    itself.

    Args:
      in_types: types I of child capsules at every place.
      in_features: dimension K of a child's pose.
      out_types: types J of parent capsules at every place.
      out_features: dimension D of a parent's pose.
      kernel_size: rows and columns of a receptive field. None: the whole grid is the one receptive
        field, and the weights are shared by its places, as in the last layer of matrix capsules;
        the result has no grid.
      strides: of the receptive fields.
      padding: ``"VALID"``, ``"SAME"``, or (low, high) per axis; what lies outside of the grid takes
        no part.
      routing: name of the algorithm, one of :func:`capsjax.routing.algorithms`; the layer owns
        what that learns, see :class:`capsjax.nn.Router`.
      matrix: poses are matrices, row by row (4 × 4 for 16 dimensions), and votes their products
        with matrices of that size: :func:`capsjax.matrix_votes`.
      coordinates: add a child's place, (row + ½) / rows and (column + ½) / columns, to two
        components of its votes: the first two of the right-hand column of a matrix, or of a vector.
      use_bias: as in :class:`capsjax.nn.DenseCapsules`.
      dtype: dtype of the computation; the promotion of inputs and parameters when None. Routing
        sums are float32.
      param_dtype: dtype of the parameters.
      precision: of the votes' matrix product; see :func:`capsjax.dense_capsules` for dynamic
        routing.
      kernel_init: initialiser of the weights ``[KH * KW * I, K, J, D]``, or with ``matrix``
        ``[KH * KW * I, n, J, n]``; with no kernel size, ``[I, …]``.
      bias_init: initialiser of the bias.
      implementation: of votes and dynamic routing, as in :func:`capsjax.dense_capsules`, also for
        its derivatives. With ``matrix`` or ``coordinates`` votes are made otherwise, and always
        stored. With no kernel size they are stored unless an implementation is named: others need
        a copy of the weights for every place.
      rngs: random streams; uses ``params``.
      **options: of the routing function, such as ``num_iterations``.

    Raises:
      ValueError: the algorithm, an option of it or the implementation is unknown, or the sizes do
        not go together.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from capsjax.nn import ConvCapsules
      >>> layer = ConvCapsules(
      ...     8, 16, 4, 16, kernel_size=3, strides=2, routing="em", matrix=True, rngs=nnx.Rngs(0))
      >>> routed = layer(jnp.ones((2, 7, 7, 8, 16)), activations=jnp.ones((2, 7, 7, 8)))
      >>> routed.poses.shape, routed.activations.shape, routed.coupling.shape
      ((2, 3, 3, 4, 16), (2, 3, 3, 4), (2, 3, 3, 72, 4))

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
        kernel_size: int | Sequence[int] | None,
        strides: int | Sequence[int] = 1,
        padding: Padding = "VALID",
        routing: str = "dynamic",
        matrix: bool = False,
        coordinates: bool = False,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _kernel_init,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.kernel_size = None if kernel_size is None else _pair(kernel_size)
        self.strides = _pair(strides)
        self.padding = padding
        self.matrix = matrix
        self.coordinates = coordinates
        self.dtype = dtype
        self.precision = precision
        self.sizes = Sizes(
            math.prod(self.kernel_size or (1,)) * in_types, in_features, out_types, out_features
        )
        self.in_types = in_types
        side = math.isqrt(in_features)
        if matrix and (side * side != in_features or out_features != in_features):
            raise ValueError(
                "matrix needs in_features and out_features to be the same square number, got"
                f" {in_features} and {out_features}"
            )
        if algorithm(routing).makes_votes:
            raise ValueError(f"routing {routing!r} makes votes of its own, which fields cannot use")
        if coordinates and out_features < 2:
            raise ValueError(f"coordinates need two out_features, got {out_features}")
        shape = self.sizes._replace(in_features=side, out_features=side) if matrix else self.sizes
        self.kernel = nnx.Param(kernel_init(rngs.params(), tuple(shape), param_dtype))
        self.router = Router(
            routing,
            self.sizes,
            options=options,
            use_bias=use_bias,
            bias_init=bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self._check_implementation(implementation)
        self.implementation = implementation

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
          poses: child poses, ``[..., H, W, I, K]``.
          activations: of the children, ``[..., H, W, I]``, for algorithms that weigh by them; the
            lengths of the poses when None.
          where: children that take part, bool, broadcastable to ``[..., H, W, I]``.
          implementation: instead of the layer's own; ``"reference"`` for the coupling.

        Returns:
          :class:`capsjax.Routed`: poses ``[..., P, Q, J, D]``, activations ``[..., P, Q, J]``,
          coupling ``[..., P, Q, KH * KW * I, J]`` on the grid of receptive fields; without P and Q,
          and with H · W · I children, if the layer has no kernel size. Dynamic routing over
          receptive fields returns the coupling only if the implementation is ``"reference"``, or
          votes are always stored, else None.

        Raises:
          ValueError: an argument has the wrong shape, the kernel is larger than the grid, or there
            is no such implementation.
        """
        expected = (self.in_types, self.sizes.in_features)
        if poses.ndim < 4 or poses.shape[-2:] != expected:
            raise ValueError(
                f"poses must have shape [..., H, W, I, K] = [..., H, W, {expected[0]},"
                f" {expected[1]}], got shape {poses.shape}"
            )
        if implementation is None:
            implementation = self.implementation
        self._check_implementation(implementation)
        if where is not None:
            where = jnp.broadcast_to(where, poses.shape[:-1])
        poses, kernel = promote_dtype((poses, self.kernel[...]), dtype=self.dtype)
        gather = self._gather_grid if self.kernel_size is None else self._gather_fields
        children, make_votes = gather(poses, kernel, activations, where)
        if self._stores_votes or (self.kernel_size is None and implementation in _STORED):
            return self.router(children, make_votes)
        places = children.poses.shape[-2] // self.sizes.in_capsules
        return dense_capsules(
            children.poses,
            jnp.tile(kernel, (places, 1, 1, 1)),
            where=children.where,
            precision=self.precision,
            implementation=implementation,
            **self.router.arguments(),
        )

    @property
    def _stores_votes(self) -> bool:
        return self.router.name != "dynamic" or self.matrix or self.coordinates

    def _check_implementation(self, implementation: str | None) -> None:
        check_implementation(implementation, self.router.name)
        if self._stores_votes and implementation not in _STORED:
            raise ValueError(
                f"implementation {implementation!r} makes no votes of matrices or with coordinates"
            )

    def _gather_grid(
        self,
        poses: jax.Array,
        kernel: jax.Array,
        activations: jax.Array | None,
        where: jax.Array | None,
    ) -> tuple[Children, Callable[[], jax.Array]]:
        """All places of the grid are children of one set of parents."""

        def flat(x: jax.Array, trailing: int) -> jax.Array:
            """Rows, columns and types as one axis of children."""
            return x.reshape(*x.shape[: x.ndim - trailing - 3], -1, *x.shape[x.ndim - trailing :])

        children = Children(
            flat(poses, 1),
            None if activations is None else flat(activations, 0),
            where=None if where is None else flat(where, 0),
        )

        def make_votes() -> jax.Array:
            votes = self._votes(poses, kernel)
            if self.coordinates:
                votes = self._add(votes, _places(poses.shape[-4:-2])[:, :, None])
            return flat(votes, 2)

        return children, make_votes

    def _gather_fields(
        self,
        poses: jax.Array,
        kernel: jax.Array,
        activations: jax.Array | None,
        where: jax.Array | None,
    ) -> tuple[Children, Callable[[], jax.Array]]:
        """Those in each receptive field are children of the parents at its place."""
        assert self.kernel_size is not None
        grid = poses.shape[-4:-2]
        fields = ReceptiveFields.of(grid, self.kernel_size, self.strides, self.padding)
        if min(fields.shape) < 1:
            raise ValueError(
                f"poses must lie on a grid at least as large as the kernel {self.kernel_size},"
                f" got {grid[0]} rows and {grid[1]} columns"
            )

        def gather(x: jax.Array, *trailing: int) -> jax.Array:
            """Places of a field and types as one axis of children."""
            x = fields.gather(x.reshape(*x.shape[: x.ndim - 1 - len(trailing)], -1))
            return x.reshape(*x.shape[:-2], self.sizes.in_capsules, *trailing)

        field_poses = gather(poses, poses.shape[-1])
        inside = jnp.broadcast_to(
            gather(jnp.ones((*grid, self.in_types), bool)), field_poses.shape[:-1]
        )

        def normalize(logits: jax.Array) -> jax.Array:
            # What lies outside has no responsibilities, but must not spoil the gradients.
            return _softmax_over_fields(fields, jnp.where(inside[..., None], logits, 0))

        children = Children(
            field_poses,
            None if activations is None else gather(activations),
            where=inside if where is None else inside & gather(where),
            normalize=normalize,
        )

        def make_votes() -> jax.Array:
            votes = self._votes(field_poses, kernel)
            if self.coordinates:
                places = jnp.broadcast_to(_places(grid)[:, :, None], (*grid, self.in_types, 2))
                votes = self._add(votes, gather(places, 2))
            return votes

        return children, make_votes

    def _votes(self, poses: jax.Array, kernel: jax.Array) -> jax.Array:
        make = matrix_votes if self.matrix else dense_votes
        return make(poses, kernel, precision=self.precision)

    def _add(self, votes: jax.Array, places: jax.Array) -> jax.Array:
        """Adds places ``[..., I, 2]`` to the votes ``[..., I, J, D]``."""
        features = self.sizes.out_features
        side = math.isqrt(features) if self.matrix else 0
        components = jnp.array([side - 1, 2 * side - 1] if self.matrix else [0, 1])
        shift = jnp.zeros((*places.shape[:-1], 1, features)).at[..., 0, components].set(places)
        return votes + jnp.broadcast_to(shift.astype(votes.dtype), votes.shape)


def _softmax_over_fields(fields: ReceptiveFields, logits: jax.Array) -> jax.Array:
    """Softmax of ``[..., P, Q, KH * KW * I, J]`` over the parents of all places of each child."""
    leading, children = logits.shape[:-2], logits.shape[-2]

    def per_place(x: jax.Array) -> jax.Array:
        return x.reshape(*leading, fields.size, children // fields.size)

    highest = fields.max(per_place(jax.lax.stop_gradient(jnp.max(logits, axis=-1))))
    # Places in no field have no logits; nobody looks at them.
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    shifted = logits - fields.gather(highest).reshape(*leading, children, 1)
    exponentials = jnp.exp(shifted)
    total = fields.sum(per_place(jnp.sum(exponentials, axis=-1)))
    totals = fields.gather(total, fill=1).reshape(*leading, children, 1)
    return exponentials / totals


def _places(grid: Sequence[int]) -> jax.Array:
    """Centres of the places of a grid in units of its sides, ``[H, W, 2]``."""
    rows, columns = ((jnp.arange(n) + 0.5) / n for n in grid)
    return jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return rows, columns
