"""Dynamic routing as sweeps over the children, without stored votes.

In each iteration, the logits are scalar products of the votes and the sum V of the parents' poses
so far. Neither votes nor logits have to be kept: an iteration takes V [J, B, D] and sweeps over the
children to compute the parents' sums s [J, B, D]. It resembles attention, with V as the query, the
votes as keys and values, and a softmax over the queries. Implementations define the sweep; this
module has the iterations and their derivative.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from capsjax.ops import squash
from capsjax.ops._checks import accumulator, zeros

# Poses, weights, and the bias that is added to the sums.
Arguments = tuple[jax.Array, jax.Array, jax.Array]


class Sweeps(Hashable, Protocol):
    """An implementation of the sweeps over all children of a batch.

    Sums and queries are ``[J, B, D]`` in float32 or wider.
    """

    @property
    def share(self) -> float:
        """The coupling of every pair if all logits are zero."""

    @property
    def stop_gradient(self) -> bool:
        """Whether the coupling is treated as a constant."""

    @property
    def precision(self) -> lax.PrecisionLike:
        """Precision of the matrix products; None means the highest for the dtype."""

    @property
    def unrolled(self) -> bool:
        """Whether iterations are unrolled, and `grads` a growing tuple of terms.

        A term is a factor ``[I, B, J, 1]`` or a number, and a vector ``[J, B, D]``; the votes'
        gradient is the sum of their products.
        """

    def pack(self, poses: jax.Array, weights: jax.Array) -> Any:
        """Converts poses ``[B, I, K]`` and weights ``[I, K, J, D]`` to the sweeps' layout."""

    def forward(self, packed: Any, query: jax.Array) -> jax.Array:
        r"""Returns the sums :math:`\sum_i c_{ij} \hat u_{ij}` for logits from the query."""

    def backward(
        self, packed: Any, query: jax.Array, d_sums: jax.Array, grads: Any
    ) -> tuple[jax.Array, Any]:
        """Returns the query's gradient, and adds those of poses and weights to `grads`."""

    def unpack(
        self, grads: Any, poses: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Converts `grads` to gradients of poses ``[B, I, K]`` and weights ``[I, K, J, D]``."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def route(sweeps: Sweeps, num_iterations: int, *arguments: jax.Array) -> jax.Array:
    """Computes the parent poses of the last iteration.

    Args:
      sweeps: the implementation.
      num_iterations: r, at least 1.
      *arguments: poses ``[B, I, K]`` and weights ``[I, K, J, D]`` of one dtype; bias ``[J, D]`` in
        float32 or wider.

    Returns:
      Poses ``[J, B, D]`` in float32 or wider.
    """
    sums, _ = _sums_and_queries(sweeps, num_iterations, *arguments)
    return squash(sums[-1])


def _route_fwd(
    sweeps: Sweeps, num_iterations: int, *arguments: jax.Array
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array, jax.Array]]:
    sums, queries = _sums_and_queries(sweeps, num_iterations, *arguments)
    return squash(sums[-1]), (arguments, sums, queries)


def _sums_and_queries(
    sweeps: Sweeps, num_iterations: int, poses: jax.Array, weights: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of all iterations ``[r, J, B, D]``, and the queries of all but the first."""
    # All logits are zero, and so the sums are one matrix product.
    flat_poses, flat_weights = _flat(poses, weights)
    first = product("bn,nm->bm", flat_poses, flat_weights, sweeps.precision)
    first = first.reshape(poses.shape[0], *bias.shape)
    first = sweeps.share * first.transpose(1, 0, 2) + bias[:, None]
    sums, queries = (
        zeros((count, *first.shape), first.dtype, first)
        for count in (num_iterations, num_iterations - 1)
    )
    sums = set_at(sums, 0, first)
    if num_iterations == 1:
        return sums, queries
    packed = sweeps.pack(poses, weights)

    def iterate(
        t: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, sums, queries = carry
        query = query + squash(sums[t - 1])
        new = sweeps.forward(packed, query) + bias[:, None]
        return query, set_at(sums, t, new), set_at(queries, t - 1, query)

    carry = jnp.zeros_like(first), sums, queries
    _, sums, queries = _loop(sweeps)(1, num_iterations, iterate, carry)
    return sums, queries


def _loop(sweeps: Sweeps) -> Callable[..., Any]:
    """Returns ``lax.fori_loop``, or the same in Python, which needs no launches of its own."""
    if not sweeps.unrolled:
        return lax.fori_loop

    def loop(first: int, end: int, body: Callable[[int, Any], Any], carry: Any) -> Any:
        return functools.reduce(lambda carry, n: body(n, carry), range(first, end), carry)

    return loop


def _route_bwd(
    sweeps: Sweeps,
    num_iterations: int,
    residuals: tuple[Arguments, jax.Array, jax.Array],
    d_v: jax.Array,
) -> Arguments:
    (poses, weights, bias), sums, queries = residuals
    last = num_iterations - 1

    def before_squash(t: jax.Array | int, d_squashed: jax.Array) -> jax.Array:
        return jax.vjp(squash, sums[t])[1](d_squashed)[0]

    def sweep_back(t: jax.Array | int, d_sums: jax.Array, grads: Any) -> tuple[jax.Array, Any]:
        return sweeps.backward(packed, queries[t - 1], d_sums, grads)

    if last > 0:
        packed = sweeps.pack(poses, weights)
        grads: Any = ()
        if not sweeps.unrolled:
            grads = jax.tree.map(
                lambda x: zeros(x.shape, accumulator(x.dtype), poses, weights, bias, d_v), packed
            )
        d_sums = before_squash(last, d_v)
        d_bias = jnp.sum(d_sums, axis=1)
        d_query, grads = sweep_back(last, d_sums, grads)
        if sweeps.stop_gradient:
            swept = sweeps.unpack(grads, poses, weights)
            return _cast((*swept, d_bias), (poses, weights, bias))

        def iterate(number: jax.Array | int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            """Adds the gradients of iteration t, whose poses are part of all later queries."""
            t = last - number
            d_query, d_bias, grads = carry
            d_sums = before_squash(t, d_query)
            more, grads = sweep_back(t, d_sums, grads)
            return d_query + more, d_bias + jnp.sum(d_sums, axis=1), grads

        d_v, d_bias, grads = _loop(sweeps)(1, last, iterate, (d_query, d_bias, grads))
    d_first = before_squash(0, d_v)
    if last > 0 and sweeps.unrolled:
        swept = sweeps.unpack((*grads, (sweeps.share, d_first)), poses, weights)
        return _cast((*swept, d_bias + jnp.sum(d_first, axis=1)), (poses, weights, bias))
    d_votes = (sweeps.share * d_first).transpose(1, 0, 2).astype(poses.dtype)
    flat_poses, flat_weights = _flat(poses, weights)
    d_flat = d_votes.reshape(poses.shape[0], -1)
    uniform = (
        product("bm,nm->bn", d_flat, flat_weights, sweeps.precision).reshape(poses.shape),
        product("bn,bm->nm", flat_poses, d_flat, sweeps.precision).reshape(weights.shape),
        jnp.sum(d_first, axis=1),
    )
    if last == 0:
        return _cast(uniform, (poses, weights, bias))
    swept = sweeps.unpack(grads, poses, weights)
    return _cast(jax.tree.map(jnp.add, uniform, (*swept, d_bias)), (poses, weights, bias))


route.defvjp(_route_fwd, _route_bwd)


def _flat(poses: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns poses ``[B, I * K]`` and weights ``[I * K, J * D]``.

    XLA:CPU would make transposed copies for an einsum over more axes.
    """
    size = poses.shape[1] * poses.shape[2]
    return poses.reshape(poses.shape[0], size), weights.reshape(size, -1)


def product(axes: str, a: jax.Array, b: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Einsum of two arrays of one dtype, with sums in float32 or wider."""
    wide = accumulator(a.dtype)
    if precision is None and a.dtype == wide:
        # Otherwise accelerators round float32 factors to bfloat16 or TF32.
        precision = lax.Precision.HIGHEST
    return jnp.einsum(axes, a, b, precision=precision, preferred_element_type=wide)


def set_at(x: jax.Array, n: jax.Array | int, value: jax.Array) -> jax.Array:
    """Sets ``x[n]``. ``x.at[n].set`` would check the index each time."""
    start = (n, *[0] * value.ndim)
    return lax.dynamic_update_slice(x, value[None], start, allow_negative_indices=False)


def add_at(x: jax.Array, n: jax.Array | int, term: jax.Array) -> jax.Array:
    """Adds to ``x[n]``, in place in a loop."""
    # The sum has the axis of x: otherwise the TPU compiler copies the slice first.
    start = (n, *[0] * term.ndim)
    old = lax.dynamic_slice(x, start, (1, *term.shape), allow_negative_indices=False)
    return lax.dynamic_update_slice(x, old + term[None], start, allow_negative_indices=False)


def _cast(grads: Arguments, like: Arguments) -> Arguments:
    first, second, third = (g.astype(x.dtype) for g, x in zip(grads, like, strict=True))
    return first, second, third
