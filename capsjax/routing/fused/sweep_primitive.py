"""A sweep over the children as a primitive, which becomes a kernel when it is lowered for a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from capsjax.ops import _hopper
from capsjax.ops._checks import zeros


def sweep(
    poses: jax.Array, weights: jax.Array, *queries: jax.Array, leaky: bool, required: bool
) -> tuple[jax.Array, ...]:
    r"""Sweeps over the children of N layers.

    Args:
      poses: ``[N, I, B, K]``, float32 like all arguments and results.
      weights: ``[N, I, J, D, K]``.
      *queries: the query, and for the backward sweep the gradient of the sums, ``[N, B, J, D]``.
      leaky: whether the softmax includes a logit of zero.
      required: whether lowering raises a NotImplementedError where the kernel does not run.
        Otherwise the votes are stored there.

    Returns:
      The sums :math:`\sum_i c_{ij} \hat u_{ij}`, ``[N, B, J, D]``; for the backward sweep the
      query's gradient, and coupling and gradients of the logits, ``[N, I, B, J]``.
    """
    arguments = (poses, weights, *queries)
    results = _sweep.bind(*arguments, leaky=leaky, required=required)
    # Under shard_map they vary over the same mesh axes as the arguments.
    return tuple(x + zeros((), x.dtype, *arguments) for x in results)


def plain(
    poses: jax.Array, weights: jax.Array, *queries: jax.Array, leaky: bool
) -> tuple[jax.Array, ...]:
    """Does the same as the kernel, with stored votes."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    votes = product("nibk,nijdk->nibjd", poses, weights)
    logits = product("nibjd,nbjd->nibj", votes, queries[0])
    highest = jnp.max(logits, axis=3, keepdims=True)
    if leaky:
        highest = jnp.maximum(highest, 0)
    highest = jax.lax.stop_gradient(highest)
    exponentials = jnp.exp(logits - highest)
    total = jnp.sum(exponentials, axis=3, keepdims=True)
    if leaky:
        total = total + jnp.exp(-highest)
    coupling = exponentials / total
    if len(queries) == 1:
        return (product("nibj,nibjd->nbjd", coupling, votes),)
    d_coupling = product("nibjd,nbjd->nibj", votes, queries[1])
    mean = jnp.sum(coupling * d_coupling, axis=3, keepdims=True)
    d_logits = coupling * (d_coupling - mean)
    return product("nibj,nibjd->nbjd", d_logits, votes), coupling, d_logits


def _shapes(
    poses: Any, weights: Any, *queries: Any, leaky: bool, required: bool
) -> list[jax.core.ShapedArray]:
    del leaky, required
    number, children, batch, _ = poses.shape
    pairs = [(number, children, batch, weights.shape[2])] * (2 * (len(queries) - 1))
    return [jax.core.ShapedArray(shape, jnp.float32) for shape in (queries[0].shape, *pairs)]


@functools.partial(jax.jit, static_argnames=("leaky", "required"))
def _run(*arguments: jax.Array, leaky: bool, required: bool) -> list[jax.Array]:
    results: list[jax.Array] = _sweep.bind(*arguments, leaky=leaky, required=required)
    return results


def _batched(
    arguments: tuple[jax.Array, ...], axes: tuple[int | None, ...], **options: Any
) -> tuple[list[jax.Array], list[int]]:
    """Adds the mapped axis to the batch if the weights are not mapped, else to the layers."""
    size = next(x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None)
    arguments = tuple(map(batching.bdim_at_front, arguments, axes, [size] * len(axes)))
    if axes[1] is None:
        # The axis of B in poses, queries and results.
        poses, weights, *queries = arguments
        merged = (_merge(poses, 2), weights[0], *(_merge(x, 1) for x in queries))
        places = [1, 2, 2]
    else:
        merged, places = tuple(_merge(x, 0) for x in arguments), [0, 0, 0]
    results = _sweep.bind(*merged, **options)
    places = places[: len(results)]
    return [_split(x, place, size) for x, place in zip(results, places, strict=True)], places


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """Merges the first axis into another of the other axes."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])


def _derivative(
    primals: tuple[jax.Array, ...], tangents: tuple[Any, ...], *, leaky: bool, required: bool
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Second derivatives of routing; they store the votes."""
    del required
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    results, derivatives = jax.jvp(functools.partial(plain, leaky=leaky), primals, tangents)
    return list(results), list(derivatives)


def _kernel(*arguments: jax.Array, leaky: bool) -> tuple[jax.Array, ...]:
    from capsjax.routing.fused import hopper_kernel

    results: tuple[jax.Array, ...] = hopper_kernel.sweep(*arguments, leaky=leaky)
    return results


def _choose(*, leaky: bool, required: bool) -> tuple[_hopper.Function, _hopper.Function | None]:
    otherwise = None if required else functools.partial(plain, leaky=leaky)
    return functools.partial(_kernel, leaky=leaky), otherwise


_sweep = Primitive("capsule_sweep")
_sweep.multiple_results = True
_sweep.def_abstract_eval(_shapes)
_sweep.def_impl(_run)
_hopper.register(_sweep, _choose)
batching.primitive_batchers[_sweep] = _batched
ad.primitive_jvps[_sweep] = _derivative
