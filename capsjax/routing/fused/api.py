"""Votes and dynamic routing as one function."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax.ops import dense_votes, length
from capsjax.ops._checks import (
    accumulator,
    alike,
    as_floating,
    as_integer,
    check_flags,
    is_constant,
    is_sharded,
    taking_part,
)
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.ops.votes import check_dense
from capsjax.routing.fused.blocked import Blocks
from capsjax.routing.fused.hopper_sizes import TILE
from capsjax.routing.fused.lanes import Lanes
from capsjax.routing.fused.mosaic_gpu import MosaicGpu
from capsjax.routing.fused.recurrence import Sweeps, route
from capsjax.routing.record import algorithm
from capsjax.routing.routed import Routed

Implementation = Literal["reference", "blocked", "lanes", "mosaic_gpu"]

# Storing the votes of a batch is faster everywhere if they have fewer numbers than this.
_MANY_VOTES = 2**20
# On GPUs, storing up to this many was faster than "lanes"; larger sizes were not measured.
_MOST_STORED_ON_GPU = 2**25
# The kernel for GPUs stores as many numbers for gradients. It was three to five times as fast as
# "lanes" at the paper's sizes; larger ones were not measured.
_MOST_BY_KERNEL = 2**27


@compiled_outside_jit
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
    r"""Computes votes and dynamic routing together, without storing the votes if they are many.

    The result is that of ``dynamic_routing(dense_votes(poses, weights), ...)``:

    .. math::
      \hat u_{j|i} = W_{ij} u_i, \qquad
      v_j^{(t)} = \mathrm{squash}\Bigl(\sum_i c_{ij}^{(t)} \hat u_{j|i} + \beta_j\Bigr), \qquad
      c_{ij}^{(t)} = \mathrm{softmax}_j \Bigl(\hat u_{j|i} \cdot \sum_{\tau < t} v_j^{(\tau)}\Bigr)

    In this form, neither votes nor logits have to be kept. The first pass is one matrix product;
    the later ones, and the gradient, recompute votes for a block of children at a time. With
    ``"blocked"`` and ``"lanes"``, memory beyond arguments, results and a copy of the weights grows
    with B·(I·K + J·K + J·D) instead of B·I·J·D, where B is the size of the leading axes. Pass a
    batch as a leading axis instead of using ``vmap``, which computes a gradient of the weights for
    every example.

    Softmax, squash and all sums are float32 (or float64). Factors of matrix products have the dtype
    to which poses and weights promote.

    Args:
      poses: child poses :math:`u`, ``[..., I, K]``, any floating dtype.
      weights: one matrix per pair, ``[I, K, J, D]``, floating.
      bias: :math:`\beta`, ``[J, D]``, added in every iteration.
      num_iterations: r, a Python integer of at least 1.
      leaky: lets a child go to no parent, as in :func:`capsjax.dynamic_routing`.
      where: children that take part, bool, broadcastable to ``[..., I]``. The others have no
        influence and no gradient, whatever their poses are; their weights have to be finite.
      stop_gradient: stops gradients through the logits; they flow through the last pass only.
      precision: precision of the matrix products, as in :func:`jax.numpy.einsum`. None means the
        highest, so that float32 factors are not rounded; if votes are stored, and in
        ``"mosaic_gpu"``, it means the platform's default, which is TF32 on NVIDIA GPUs.
      implementation: ``"reference"`` stores the votes. It alone returns the coupling and supports
        forward-mode differentiation. ``"blocked"`` and ``"lanes"`` store neither votes nor logits.
        They differ in the last axis of their blocks: the children in ``"blocked"``, for CPUs, the
        batch in ``"lanes"``, for GPUs and TPUs. ``"mosaic_gpu"`` is a kernel for NVIDIA GPUs of
        compute capability 9.0 (Hopper) and sizes up to J·(D + 4) = 224; it needs jax 0.11 and
        stores the gradient of the votes. A name selects that implementation on every platform. None
        selects by sizes and by the platform that the program is compiled for: ``"blocked"`` on CPUs
        and ``"lanes"`` elsewhere, but stored votes where they are faster. That is the case with
        fewer than 2²⁰ numbers in the votes of the batch, on CPUs if votes have fewer dimensions
        than the children's poses, and on NVIDIA GPUs up to 2²⁵ numbers. Before these, GPUs take
        the kernel if it supports the arguments, up to 2²⁷ numbers and with B of at least 32; not
        in programs that are exported or partitioned by XLA. Votes of explicitly sharded arguments
        are always stored.

    Returns:
      :class:`Routed`: poses :math:`v` ``[..., J, D]`` and activations :math:`\|v\|` ``[..., J]`` in
      the dtype to which poses and weights promote. The coupling is ``[..., I, J]`` if the
      implementation is ``"reference"`` by name, else None.

    Raises:
      TypeError: poses, weights or bias are not floating point, ``where`` is not bool, or
        ``num_iterations`` is not an integer, or ``leaky`` or ``stop_gradient`` is not a bool.
      ValueError: an argument has the wrong shape, ``num_iterations`` is below 1, or
        ``implementation`` is unknown.
      NotImplementedError: ``implementation`` is ``"blocked"`` or ``"lanes"``, and the sizes of the
        weights are symbolic; it is ``"mosaic_gpu"``, and device, sizes, dtype or precision are not
        supported; or it is not ``"reference"``, and an argument is explicitly sharded.

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
    check_flags(leaky=leaky, stop_gradient=stop_gradient)
    if where is not None:
        _, poses = taking_part(where, poses)
    if bias is not None:
        bias = as_floating("bias", bias)
        if bias.shape != weights.shape[2:]:
            raise ValueError(f"bias must have shape [J, D] = {weights.shape[2:]}, got {bias.shape}")
    named = implementation is not None
    options = _Options(iterations, bias, where, leaky, stop_gradient, precision, named)
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
    """Raises a ValueError unless the routing algorithm has this implementation."""
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
    named: bool
    """Whether the implementation was selected by its name."""


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
    if not is_constant(weights.shape):
        raise NotImplementedError(
            f"weights must have constant sizes unless votes are stored, got shape {weights.shape}"
        )
    if is_sharded(poses, weights):
        raise NotImplementedError("explicitly sharded arrays need implementation 'reference'")
    if 0 in (*poses.shape, *weights.shape):  # nothing to sweep over
        return _store(options, poses, weights)._replace(coupling=None)
    parents, dtype = weights.shape[2:], jnp.promote_types(poses.dtype, weights.dtype)
    flat = poses.astype(dtype).reshape(-1, *poses.shape[-2:])
    bias = jnp.zeros(parents) if options.bias is None else options.bias
    arguments = alike(flat, weights.astype(dtype), bias.astype(accumulator(dtype)))
    sweeps = make_sweeps(
        *arguments[:2],
        leaky=options.leaky,
        stop_gradient=options.stop_gradient,
        precision=options.precision,
    )
    v = jnp.moveaxis(route(sweeps, options.num_iterations, *arguments), 0, -2)
    v = v.reshape(*poses.shape[:-2], *parents)
    return Routed(v.astype(dtype), length(v).astype(dtype), None)


def _mosaic_gpu(options: _Options, poses: jax.Array, weights: jax.Array) -> Routed:
    of = functools.partial(
        MosaicGpu.of, num_iterations=options.num_iterations, required=options.named
    )
    return _sweep(of, options, poses, weights)


_IMPLEMENTATIONS: dict[str, Callable[[_Options, jax.Array, jax.Array], Routed]] = {
    "reference": _store,
    "blocked": functools.partial(_sweep, Blocks.of),
    "lanes": functools.partial(_sweep, Lanes.of),
    "mosaic_gpu": _mosaic_gpu,
}


def _prefer(platform: str, poses: jax.Array, weights: jax.Array) -> tuple[str, ...]:
    """Implementations for a platform, the fastest first; measured in docs/performance.md."""
    stored, number = ("reference",), _number_of_votes(poses, weights)
    if number is not None and number < _MANY_VOTES:
        return stored
    if platform == "cpu":
        _, in_features, _, features = weights.shape
        if is_constant((in_features, features)) and in_features > features:
            return stored  # blocks save memory, but no time
        return ("blocked", *stored)
    if platform == "cuda" and number is not None:
        # The kernel pads the batch to a multiple of its tile.
        fits = math.prod(poses.shape[:-2]) >= TILE // 2 and number <= _MOST_BY_KERNEL
        kernel = ("mosaic_gpu",) if fits else ()
        return (*kernel, *(() if number <= _MOST_STORED_ON_GPU else ("lanes",)), *stored)
    return ("lanes", *stored)


def _first_possible(
    names: tuple[str, ...], options: _Options, poses: jax.Array, weights: jax.Array
) -> Routed:
    """Runs the first implementation that supports the arguments; returns no coupling."""
    *others, last = names
    for name in others:
        try:
            return _IMPLEMENTATIONS[name](options, poses, weights)
        except NotImplementedError:
            continue
    return _IMPLEMENTATIONS[last](options, poses, weights)._replace(coupling=None)


def _number_of_votes(poses: jax.Array, weights: jax.Array) -> int | None:
    """Number of votes times their dimensions; None if a size is symbolic."""
    children, _, parents, features = weights.shape
    sizes = (*poses.shape[:-2], children, parents, features)
    return math.prod(sizes) if is_constant(sizes) else None
