"""Heinsen's routing of 2022, which never stores votes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import ArrayLike

from capsjax.ops import length, squash
from capsjax.ops._checks import (
    accumulator,
    as_floating,
    as_integer,
    as_number,
    taking_part,
    zeros_of,
)
from capsjax.ops._compiled import compiled_outside_jit
from capsjax.routing._passes import layer_norm, not_folded
from capsjax.routing.record import Algorithm, Children, Parameter, Sizes, register
from capsjax.routing.routed import Routed


class HeinsenParameters(NamedTuple):
    """Learned parameters of :func:`capsjax.heinsen_routing`.

    I may be 1, which shares a parameter between all children; their number may then vary.

    Attributes:
      activation_kernel: scores children, with the bias, ``[I, K]``.
      activation_bias: ``[I]``.
      vote_gates: compute votes from poses, with kernel and bias, ``[J, K]``.
      vote_kernel: ``[K, D]``.
      vote_bias: ``[J, D]``.
      prediction_kernel: predicts children from parents, with gates and bias, ``[D, K]``.
      prediction_gates: ``[J, K]``.
      prediction_bias: ``[J, K]``.
      score_scale: scores predictions, with the bias, ``[I, J]``.
      score_bias: ``[I, J]``.
      use: net benefit per unit of a child that a parent uses, ``[I, J]``.
      ignore: net cost per unit of a child that a parent ignores, ``[I, J]``.
    """

    activation_kernel: jax.Array
    activation_bias: jax.Array
    vote_gates: jax.Array
    vote_kernel: jax.Array
    vote_bias: jax.Array
    prediction_kernel: jax.Array
    prediction_gates: jax.Array
    prediction_bias: jax.Array
    score_scale: jax.Array
    score_bias: jax.Array
    use: jax.Array
    ignore: jax.Array

    @classmethod
    def shapes(
        cls, children: int, in_features: int, parents: int, features: int
    ) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter for I, K, J and D."""
        i, k, j, d = children, in_features, parents, features
        return dict(
            zip(
                cls._fields,
                [(i, k), (i,), (j, k), (k, d), (j, d), (d, k), (j, k), (j, k), *[(i, j)] * 4],
                strict=True,
            )
        )


# Without this, an exported function that takes them could not be stored.
export.register_namedtuple_serialization(
    HeinsenParameters, serialized_name="capsjax.HeinsenParameters"
)


@compiled_outside_jit
def heinsen_routing(
    poses: ArrayLike,
    parameters: HeinsenParameters,
    *,
    num_iterations: int = 2,
    where: ArrayLike | None = None,
    epsilon: float = 1e-5,
) -> Routed:
    r"""Routes each child to the parents that best predict it, for the most "bang per bit".

    With :math:`\tilde x_i = x_i / \sqrt I` and the children's scores
    :math:`f_i = \sigma(\tilde x_i \cdot A_i + b_i)`, each iteration computes

    .. math::
      \phi_{ij} = \beta^{use}_{ij} R_{ij} f_i - \beta^{ign}_{ij} (1 - R_{ij}) f_i, \qquad
      y_{jh} = \sum_d F^1_{jd} F^2_{dh} \sum_i \phi_{ij} \tilde x_{id} + \sum_i \phi_{ij} B_{jh}

    .. math::
      R_{ij} \leftarrow \mathrm{softmax}_j \ln \sigma\bigl(S_{ij} \, x_i \cdot \hat x_j +
        S^b_{ij}\bigr), \qquad
      \hat x_{jd} = G^2_{jd} \sum_h \mathrm{LayerNorm}(y)_{jh} G^1_{hd} + G^b_{jd}

    starting from :math:`R_{ij} = 1/J`. The sum over the children is taken before votes are
    computed: memory grows with I·J + I·K, not with I·J·D. Softmax, sums and normalisation are
    float32 (or float64).

    Args:
      poses: :math:`x`, ``[..., I, K]``, any floating dtype.
      parameters: :class:`HeinsenParameters`.
      num_iterations: r, a Python integer of at least 1: r − 1 updates of R.
      where: children that take part, bool, broadcastable to ``[..., I]``; I in the equations is
        their number.
      epsilon: added to the variance in the layer normalisation.

    Returns:
      :class:`Routed`: poses LayerNorm(y) ``[..., J, D]``, activations ``[..., J]``, and R of the
      last iteration ``[..., I, J]``, in the dtype of the poses. The paper has no activations; here
      they are the lengths of the squashed y, as in :func:`capsjax.attention_routing`.

    Raises:
      TypeError: an array is not floating point, ``where`` is not bool, ``num_iterations`` is not an
        integer, or ``epsilon`` is not a number.
      ValueError: an argument has the wrong shape, ``num_iterations`` is below 1, or ``epsilon`` is
        negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax import HeinsenParameters, heinsen_routing
      >>> shapes = HeinsenParameters.shapes(1000, 64, 10, 16)
      >>> keys = jax.random.split(jax.random.key(0), len(shapes))
      >>> parameters = HeinsenParameters(
      ...     *(jax.random.normal(k, s) / 8 for k, s in zip(keys, shapes.values())))
      >>> jax.jit(heinsen_routing)(jnp.ones((1000, 64)), parameters).poses.shape
      (10, 16)

    Reference:
      Heinsen, *An Algorithm for Routing Vectors in Sequences*, 2022 (arXiv 2211.11754), with the
      optimisations of its section on efficiency.
    """
    iterations = as_integer("num_iterations", num_iterations)
    epsilon = as_number("epsilon", epsilon, least=0)
    poses = as_floating("poses", poses)
    if poses.ndim < 2:
        raise ValueError(f"poses must have shape [..., I, K], got shape {poses.shape}")
    wide = accumulator(poses.dtype)
    p = _checked(parameters, poses.shape[-2:], wide)
    parents = p.vote_gates.shape[0]
    leading, children = poses.shape[:-2], poses.shape[-2]
    count = jnp.full(leading, max(1, children), wide)
    mask = None
    if where is not None:
        mask, poses = taking_part(where, poses)
        count = jnp.maximum(jnp.sum(mask, axis=(-2, -1), dtype=wide), 1)
    x = poses.astype(wide)
    scaled = x * lax.rsqrt(count)[..., None, None]

    def like(parameter: jax.Array, *shape: int) -> jax.Array:
        return jnp.broadcast_to(parameter, (*leading, *shape))

    per_pair = (children, parents)
    kernel = like(p.activation_kernel, children, x.shape[-1])
    score = jnp.sum(scaled * kernel, axis=-1) + like(p.activation_bias, children)
    present = jax.nn.sigmoid(score)[..., None]
    if mask is not None:
        present = jnp.where(mask, present, 0)

    def gather(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        coupling = jax.nn.softmax(logits)
        used = present * coupling
        phi = like(p.use, *per_pair) * used - like(p.ignore, *per_pair) * (present - used)
        pooled = jnp.einsum("...ij,...ik->...jk", phi, scaled)
        y = jnp.einsum("...jk,jk,kd->...jd", pooled, p.vote_gates, p.vote_kernel)
        bias = jnp.sum(phi, axis=-2)[..., None] * like(p.vote_bias, *p.vote_bias.shape)
        return y + bias, coupling

    def update(_: jax.Array, logits: jax.Array) -> jax.Array:
        y, _ = gather(logits)
        predicted = jnp.einsum(
            "...jd,dk,jk->...jk", layer_norm(y, epsilon), p.prediction_kernel, p.prediction_gates
        ) + like(p.prediction_bias, *p.prediction_bias.shape)
        fit = jnp.einsum("...ik,...jk->...ij", x, predicted)
        return jax.nn.log_sigmoid(
            fit * like(p.score_scale, *per_pair) + like(p.score_bias, *per_pair)
        )

    pairs = jnp.broadcast_to(jnp.sum(x, axis=-1, keepdims=True), (*leading, *per_pair))
    first = not_folded(zeros_of(pairs, wide, *p))
    y, coupling = gather(lax.fori_loop(0, iterations - 1, update, first))
    if mask is not None:
        coupling = jnp.where(mask, coupling, 0)
    dtype = poses.dtype
    return Routed(
        layer_norm(y, epsilon).astype(dtype),
        length(squash(y)).astype(dtype),
        coupling.astype(dtype),
    )


def _checked(
    parameters: HeinsenParameters, poses_shape: tuple[int, ...], wide: jnp.dtype
) -> HeinsenParameters:
    """Checks the parameters' shapes, and casts them to the dtype of the sums."""
    fields = HeinsenParameters._fields
    if not isinstance(parameters, tuple | list) or len(parameters) != len(fields):
        raise TypeError(f"parameters must be HeinsenParameters, got {type(parameters).__name__}")
    arrays = HeinsenParameters(
        *(
            as_floating(name, value).astype(wide)
            for name, value in zip(fields, parameters, strict=True)
        )
    )
    children, in_features = poses_shape
    if arrays.vote_bias.ndim != 2:
        raise ValueError(f"vote_bias must have shape [J, D], got {arrays.vote_bias.shape}")
    expected = HeinsenParameters.shapes(children, in_features, *arrays.vote_bias.shape)
    for name, shape in expected.items():
        got = getattr(arrays, name).shape
        per_child = name.startswith(("activation", "score", "use", "ignore"))
        if got != shape and not (per_child and got == (1, *shape[1:])):
            raise ValueError(f"{name} must have shape {shape}, got {got}")
    return arrays


def _parameters(sizes: Sizes) -> dict[str, Parameter]:
    """Normal :class:`HeinsenParameters`, scaled as in the author's code."""
    _, in_features, _, features = sizes
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
        name: Parameter(shape, jax.nn.initializers.normal(deviations.get(name, 0.0)))
        for name, shape in HeinsenParameters.shapes(*sizes).items()
    }


def _arguments(children: Children, given: dict[str, Any]) -> dict[str, Any]:
    """Packs the parameters into one argument."""
    del children
    parameters = HeinsenParameters(*(given.pop(name) for name in HeinsenParameters._fields))
    return {**given, "parameters": parameters}


HEINSEN = register(
    Algorithm(
        name="heinsen",
        function=heinsen_routing,
        paper="Heinsen, 2022",
        parameters=_parameters,
        options=("num_iterations", "epsilon"),
        arguments=_arguments,
        makes_votes=True,
    )
)
