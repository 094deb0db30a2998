"""A routing algorithm with its options and the parameters that it learns."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from capsjax.ops import length
from capsjax.ops.capsule import unit
from capsjax.routing import HeinsenParameters, Routed, algorithm

# Parameters whose first axis is I.
_PER_CHILD = {"logit_kernel", "logit_bias", "prior"}


class Sizes(NamedTuple):
    """Of a capsule layer: I children with K dimensions, J parents with D."""

    in_capsules: int
    in_features: int
    out_capsules: int
    out_features: int


class Children(NamedTuple):
    """What a router may look at besides the votes.

    Attributes:
      poses: ``[..., I, K]``.
      activations: ``[..., I]``; the lengths of the poses when None.
      logits: prior logits, broadcastable to ``[..., I, J]``, or None.
      where: children that take part, broadcastable to ``[..., I]``, or None for all.
      normalize: how children compete for parents in several rows of the leading axes, or None; see
        :func:`capsjax.em_routing`.
    """

    poses: jax.Array
    activations: jax.Array | None = None
    logits: ArrayLike | None = None
    where: ArrayLike | None = None
    normalize: Callable[[jax.Array], jax.Array] | None = None

    def present(self) -> jax.Array:
        """The children's activations."""
        return length(self.poses) if self.activations is None else self.activations


class Router(nnx.Module):
    """A routing algorithm by name, with its options and the parameters that it learns.

    ===============  ===========================================================================
    name             learned parameters, and how they begin
    ===============  ===========================================================================
    ``dynamic``      with ``use_bias``: ``bias`` ``[J, D]``, from ``bias_init``
    ``kmeans``       the same
    ``uniform``      the same
    ``random``       the same; the couplings are fixed by the option ``seed``
    ``em``           ``beta_a``, ``beta_u`` ``[J]``, zeros
    ``variational``  ``beta_a``, ``beta_u`` ``[J]``, zeros
    ``self``         logits' ``logit_kernel`` ``[I, K, J]`` and ``logit_bias`` ``[I, J]``, zeros
    ``attention``    layer normalisation's ``scale`` ``[D]``, ones, and ``offset`` ``[D]``, zeros
    ``efficient``    ``prior`` ``[I, J]``, zeros
    ``heinsen``      the fields of :class:`capsjax.HeinsenParameters`, normal, scaled as in the
                     author's code; these make the votes, too
    ===============  ===========================================================================

    Args:
      name: one of :func:`capsjax.routing.algorithms`.
      sizes: of the layer.
      options: keyword arguments of the routing function; and initialisers of the parameters, named
        ``beta_a_init`` and the like.
      use_bias: whether the parents' sums have a bias.
      bias_init: initialiser of the bias.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses ``params``.

    Raises:
      ValueError: the name, an option, or a bias is not to be had.
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
        check_options(name, options, use_bias=use_bias)
        self.name = name
        self.in_capsules = sizes.in_capsules
        learned = _learned(name, sizes)
        if use_bias:
            learned["bias"] = (sizes[2:], bias_init)
        self.learned = tuple(learned)
        for parameter, (shape, init) in learned.items():
            init = options.get(f"{parameter}_init", init)
            setattr(self, parameter, nnx.Param(init(rngs.params(), shape, param_dtype)))
        self.options = {k: v for k, v in options.items() if not k.endswith("_init")}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the routing function: options, and what is learned."""
        return {**self.options, **self.parameters()}

    def parameters(self) -> dict[str, jax.Array]:
        """The arrays that are learned, by name."""
        return {name: getattr(self, name)[...] for name in self.learned}

    def __call__(self, votes: jax.Array | None, children: Children) -> Routed:
        """Routes votes ``[..., I, J, D]``; None for a router that makes its own."""
        function = algorithm(self.name)
        options = dict(self.options)
        learned = self.parameters()
        # A layer that shares its weights between the places of a grid shares these, too.
        places = children.poses.shape[-2] // self.in_capsules
        for name in _PER_CHILD & learned.keys():
            learned[name] = jnp.tile(learned[name], (places, *[1] * (learned[name].ndim - 1)))
        if children.logits is not None:
            if self.name != "dynamic":
                raise ValueError(f"logits are for routing 'dynamic', not {self.name!r}")
            options["logits"] = children.logits
        options["where"] = children.where
        if votes is None:
            return function(children.poses, HeinsenParameters(**learned), **options)
        if self.name == "self":
            logits = _read_out(children.poses, **learned)
            return function(votes, children.present(), logits, **options)
        if self.name in ("em", "variational"):
            options["normalize"] = children.normalize
            return function(votes, children.present(), **learned, **options)
        if self.name == "random":
            options["key"] = jax.random.key(options.pop("seed", 0))
        return function(votes, **learned, **options)


def makes_votes(name: str) -> bool:
    """Whether this algorithm makes votes out of the poses, and takes none."""
    return name == "heinsen"


def check_options(name: str, options: Mapping[str, Any], *, use_bias: bool = False) -> None:
    """Raises a ValueError unless these are options of the routing algorithm of this name."""
    arguments = inspect.signature(algorithm(name)).parameters
    learned = _learned(name, Sizes(1, 1, 1, 1))
    known = [
        "seed" if argument == "key" else argument
        for argument, parameter in arguments.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and argument not in (*learned, "bias", "logits", "where", "normalize")
    ]
    known += [f"{parameter}_init" for parameter in learned]
    for option in options:
        if option not in known:
            only = f"only {', '.join(known)}" if known else "it has none"
            raise ValueError(f"routing {name!r} has no option {option!r}, {only}")
    if use_bias and "bias" not in arguments:
        raise ValueError(f"routing {name!r} has no bias")


def _learned(name: str, sizes: Sizes) -> dict[str, tuple[tuple[int, ...], Initializer]]:
    """Shapes and initialisers of what an algorithm always learns."""
    children, in_features, parents, features = sizes
    zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
    if name in ("em", "variational"):
        return {"beta_a": ((parents,), zeros), "beta_u": ((parents,), zeros)}
    if name == "self":
        return {
            "logit_kernel": ((children, in_features, parents), zeros),
            "logit_bias": ((children, parents), zeros),
        }
    if name == "attention":
        return {"scale": ((features,), ones), "offset": ((features,), zeros)}
    if name == "efficient":
        return {"prior": ((children, parents), zeros)}
    if name == "heinsen":
        shapes = HeinsenParameters.shapes(*sizes)
        deviations = {
            "activation_kernel": 2 * in_features**-0.5,
            "vote_gates": 1.0,
            "vote_kernel": 2 * in_features**-0.5,
            "prediction_kernel": features**-0.5,
            "prediction_gates": 1.0,
            "score_scale": in_features**-0.5,
            "use": 1.0,
            "ignore": 1.0,
        }
        return {
            parameter: (shape, nnx.initializers.normal(deviations.get(parameter, 0.0)))
            for parameter, shape in shapes.items()
        }
    return {}


def _read_out(poses: jax.Array, logit_kernel: jax.Array, logit_bias: jax.Array) -> jax.Array:
    """Logits ``[..., I, J]`` of children, each by a classifier of its own, in float32 or wider.

    It sees which way a pose points, with components of about one; how long it is, is the child's
    activation.
    """
    wide = jnp.promote_types(poses.dtype, logit_bias.dtype)
    direction = unit(poses.astype(wide)) * math.sqrt(poses.shape[-1])
    logits = jnp.einsum("...ik,ikj->...ij", direction, logit_kernel.astype(wide))
    return logits + jnp.broadcast_to(logit_bias, logits.shape).astype(wide)
