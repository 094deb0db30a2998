"""Base class of layers on a grid, whose positions share weights and routing."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from capsjax.nn._checks import check_numerics, check_rngs, named_inits
from capsjax.nn.router import Router
from capsjax.ops import dense_votes
from capsjax.ops._checks import as_array, as_floating, spatial_axes, taking_part
from capsjax.routing import Sizes, algorithm
from capsjax.routing.fused import Implementation, check_implementation

# Votes then have the scale of the poses, for any number of children.
kernel_init_per_child = nnx.initializers.variance_scaling(
    1.0, "fan_in", "normal", in_axis=-3, out_axis=(-2, -1), batch_axis=(-4,)
)


class SharedWeights(nnx.Module):
    """Weights and a router shared by all positions of a grid.

    Args:
      in_types: types of child capsules per position.
      sizes: sizes of the votes of one parent's children.
      num_spatial_dims: number of axes of the grid.
      options: options of the routing function.

    The other arguments are those of :class:`capsjax.nn.ConvCapsules`.
    """

    def __init__(
        self,
        in_types: int,
        sizes: Sizes,
        *,
        num_spatial_dims: int,
        routing: str,
        use_bias: bool,
        dtype: Dtype | None,
        param_dtype: Dtype,
        precision: PrecisionLike,
        kernel_init: Initializer,
        bias_init: Initializer,
        implementation: Implementation | None,
        rngs: nnx.Rngs,
        options: Mapping[str, Any],
    ):
        check_rngs(rngs)
        check_numerics(dtype, param_dtype, precision)
        kernel_init, bias_init = named_inits(kernel_init=kernel_init, bias_init=bias_init)
        check_shares_weights(routing)
        check_implementation(implementation, routing)
        self.in_types = in_types
        self.sizes = sizes
        self.num_spatial_dims = num_spatial_dims
        self.dtype = dtype
        self.precision = precision
        self.implementation = implementation
        shape = self._kernel_shape(sizes)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.router = Router(
            routing,
            sizes,
            options=options,
            use_bias=use_bias,
            bias_init=bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def _kernel_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes)

    def _make_votes(self, poses: jax.Array, kernel: jax.Array) -> jax.Array:
        return dense_votes(poses, kernel, precision=self.precision)

    def _dense_weights(self, kernel: jax.Array) -> jax.Array | None:
        """Returns the kernel if votes are those of :func:`dense_votes`, otherwise None."""
        return kernel

    def _check_inputs(
        self, poses: jax.Array, activations: jax.Array | None, where: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Returns poses ``[..., H, W, I, K]``, zero where masked, activations, mask; or raises."""
        poses = as_array("poses", poses)
        types, features = self.in_types, self.sizes.in_features
        if poses.ndim < self.num_spatial_dims + 2 or poses.shape[-2:] != (types, features):
            axes = spatial_axes(self.num_spatial_dims)
            raise ValueError(
                f"poses must have shape [..., {axes}, I, K] = [..., {axes}, {types}, {features}],"
                f" got shape {poses.shape}"
            )
        if activations is not None:
            activations = as_floating("activations", activations)
            if activations.shape != poses.shape[:-1]:
                raise ValueError(
                    f"activations must have shape {poses.shape[:-1]}, got {activations.shape}"
                )
        if where is None:
            return poses, activations, None
        mask, poses = taking_part(where, poses)
        return poses, activations, mask[..., 0]

    def _grid(self, poses: jax.Array) -> tuple[int, ...]:
        return poses.shape[-2 - self.num_spatial_dims : -2]


def check_shares_weights(routing: str) -> None:
    """Raises a ValueError if an algorithm makes its own votes, with weights per child."""
    if algorithm(routing).makes_votes:
        raise ValueError(
            f"routing {routing!r} makes its own votes, and positions cannot share their weights"
        )
