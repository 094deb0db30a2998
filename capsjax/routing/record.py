"""One record for each routing algorithm: all that layers, tools and commands need to know of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike

from capsjax.ops import length
from capsjax.ops._checks import as_integer, check_choice
from capsjax.routing._passes import Passes
from capsjax.routing.routed import Routed


class Sizes(NamedTuple):
    """Sizes of a capsule layer: I children of K dimensions, J parents of D."""

    in_capsules: int
    in_features: int
    out_capsules: int
    out_features: int


class Children(NamedTuple):
    """What an algorithm may use of the children besides their votes.

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


class Parameter(NamedTuple):
    """A learned array of a layer.

    Attributes:
      shape: for the sizes of the layer.
      init: initialiser.
      per_child: whether the first axis is I, which a layer that shares weights between places
        repeats for each of them.
    """

    shape: tuple[int, ...]
    init: Initializer
    per_child: bool = False


def no_parameters(sizes: Sizes) -> dict[str, Parameter]:
    """The parameters of an algorithm that learns nothing."""
    del sizes
    return {}


def as_given(children: Children, given: dict[str, Any]) -> dict[str, Any]:
    """Parameters and options under their own names, as most routing functions take them."""
    del children
    return given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A routing algorithm. Calling it calls its function.

    Attributes:
      name: as in ``routing="em"``.
      function: from votes ``[..., I, J, D]``, or from poses if it makes its own votes, and keyword
        arguments to :class:`capsjax.Routed`.
      paper: authors, venue and year.
      passes: its iterations as :class:`capsjax.routing.Passes`, to trace them; None if it makes one
        pass.
      parameters: what a layer learns for it, by name.
      options: keyword arguments that a layer hands on, besides parameters.
      arguments: turns parameters and options by name into keyword arguments of the function.
      has_bias: whether it takes ``bias`` ``[J, D]``.
      takes_activations: whether it takes the children's ``activations``.
      takes_logits: whether it takes prior ``logits``.
      takes_normalize: whether it takes ``normalize``.
      makes_votes: whether the function makes votes of poses and takes none.
      squash: makes a parent's pose of its sum, so that its length is the parent's activation; None
        where activations are something else.
      fused: ``fused(poses, weights, *, implementation, precision, ...)``: votes and routing in one
        function, which need not store the votes; None if there is none.
      class_capsules: keyword arguments of the layer of class capsules of
        :class:`capsjax.models.CapsNet`, where that does not train with the defaults.
    """

    name: str
    function: Callable[..., Routed]
    paper: str
    passes: Callable[..., Passes] | None = None
    parameters: Callable[[Sizes], dict[str, Parameter]] = no_parameters
    options: tuple[str, ...] = ()
    arguments: Callable[[Children, dict[str, Any]], dict[str, Any]] = as_given
    has_bias: bool = False
    takes_activations: bool = False
    takes_logits: bool = False
    takes_normalize: bool = False
    makes_votes: bool = False
    squash: Callable[..., jax.Array] | None = None
    fused: Callable[..., Routed] | None = None
    class_capsules: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def iterates(self) -> bool:
        """Whether the number of iterations is an option."""
        return "num_iterations" in self.options

    def __call__(self, *args: Any, **kwargs: Any) -> Routed:
        """Calls the routing function."""
        return self.function(*args, **kwargs)

    def route(
        self, votes: jax.Array | None, children: Children, given: Mapping[str, Any]
    ) -> Routed:
        """Routes votes ``[..., I, J, D]``, or what the children's poses make of themselves.

        Args:
          votes: None for an algorithm that makes its own.
          children: whatever else is known of the children.
          given: parameters and options by name.
        """
        first = children.poses if votes is None else votes
        return self.function(first, **self.keyword_arguments(children, given))

    def keyword_arguments(self, children: Children, given: Mapping[str, Any]) -> dict[str, Any]:
        """The function's keyword arguments, of children and of parameters and options by name.

        Raises:
          ValueError: there are prior logits and the algorithm takes none.
        """
        arguments = {**self.arguments(children, dict(given)), "where": children.where}
        if self.takes_activations:
            present = children.activations
            arguments["activations"] = length(children.poses) if present is None else present
        if children.logits is not None:
            if not self.takes_logits:
                raise ValueError(f"routing {self.name!r} takes no prior logits")
            arguments["logits"] = children.logits
        if self.takes_normalize:
            arguments["normalize"] = children.normalize
        return arguments

    def check_options(self, options: Mapping[str, Any], *, use_bias: bool = False) -> None:
        """Raises unless a layer may be given these options, and a bias."""
        known = [*self.options, *(f"{name}_init" for name in self.parameters(Sizes(1, 1, 1, 1)))]
        for option in options:
            if option not in known:
                only = f"only {', '.join(known)}" if known else "it has none"
                raise ValueError(f"routing {self.name!r} has no option {option!r}, {only}")
        if "num_iterations" in options:
            as_integer("num_iterations", options["num_iterations"])
        if use_bias and not self.has_bias:
            raise ValueError(f"routing {self.name!r} has no bias")


_ALGORITHMS: dict[str, Algorithm] = {}


def register(record: Algorithm) -> Algorithm:
    """Makes an algorithm known by its name to layers, networks, commands, benchmarks and pictures.

    Args:
      record: what there is to know of it.

    Returns:
      The record.

    Raises:
      ValueError: another algorithm has this name.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import nn, ops, routing
      >>> def first_child_routing(votes, *, where=None):
      ...   poses = ops.squash(votes[..., 0, :, :])
      ...   return routing.Routed(poses, ops.length(poses), None)
      >>> record = routing.register(routing.Algorithm(
      ...     name="first_child", function=first_child_routing, paper="", squash=ops.squash))
      >>> from flax import nnx
      >>> layer = nn.DenseCapsules(6, 4, 3, 8, routing="first_child", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 6, 4))).poses.shape
      (2, 3, 8)
      >>> routing.unregister("first_child")
    """
    if record.name in _ALGORITHMS:
        raise ValueError(f"routing {record.name!r} is registered already")
    _ALGORITHMS[record.name] = record
    return record


def unregister(name: str) -> None:
    """Forgets an algorithm, so that another one may take its name."""
    del _ALGORITHMS[name]


def algorithms() -> tuple[str, ...]:
    """Names of the routing algorithms.

    Example:
      >>> from capsjax import routing
      >>> "em" in routing.algorithms()
      True
    """
    return tuple(_ALGORITHMS)


def algorithm(name: str) -> Algorithm:
    """Returns the record of an algorithm, which can be called like its routing function.

    Raises:
      ValueError: there is no such algorithm.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax import routing
      >>> kmeans = routing.algorithm("kmeans")
      >>> kmeans(jnp.ones((6, 4, 2)), num_iterations=2).poses.shape
      (4, 2)
      >>> kmeans.iterates
      True
    """
    check_choice("routing", name, _ALGORITHMS)
    return _ALGORITHMS[name]
