"""Votes and dynamic routing as one function."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax.ops import dense_votes, length
from capsjax.ops._checks import (
    accumulator,
    as_floating,
    as_integer,
    taking_part,
    zeros,
)
from capsjax.ops.votes import check_dense
from capsjax.routing.fused.blocked import Blocks
from capsjax.routing.fused.lanes import Lanes
from capsjax.routing.fused.recurrence import Sweeps, route
from capsjax.routing.record import algorithm
from capsjax.routing.routed import Routed

Implementation = Literal["reference", "blocked", "lanes"]

# With fewer numbers in the votes of a batch than this, storing them is faster everywhere.
_MANY_VOTES = 2**20
# Up to this many, storing them was faster on an H200, where nothing larger was measured.
_MOST_STORED_ON_GPU = 2**25


def dense_capsules(
    poses: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    num_iterations: int = 3,
    leaky: bool = False,
    where: ArrayLike | None = None,
    stop_gradient: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> Routed:
    r"""Votes of all children for all parents and dynamic routing, which need not store the votes.

    The same as ``dynamic_routing(dense_votes(poses, weights), ...)``:

    .. math::
      \hat u_{j|i} = W_{ij} u_i, \qquad
      v_j^{(t)} = \mathrm{squash}\Bigl(\sum_i c_{ij}^{(t)} \hat u_{j|i} + \beta_j\Bigr), \qquad
      c_{ij}^{(t)} = \mathrm{softmax}_j \Bigl(\hat u_{j|i} \cdot \sum_{\tau < t} v_j^{(\tau)}\Bigr)

    In the last form of the logits neither votes nor logits have to be kept: the first pass is one
    matrix product, the later ones compute what they need anew for some children at a time, and so
    does the gradient. Beyond arguments, results and a copy of the weights, memory grows with
    B·(I·K + J·K + J·D), not with B·I·J·D, where B are the leading axes. A batch is better one of
    them than mapped by ``vmap``, which gives every example a gradient of the weights of its own.

    Softmax, squash and all sums are float32 (or float64). Factors of matrix products are in the
    dtype to which poses and weights promote.

    Args:
      poses: child poses :math:`u`, ``[..., I, K]``, any floating dtype.
      weights: one matrix per pair, ``[I, K, J, D]``, floating.
      bias: :math:`\beta`, ``[J, D]``, added in every iteration.
      num_iterations: r, a Python integer of at least 1.
      leaky: each child may also go to no parent, as in :func:`capsjax.dynamic_routing`.
      where: children that take part, bool, broadcastable to ``[..., I]``. The others have no
        influence and no gradient, whatever their poses hold; their weights have to be finite.
      stop_gradient: no gradient through the logits, only through the last pass.
      precision: of the matrix products, as in :func:`jax.numpy.einsum`; None is the highest, so
        that float32 factors are not rounded on any platform, except where votes are stored: there
        it is the platform's default, TF32 on NVIDIA's GPUs.
      implementation: ``"reference"`` stores the votes and loops over the logits; it alone returns
        the coupling and has forward-mode derivatives. ``"blocked"`` and ``"lanes"``, in plain XLA,
        store neither votes nor logits; they differ in the layout of their blocks of children:
        ``"blocked"`` has children along the last axis, for CPUs, ``"lanes"`` the batch, for GPUs
        and TPUs. A name gives exactly that implementation on every platform. None chooses by the
        platform that the program is compiled for and by the sizes: ``"blocked"`` on CPUs,
        ``"lanes"`` elsewhere, and stored votes where these were measured to be faster, which is
        with fewer than 2²⁰ numbers in the votes of the batch, on CPUs where votes have fewer
        dimensions than the children's poses, and on NVIDIA's GPUs up to 2²⁵ numbers.

    Returns:
      :class:`Routed`: poses :math:`v` ``[..., J, D]`` and activations :math:`\|v\|` ``[..., J]`` in
      the dtype to which poses and weights promote. The coupling is ``[..., I, J]`` if the
      implementation is ``"reference"`` by name, else None.

    Raises:
      TypeError: poses, weights or bias are not floating point, ``where`` is not bool, or
        ``num_iterations`` is not an integer.
      ValueError: an argument has the wrong shape, ``num_iterations`` is below 1, or the
        implementation's name is unknown.
      NotImplementedError: ``"blocked"`` or ``"lanes"`` is named, and weights are of unknown size.

    Example:
      >>> import jax
      >>> from capsjax import dense_capsules
      >>> poses = jax.random.normal(jax.random.key(0), (2, 1152, 8))
      >>> weights = 0.1 * jax.random.normal(jax.random.key(1), (1152, 8, 10, 16))
      >>> routed = dense_capsules(poses, weights, num_iterations=3)
      >>> routed.poses.shape, routed.activations.shape
      ((2, 10, 16), (2, 10))

    Reference:
      Sabour, Frosst, Hinton, *Dynamic Routing Between Capsules*, NIPS 2017, equation 2 and
      procedure 1.
    """
    check_implementation(implementation)
    poses, weights = check_dense(poses, weights)
    iterations = as_integer("num_iterations", num_iterations)
    if where is not None:
        _, poses = taking_part(where, poses)
    if bias is not None:
        bias = as_floating("bias", bias)
        if bias.shape != weights.shape[2:]:
            raise ValueError(f"bias must have shape [J, D] = {weights.shape[2:]}, got {bias.shape}")
    options = _Options(iterations, bias, where, bool(leaky), bool(stop_gradient), precision)
    if implementation is not None:
        return _IMPLEMENTATIONS[implementation](options, poses, weights)
    preferred = {platform: _prefer(platform, poses, weights) for platform in ("cpu", "cuda", "tpu")}
    if len(set(preferred.values())) == 1:
        return _first_possible(preferred["tpu"], options, poses, weights)
    by_platform = {
        platform: functools.partial(_first_possible, names, options)
        for platform, names in preferred.items()
    }
    routed: Routed = lax.platform_dependent(
        poses, weights, cpu=by_platform["cpu"], cuda=by_platform["cuda"], default=by_platform["tpu"]
    )
    return routed


def check_implementation(implementation: str | None, routing: str = "dynamic") -> None:
    """Raises a ValueError unless this routing algorithm has an implementation of this name."""
    names = ("reference",) if algorithm(routing).fused is None else get_args(Implementation)
    if implementation is not None and implementation not in names:
        where = "" if routing == "dynamic" else f" for routing {routing!r}"
        raise ValueError(
            f"implementation must be None or one of {', '.join(names)}{where}, got"
            f" {implementation!r}"
        )


@dataclasses.dataclass(frozen=True)
class _Options:
    """Checked arguments of :func:`dense_capsules` besides poses and weights."""

    num_iterations: int
    bias: jax.Array | None
    where: ArrayLike | None
    leaky: bool
    stop_gradient: bool
    precision: lax.PrecisionLike


def _store(options: _Options, poses: jax.Array, weights: jax.Array) -> Routed:
    return algorithm("dynamic").function(
        dense_votes(poses, weights, precision=options.precision),
        num_iterations=options.num_iterations,
        bias=options.bias,
        where=options.where,
        leaky=options.leaky,
        stop_gradient=options.stop_gradient,
    )


def _sweep(
    make_sweeps: Callable[..., Sweeps], options: _Options, poses: jax.Array, weights: jax.Array
) -> Routed:
    if not _is_known(weights.shape):
        raise NotImplementedError(
            f"weights must have known sizes unless votes are stored, got shape {weights.shape}"
        )
    if 0 in (*poses.shape, *weights.shape):  # there is nothing to sweep over
        return _store(options, poses, weights)._replace(coupling=None)
    parents, dtype = weights.shape[2:], jnp.promote_types(poses.dtype, weights.dtype)
    flat = poses.astype(dtype).reshape(-1, *poses.shape[-2:])
    bias = jnp.zeros(parents) if options.bias is None else options.bias
    arguments = _alike(flat, weights.astype(dtype), bias.astype(accumulator(dtype)))
    sweeps = make_sweeps(
        *arguments[:2],
        leaky=options.leaky,
        stop_gradient=options.stop_gradient,
        precision=options.precision,
    )
    v = jnp.moveaxis(route(sweeps, options.num_iterations, *arguments), 0, -2)
    v = v.reshape(*poses.shape[:-2], *parents)
    return Routed(v.astype(dtype), length(v).astype(dtype), None)


_IMPLEMENTATIONS: dict[str, Callable[[_Options, jax.Array, jax.Array], Routed]] = {
    "reference": _store,
    "blocked": functools.partial(_sweep, Blocks.of),
    "lanes": functools.partial(_sweep, Lanes.of),
}


def _prefer(platform: str, poses: jax.Array, weights: jax.Array) -> tuple[str, ...]:
    """Implementations for a platform, the fastest first; measured in docs/performance.md."""
    stored, number = ("reference",), _number_of_votes(poses, weights)
    if number is not None and number < _MANY_VOTES:
        return stored
    if platform == "cpu":
        _, in_features, _, features = weights.shape
        if _is_known((in_features, features)) and in_features > features:
            return stored  # blocks would only save memory
        return ("blocked", *stored)
    if platform == "cuda" and number is not None and number <= _MOST_STORED_ON_GPU:
        return stored
    return ("lanes", *stored)


def _first_possible(
    names: tuple[str, ...], options: _Options, poses: jax.Array, weights: jax.Array
) -> Routed:
    """What the first implementation returns that can run, without its coupling."""
    *others, last = names
    for name in others:
        try:
            return _IMPLEMENTATIONS[name](options, poses, weights)
        except NotImplementedError:
            continue
    return _IMPLEMENTATIONS[last](options, poses, weights)._replace(coupling=None)


def _number_of_votes(poses: jax.Array, weights: jax.Array) -> int | None:
    """Numbers in the votes; None where a size is unknown."""
    children, _, parents, features = weights.shape
    sizes = (*poses.shape[:-2], children, parents, features)
    return math.prod(sizes) if _is_known(sizes) else None


def _is_known(shape: tuple[Any, ...]) -> bool:
    """Whether all sizes are numbers; those of an exported function may be symbols."""
    return all(isinstance(size, int) for size in shape)


def _alike(*arrays: jax.Array) -> list[jax.Array]:
    """The same arrays, each of which counts as different on a mesh axis if one of them does.

    Under ``shard_map`` a function with a derivative of its own has to return gradients of the type
    of its arguments; made alike, they are, and what made them alike adds up over the axis.
    """
    return [array + zeros((), array.dtype, *arrays) for array in arrays]
