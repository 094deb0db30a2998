"""A routing algorithm with its options and the parameters that it learns."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike

from capsjax.nn._checks import check_rngs
from capsjax.ops._checks import check_callable, check_sizes
from capsjax.routing import Children, Parameter, Routed, Sizes, algorithm
from capsjax.routing.fused import Implementation, check_implementation


class Router(nnx.Module):
    """Routing by an algorithm, with its options and the parameters that it learns.

    The algorithm's record lists the parameters and their initialisers:
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
        check_rngs(rngs)
        check_sizes(**Sizes(*sizes)._asdict())
        record.check_options(options, use_bias=use_bias)
        self.name = name
        learned = dict(record.parameters(sizes))
        self.per_child = tuple(key for key, parameter in learned.items() if parameter.per_child)
        if use_bias:
            learned["bias"] = Parameter(sizes[2:], bias_init)
        self.learned = tuple(learned)
        for parameter, (shape, init, _) in learned.items():
            init = options.get(f"{parameter}_init", init)
            check_callable(**{f"{parameter}_init": init})
            setattr(self, parameter, nnx.Param(init(rngs.params(), shape, param_dtype)))
        self.options = {k: v for k, v in options.items() if not k.endswith("_init")}

    def arguments(self, places: int = 1) -> dict[str, Any]:
        """Options and learned parameters by name.

        Args:
          places: of a grid that shares the layer's weights, and these.
        """
        learned = {name: getattr(self, name)[...] for name in self.learned}
        for name in self.per_child:
            learned[name] = _repeat(learned[name], places)
        return {**self.options, **learned}

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
        """Routes the children's votes, by a function that need not store them if there is one.

        Args:
          children: with their poses ``[..., I, K]``.
          make_votes: returns the votes ``[..., I, J, D]``, or None for an algorithm that makes its
            own.
          weights: ``[I, K, J, D]``, if the votes are their product with the poses, so that
            :func:`capsjax.dense_capsules` can make them; None if not.
          precision: of that product.
          implementation: of votes and routing; ``"reference"`` stores the votes.
          places: number of places of a grid that share weights and parameters, each with as many
            children as the layer has; None for a layer that shares nothing.

        Raises:
          ValueError: the algorithm has no such implementation, or these votes are made otherwise.
        """
        record = algorithm(self.name)
        check_implementation(implementation, self.name)
        stores = implementation in (None, "reference")
        fused = None if children.logits is not None else record.fused
        # Weights that places share would have to be copied, which costs more than to store votes.
        if fused is not None and weights is not None and not (stores and places is not None):
            return fused(
                children.poses,
                _repeat(weights, places or 1),
                where=children.where,
                precision=precision,
                implementation=implementation,
                **self.arguments(places or 1),
            )
        if not stores:
            raise ValueError(
                f"implementation {implementation!r} stores no votes, which these need; it must be"
                " None or 'reference'"
            )
        return record.route(make_votes(), children, self.arguments(places or 1))


def _repeat(x: jax.Array, places: int) -> jax.Array:
    """What a layer has for its children, once for each place that shares it."""
    return x if places == 1 else jnp.tile(x, (places, *[1] * (x.ndim - 1)))
