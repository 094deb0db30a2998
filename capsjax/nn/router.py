"""A routing algorithm with its options and the parameters that it learns."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike

from capsjax.routing import Children, Parameter, Routed, Sizes, algorithm
from capsjax.routing.fused import Implementation, check_implementation


class Router(nnx.Module):
    """Routing by an algorithm, with its options and the parameters that it learns.

    What an algorithm learns, and how that is initialised, its record says:
    :attr:`capsjax.routing.Algorithm.parameters`. With ``use_bias`` it learns a ``bias`` ``[J, D]``
    besides.

    Args:
      name: one of :func:`capsjax.routing.algorithms`.
      sizes: of the layer.
      options: keyword arguments of the routing function, and initialisers of the parameters by
        names such as ``beta_a_init``.
      use_bias: whether the parents' sums have a bias.
      bias_init: initialiser of the bias.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses ``params``.

    Raises:
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
        record.check_options(options, use_bias=use_bias)
        self.name = name
        self.in_capsules = sizes.in_capsules
        learned = record.parameters(sizes)
        self.per_child = tuple(key for key, parameter in learned.items() if parameter.per_child)
        if use_bias:
            learned["bias"] = Parameter(sizes[2:], bias_init)
        self.learned = tuple(learned)
        for parameter, (shape, init, _) in learned.items():
            init = options.get(f"{parameter}_init", init)
            setattr(self, parameter, nnx.Param(init(rngs.params(), shape, param_dtype)))
        self.options = {k: v for k, v in options.items() if not k.endswith("_init")}

    def arguments(self, places: int = 1) -> dict[str, Any]:
        """Options and learned parameters by name.

        Args:
          places: of a grid that shares the layer's weights, and these.
        """
        learned = {name: getattr(self, name)[...] for name in self.learned}
        if places > 1:
            for name in self.per_child:
                learned[name] = jnp.tile(learned[name], (places, *[1] * (learned[name].ndim - 1)))
        return {**self.options, **learned}

    def __call__(
        self,
        children: Children,
        make_votes: Callable[[], jax.Array | None],
        *,
        weights: jax.Array | None = None,
        precision: PrecisionLike = None,
        implementation: Implementation | None = None,
    ) -> Routed:
        """Routes the children's votes, by a function that need not store them if there is one.

        Args:
          children: with their poses ``[..., I, K]``.
          make_votes: returns the votes ``[..., I, J, D]``, or None for an algorithm that makes its
            own.
          weights: ``[I, K, J, D]``, if the votes are their product with the poses and may be left
            to :func:`capsjax.dense_capsules`; None if not.
          precision: of that product.
          implementation: of votes and routing; ``"reference"`` stores the votes.

        Raises:
          ValueError: the algorithm has no such implementation, or these votes are made otherwise.
        """
        record = algorithm(self.name)
        check_implementation(implementation, self.name)
        if record.fused is not None and weights is not None and children.logits is None:
            return record.fused(
                children.poses,
                weights,
                where=children.where,
                precision=precision,
                implementation=implementation,
                **self.arguments(),
            )
        if implementation not in (None, "reference"):
            raise ValueError(
                f"implementation {implementation!r} stores no votes, which these need; it must be"
                " None or 'reference'"
            )
        places = children.poses.shape[-2] // self.in_capsules
        return record.route(make_votes(), children, self.arguments(places))
