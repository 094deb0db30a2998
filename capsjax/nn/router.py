"""A routing algorithm as a module, with its options and parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike

from capsjax.nn._checks import as_constant, check_rngs, named_inits
from capsjax.ops._checks import as_array, as_sizes, check_flags
from capsjax.routing import Children, Parameter, Routed, Sizes, algorithm
from capsjax.routing.fused import Implementation, check_implementation


class Router(nnx.Module):
    """A routing algorithm with its options and learned parameters.

    :attr:`capsjax.routing.Algorithm.parameters` lists the parameters and their initialisers. With
    ``use_bias`` there is also a ``bias`` ``[J, D]``.

    Args:
      name: one of :func:`capsjax.routing.algorithms`.
      sizes: sizes of the layer.
      options: keyword arguments of the routing function, and initialisers of parameters under names
        such as ``beta_a_init``.
      use_bias: whether the parents' sums have a bias.
      bias_init: initialiser of the bias.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses ``params``.

    Raises:
      TypeError: as :class:`capsjax.nn.DenseCapsules`, or an option is traced, or neither a number
        nor hashable.
      ValueError: the name or an option is unknown, or the algorithm has no bias.
    """

    def __init__(
        self,
        name: str,
        sizes: Sizes,
        *,
        options: Mapping[str, Any],
        use_bias: bool,
        bias_init: Initializer,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        record = algorithm(name)
        check_rngs(rngs)
        self.sizes = sizes = Sizes(*as_sizes(**Sizes(*sizes)._asdict()))
        check_flags(use_bias=use_bias)
        record.check_options(options, use_bias=use_bias)
        self.name = name
        learned = dict(record.parameters(sizes))
        self.per_child = tuple(key for key, parameter in learned.items() if parameter.per_child)
        if use_bias:
            learned["bias"] = Parameter(sizes[2:], bias_init)
        self.learned = tuple(learned)
        for parameter, (shape, init, _) in learned.items():
            option = f"{parameter}_init"
            (init,) = named_inits(**{option: options.get(option, init)})
            setattr(self, parameter, nnx.Param(init(rngs.params(), shape, param_dtype)))
        # As items, because static attributes have to be hashable.
        self.options = tuple(
            (option, as_constant(option, value))
            for option, value in sorted(options.items())
            if not option.endswith("_init")
        )

    def arguments(self, places: int = 1) -> dict[str, Any]:
        """Returns options and learned parameters by name.

        Args:
          places: number of grid positions that share the layer's parameters.
        """
        learned = {name: getattr(self, name)[...] for name in self.learned}
        for name in self.per_child:
            learned[name] = _repeat(learned[name], places)
        return {**dict(self.options), **learned}

    def __call__(
        self,
        children: Children,
        make_votes: Callable[[], jax.Array | None],
        *,
        weights: jax.Array | None = None,
        precision: PrecisionLike = None,
        implementation: Implementation | None = None,
        places: int | None = None,
    ) -> Routed:
        """Routes the children's votes, without storing them where possible.

        Args:
          children: poses ``[..., I, K]`` and other properties of the children.
          make_votes: returns the votes ``[..., I, J, D]``, or None if the algorithm makes its own.
          weights: ``[I, K, J, D]`` if the votes are the products of :func:`capsjax.dense_votes`,
            which then need not be stored; otherwise None.
          precision: precision of that product.
          implementation: of votes and routing; ``"reference"`` stores the votes.
          places: number of grid positions that share weights and parameters; None for a layer
            without a grid.

        Raises:
          TypeError: the algorithm does not return a :class:`capsjax.Routed` of arrays.
          ValueError: the algorithm or the votes do not support the implementation, or the algorithm
            returns arrays of wrong shapes.
        """
        record = algorithm(self.name)
        check_implementation(implementation, self.name)
        stores = implementation in (None, "reference")
        fused = None if children.logits is not None else record.fused
        # Shared weights would have to be copied per position, which costs more than storing votes.
        if fused is not None and weights is not None and not (stores and places is not None):
            routed = fused(
                children.poses,
                _repeat(weights, places or 1),
                where=children.where,
                precision=precision,
                implementation=implementation,
                **self.arguments(places or 1),
            )
            return self._checked(routed, children)
        if not stores:
            raise ValueError(
                "implementation must be None or 'reference' for votes that have to be stored, got"
                f" {implementation!r}"
            )
        routed = record.route(make_votes(), children, self.arguments(places or 1))
        return self._checked(routed, children)

    def _checked(self, routed: Any, children: Children) -> Routed:
        """Returns the result of an algorithm, or raises unless it describes the parents."""
        if not isinstance(routed, Routed):
            what = type(routed).__name__
            raise TypeError(f"routing {self.name!r} must return a capsjax.Routed, got {what}")
        parents = (*children.poses.shape[:-2], *self.sizes[2:])
        for name, value, axes, shape in (
            ("poses", routed.poses, "[..., J, D]", parents),
            ("activations", routed.activations, "[..., J]", parents[:-1]),
        ):
            what = f"{name} of routing {self.name!r}"
            array = as_array(what, value)
            if array.shape != shape:
                raise ValueError(f"{what} must have shape {axes} = {shape}, got {array.shape}")
        return routed


def _repeat(x: jax.Array, places: int) -> jax.Array:
    """Repeats an array per child of a layer for each grid position."""
    return x if places == 1 else jnp.tile(x, (places, *[1] * (x.ndim - 1)))
