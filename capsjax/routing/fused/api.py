"""Votes and dynamic routing as one function."""

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax.ops import dense_votes, length
from capsjax.ops._checks import accumulator, as_floating, as_mask, zeros
from capsjax.ops.votes import check_dense
from capsjax.routing._passes import as_iterations
from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.fused.blocked import Blocks
from capsjax.routing.fused.lanes import Lanes
from capsjax.routing.fused.recurrence import route
from capsjax.routing.routed import Routed

Implementation = Literal["reference", "blocked", "pallas_tpu", "pallas_gpu"]

# Numbers in the votes of a batch from which on blocks of them are faster than all at once.
_MANY_VOTES = 2**20
# Up to which storing them was found to be faster on an H200, where nothing larger was measured.
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
        the coupling, and always has forward-mode derivatives. ``"blocked"``, in plain XLA, stores
        neither votes nor logits; its blocks are made for the platform that the program is compiled
        for. ``"pallas_tpu"`` does the same by kernels for TPUs that read every pose and weight
        once a pass, ``"pallas_gpu"`` by kernels for Hopper GPUs and newer, all in float32. Kernels
        are of one device: over several, call them under ``shard_map``. None is ``"blocked"`` where
        there are many votes, and stores them where that was found to be faster: on CPU votes of
        fewer dimensions than the children's poses, on NVIDIA's GPUs up to 2²⁵ numbers.

    Returns:
      :class:`Routed`: poses :math:`v` ``[..., J, D]`` and activations :math:`\|v\|` ``[..., J]`` in
      the dtype to which poses and weights promote. The coupling is ``[..., I, J]`` if the
      implementation is ``"reference"`` by name, else None.

    Raises:
      TypeError: poses, weights or bias are not floating point, ``where`` is not bool, or
        ``num_iterations`` is not an integer.
      ValueError: an argument has the wrong shape, ``num_iterations`` is below 1, or the
        implementation's name is unknown.
      NotImplementedError: the named implementation cannot run: weights are of unknown size; for
        kernels also a batch of unknown size, children too large for the memory beside the units,
        on GPUs float64, more than 64 dimensions of a parent or a chip older than Hopper; or, when
        the program is lowered, another platform. One iteration needs no kernel and always runs.

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
    iterations = as_iterations(num_iterations)
    if where is not None:
        mask = as_mask("where", where, poses.shape[:-1])
        # Selected before anything else reads them, so that not even a NaN gets through.
        poses = jnp.where(mask[..., None], poses, 0)
    parents = weights.shape[2:]
    if bias is not None:
        bias = as_floating("bias", bias)
        if bias.shape != parents:
            raise ValueError(f"bias must have shape [J, D] = {parents}, got {bias.shape}")
    dtype = jnp.promote_types(poses.dtype, weights.dtype)

    def stored(poses: jax.Array, weights: jax.Array) -> Routed:
        return dynamic_routing(
            dense_votes(poses, weights, precision=precision),
            num_iterations=iterations,
            bias=bias,
            where=where,
            leaky=leaky,
            stop_gradient=stop_gradient,
        )

    def swept(kind: Any, poses: jax.Array, weights: jax.Array) -> Routed:
        flat = poses.astype(dtype).reshape(-1, *poses.shape[-2:])
        added = jnp.zeros(parents) if bias is None else bias
        arguments = _alike(flat, weights.astype(dtype), added.astype(accumulator(dtype)))
        sweeps = kind.of(
            *arguments[:2],
            leaky=bool(leaky),
            stop_gradient=bool(stop_gradient),
            precision=precision,
        )
        v = jnp.moveaxis(route(sweeps, iterations, *arguments), 0, -2)
        v = v.reshape(*poses.shape[:-2], *parents)
        return Routed(v.astype(dtype), length(v).astype(dtype), None)

    def without_coupling(poses: jax.Array, weights: jax.Array) -> Routed:
        return stored(poses, weights)._replace(coupling=None)

    if implementation == "reference":
        return stored(poses, weights)
    if implementation and not _sizes_known(weights):
        raise NotImplementedError(
            f"implementation {implementation!r} needs weights of known size, got shape"
            f" {weights.shape}"
        )
    empty = 0 in (*poses.shape, *weights.shape)
    if empty or not (implementation or _are_many(poses, weights)):
        return without_coupling(poses, weights)
    if implementation == "pallas_tpu":
        # Not before it is wanted: importing Pallas takes longer than all of this package.
        from capsjax.routing.fused.pallas_tpu import TpuKernels

        return swept(TpuKernels, poses, weights)
    if implementation == "pallas_gpu":
        from capsjax.routing.fused.pallas_gpu import GpuKernels

        return swept(GpuKernels, poses, weights)
    blocks, lanes = functools.partial(swept, Blocks), functools.partial(swept, Lanes)
    on_cpu = blocks if implementation or _gains_on_cpu(weights) else without_coupling
    on_gpu = lanes if implementation or _gains_on_gpu(poses, weights) else without_coupling
    routed: Routed = lax.platform_dependent(poses, weights, cpu=on_cpu, cuda=on_gpu, default=lanes)
    return routed


def check_implementation(implementation: str | None, routing: str = "dynamic") -> None:
    """Raises a ValueError unless this routing algorithm has an implementation of this name."""
    names = get_args(Implementation) if routing == "dynamic" else ("reference",)
    if implementation is not None and implementation not in names:
        where = "" if routing == "dynamic" else f" for routing {routing!r}"
        raise ValueError(
            f"implementation must be None or one of {', '.join(names)}{where}, got"
            f" {implementation!r}"
        )


def _sizes_known(weights: jax.Array) -> bool:
    return all(isinstance(size, int) for size in weights.shape)


def _are_many(poses: jax.Array, weights: jax.Array) -> bool:
    """Whether there are so many votes that not to store them is faster on some platform."""
    if not _sizes_known(weights):
        return False
    number = _number_of_votes(poses, weights)
    return number is None or number >= _MANY_VOTES


def _number_of_votes(poses: jax.Array, weights: jax.Array) -> int | None:
    """None for a batch of unknown size."""
    batch = poses.shape[:-2]
    children, _, parents, features = weights.shape
    if not all(isinstance(size, int) for size in batch):
        return None
    return math.prod(batch) * children * parents * features


def _gains_on_cpu(weights: jax.Array) -> bool:
    """Whether blocks are faster, or as fast and smaller; measured in docs/performance.md."""
    _, in_features, _, features = weights.shape
    return in_features <= features


def _gains_on_gpu(poses: jax.Array, weights: jax.Array) -> bool:
    """Whether there are more votes than storing was found to be faster for, in the same place."""
    number = _number_of_votes(poses, weights)
    return number is None or number > _MOST_STORED_ON_GPU


def _alike(*arrays: jax.Array) -> list[jax.Array]:
    """The same arrays, each of which counts as different on a mesh axis if one of them does.

    Under ``shard_map`` a function with a derivative of its own has to return gradients of the type
    of its arguments; made alike, they are, and what made them alike adds up over the axis.
    """
    return [array + zeros((), array.dtype, *arrays) for array in arrays]
