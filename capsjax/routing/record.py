"""Records, which describe the routing algorithms to layers, commands and tools."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike

from capsjax.ops import length
from capsjax.ops._checks import as_integer, check_callable, check_choice
from capsjax.routing._passes import Passes
from capsjax.routing.routed import Routed


class Sizes(NamedTuple):
    """Sizes of a capsule layer: I children of K dimensions, J parents of D."""

    in_capsules: int
    in_features: int
    out_capsules: int
    out_features: int


class Children(NamedTuple):
    """Properties of the children that an algorithm may use besides the votes.

    Attributes:
      poses: ``[..., I, K]``.
      activations: ``[..., I]``; the lengths of the poses when None.
      logits: prior logits, broadcastable to ``[..., I, J]``, or None.
      where: children that take part, broadcastable to ``[..., I]``, or None for all.
      normalize: replaces the softmax over the parents, or None; see :func:`capsjax.em_routing`.
    """

    poses: jax.Array
    activations: jax.Array | None = None
    logits: ArrayLike | None = None
    where: ArrayLike | None = None
    normalize: Callable[[jax.Array], jax.Array] | None = None


class Parameter(NamedTuple):
    """A learned array of a layer.

    Attributes:
      shape: its shape.
      init: its initialiser.
      per_child: whether the first axis is I. A layer that shares weights between positions repeats
        the array along this axis.
    """

    shape: tuple[int, ...]
    init: Initializer
    per_child: bool = False


def no_parameters(sizes: Sizes) -> dict[str, Parameter]:
    """Returns no parameters."""
    del sizes
    return {}


def as_given(children: Children, given: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters and options under their own names, as most functions take them."""
    del children
    return given


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Algorithm:
    """The record of a routing algorithm. Calling it calls its function.

    Attributes:
      name: as in ``routing="em"``.
      function: maps votes ``[..., I, J, D]``, or poses if ``makes_votes``, and keyword arguments to
        :class:`capsjax.Routed`.
      paper: authors, venue and year.
      passes: returns its iterations as :class:`capsjax.routing.Passes`, for traces; None if it
        takes a single pass.
      parameters: maps the sizes of a layer to its learned parameters, by name.
      options: keyword arguments that a layer accepts and passes on.
      arguments: maps parameters and options by name to keyword arguments of the function.
      has_bias: whether it takes ``bias`` ``[J, D]``.
      takes_activations: whether it takes the children's ``activations``.
      takes_logits: whether it takes prior ``logits``.
      takes_normalize: whether it takes ``normalize``.
      makes_votes: whether the function takes poses instead of votes.
      squash: maps a parent's sum to its pose, whose length is the activation; None if activations
        are not lengths of poses.
      fused: ``fused(poses, weights, *, implementation, precision, ...)``, which computes votes and
        routing together and need not store the votes; or None.
      class_capsules: keyword arguments for the class capsules of :class:`capsjax.models.CapsNet`,
        for algorithms that do not train with the defaults.
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
        """Routes votes ``[..., I, J, D]``, or poses if the algorithm makes its own votes.

        Args:
          votes: None if the algorithm makes its own.
          children: poses and other properties of the children.
          given: parameters and options by name.
        """
        first = children.poses if votes is None else votes
        return self.function(first, **self.keyword_arguments(children, given))

    def keyword_arguments(self, children: Children, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the function's keyword arguments.

        Raises:
          ValueError: there are prior logits, and the algorithm takes none.
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
        """Raises unless a layer accepts these options, and a bias if `use_bias`."""
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

# What layers take, set or pass on themselves: no name for an option or a learned parameter.
_RESERVED = """
    activations arguments bias bias_init coordinates dtype features implementation in_capsules
    in_features in_types kernel_init kernel_size learned logits name normalize num_spatial_dims
    options out_capsules out_features out_types padding param_dtype per_child poses precision rngs
    routing self sizes strides use_bias votes weights where
"""


def _check_fields(record: Any) -> None:
    """Raises unless `record` is one, with a new name and with fields of the right types."""
    if not isinstance(record, Algorithm):
        what = type(record).__name__
        raise TypeError(f"record must be a capsjax.routing.Algorithm, got {what}")
    if not isinstance(record.name, str) or not record.name:
        raise ValueError(f"name must be a string that is not empty, got {record.name!r}")
    if record.name in _ALGORITHMS:
        raise ValueError(f"routing {record.name!r} is already registered")
    check_callable(
        function=record.function, parameters=record.parameters, arguments=record.arguments
    )
    for field in ("passes", "squash", "fused"):
        if (function := getattr(record, field)) is not None:
            check_callable(**{field: function})
    options: Any = record.options
    if not isinstance(options, tuple | list) or not all(isinstance(o, str) for o in options):
        raise TypeError(f"options must be a tuple of names, got {options!r}")


def _check_names(record: Algorithm) -> None:
    """Raises if an option or a learned parameter could not reach the algorithm by its name."""
    parameters: Any = record.parameters(Sizes(1, 1, 1, 1))
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must return a dict, got {type(parameters).__name__}")
    reserved = _RESERVED.split()
    for kind, names in (("option", record.options), ("parameter", parameters)):
        for name in names:
            if name in reserved or f"{name}_init" in reserved:
                raise ValueError(
                    f"routing {record.name!r} has {kind} {name!r}, a name that layers use"
                )
    for name in record.options:
        if name in parameters or name.endswith("_init"):
            raise ValueError(
                f"routing {record.name!r} has option {name!r}, a name that its parameters may use"
            )


def register(record: Algorithm) -> Algorithm:
    """Registers an algorithm, so that layers, networks, commands and figures find it by its name.

    Args:
      record: describes the algorithm.

    Returns:
      The record.

    Raises:
      TypeError: not a record, or a field has the wrong type.
      ValueError: the name is empty or already registered, or an option or a parameter has a name
        that layers use.

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
    _check_fields(record)
    _check_names(record)
    _ALGORITHMS[record.name] = record
    return record


def unregister(name: str) -> None:
    """Removes an algorithm, so that another one can take its name.

    Raises:
      ValueError: ``name`` is unknown.
    """
    check_choice("name", name, _ALGORITHMS)
    del _ALGORITHMS[name]


def algorithms() -> tuple[str, ...]:
    """Returns the names of the routing algorithms.

    Example:
      >>> from capsjax import routing
      >>> "em" in routing.algorithms()
      True
    """
    return tuple(_ALGORITHMS)


def algorithm(name: str) -> Algorithm:
    """Returns the record of an algorithm, which can be called like its function.

    Raises:
      ValueError: ``name`` is unknown.

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
