"""Losses and metrics: one value per example from a prediction."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from capsjax.models import BaselineConfig, MatrixCapsNetConfig, ModelConfig, Prediction
from capsjax.ops import margin_loss, reconstruction_loss, spread_loss
from capsjax.ops._checks import as_number, as_one_hot, check_choice

RECONSTRUCTION_WEIGHT = 0.0005

LossName = Literal[
    "paper", "official", "spread", "cross_entropy", "binary_cross_entropy", "squared_error"
]
# Called with prediction, target and images, and with the step if it has a parameter ``step``.
Objective = Callable[..., jax.Array]
# Called with prediction and target.
Metric = Callable[[Prediction, jax.Array], jax.Array]


def paper_loss(prediction: Prediction, target: jax.Array, images: jax.Array) -> jax.Array:
    r"""Margin loss and reconstruction loss, weighted as printed in the paper.

    .. math::
      L = L_\mathrm{margin} + 0.0005 \sum_p (\hat x_p - x_p)^2

    Args:
      prediction: output of a capsule network, with or without a reconstruction.
      target: one-hot or multi-hot classes, ``[..., J]``.
      images: reconstruction targets with pixels in [0, 1], ``[..., H, W, C]``, or with any other
        number of spatial axes. The losses of several targets, ``[..., S, H, W, C]``, are summed.

    Returns:
      Loss per example, float32, ``[...]``.

    Raises:
      ValueError: a shape does not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import paper_loss
      >>> prediction = Prediction(jnp.zeros((1, 2)), None, jnp.zeros((1, 2, 2, 1)))
      >>> print(paper_loss(prediction, jnp.array([[1, 0]]), jnp.ones((1, 2, 2, 1))))
      [0.812]
    """
    return margin_loss(prediction.scores, target) + _weighed_reconstruction(prediction, images)


def official_loss(prediction: Prediction, target: jax.Array, images: jax.Array) -> jax.Array:
    r"""Margin loss and reconstruction loss, weighted as in the authors' code.

    .. math::
      L = \frac{L_\mathrm{margin}}{2 J} + 0.0005 \sum_p (\hat x_p - x_p)^2

    That code averages the margin loss over the classes and halves it. For ten classes the
    reconstruction thus counts twenty times more than in :func:`paper_loss`. Arguments and result
    are those of :func:`paper_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import official_loss
      >>> prediction = Prediction(jnp.zeros((1, 2)), None, jnp.zeros((1, 2, 2, 1)))
      >>> print(official_loss(prediction, jnp.array([[1, 0]]), jnp.ones((1, 2, 2, 1))))
      [0.2045]
    """
    margin = margin_loss(prediction.scores, target) / (2 * target.shape[-1])
    return margin + _weighed_reconstruction(prediction, images)


def spread_objective(
    prediction: Prediction, target: jax.Array, images: jax.Array, step: ArrayLike | None = None
) -> jax.Array:
    r"""Spread loss with a growing margin, and reconstruction loss if there is a decoder.

    .. math::
      L = L_\mathrm{spread}(m_t) + 0.0005 \sum_p (\hat x_p - x_p)^2, \qquad
      m_t = \min\bigl(0.9,\; 0.2 + 0.7 \tfrac{t}{2000}\bigr)

    The paper raises the margin from 0.2 to 0.9 so that no class capsule dies early, but does not
    say over how many steps. The other arguments and the result are those of :func:`paper_loss`.

    Args:
      prediction: output of a capsule network, with or without a reconstruction.
      target: one-hot classes, ``[..., J]``.
      images: pixels in [0, 1], ``[..., H, W, C]``.
      step: t; the final margin is used when None.

    Returns:
      Loss per example, float32, ``[...]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import spread_objective
      >>> prediction = Prediction(jnp.array([[0.5, 0.3]]))
      >>> target, images = jnp.array([[1, 0]]), jnp.ones((1, 2, 2, 1))
      >>> print(spread_objective(prediction, target, images))
      [0.49]
      >>> print(spread_objective(prediction, target, images, step=0))
      [0.]

    Reference:
      Hinton, Sabour, Frosst, *Matrix Capsules with EM Routing*, ICLR 2018, section 4.1.
    """
    margin = 0.9 if step is None else jnp.minimum(0.9, 0.2 + 0.7 * jnp.asarray(step) / 2000)
    loss = spread_loss(prediction.scores, target, margin=margin)
    return loss + _weighed_reconstruction(prediction, images)


def cross_entropy_loss(prediction: Prediction, target: jax.Array, images: jax.Array) -> jax.Array:
    """Softmax cross entropy of the scores, for networks whose scores are logits.

    Arguments and result are those of :func:`paper_loss`; the images are not used.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import cross_entropy_loss
      >>> prediction = Prediction(jnp.zeros((1, 2)))
      >>> print(cross_entropy_loss(prediction, jnp.array([[1, 0]]), jnp.ones((1, 2, 2, 1))))
      [0.6931472]
    """
    del images
    return optax.softmax_cross_entropy(prediction.scores, _labels(prediction, target))


def binary_cross_entropy_loss(
    prediction: Prediction, target: jax.Array, images: jax.Array
) -> jax.Array:
    """Binary cross entropy of the scores as logits, summed over the classes.

    For convolutional networks and images with several classes. Arguments and result are those of
    :func:`paper_loss`; the images are not used.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import binary_cross_entropy_loss
      >>> prediction = Prediction(jnp.zeros((1, 2)))
      >>> print(binary_cross_entropy_loss(prediction, jnp.array([[1, 1]]), jnp.ones((1, 2, 2, 1))))
      [1.3862944]
    """
    del images
    labels = _labels(prediction, target)
    return optax.sigmoid_binary_cross_entropy(prediction.scores, labels).sum(-1)


def squared_error_loss(prediction: Prediction, target: jax.Array, images: jax.Array) -> jax.Array:
    r"""Squared error of the scores and reconstruction loss, for regression.

    .. math::
      L = \sum_j (s_j - y_j)^2 + 0.0005 \sum_p (\hat x_p - x_p)^2

    The scores of capsule networks lie in [0, 1]; those of convolutional networks are unbounded.
    Arguments and result are those of :func:`paper_loss`, with any numbers as the target.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import squared_error_loss
      >>> prediction = Prediction(jnp.array([[0.5, 0.2]]))
      >>> print(squared_error_loss(prediction, jnp.array([[1.0, 0.2]]), jnp.ones((1, 2, 2, 1))))
      [0.25]
    """
    loss = jnp.sum(_difference(prediction, target) ** 2, axis=-1)
    return loss + _weighed_reconstruction(prediction, images)


def absolute_error(prediction: Prediction, target: jax.Array) -> jax.Array:
    """Mean absolute error of an example's scores, a metric for regression.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import absolute_error
      >>> print(absolute_error(Prediction(jnp.array([[0.5, 0.2]])), jnp.array([[1.0, 0.2]])))
      [0.25]
    """
    return jnp.mean(jnp.abs(_difference(prediction, target)), axis=-1)


def weigh_classes(objective: Objective, weights: Sequence[float] | jax.Array) -> Objective:
    """Returns an objective that multiplies each example's loss by the weight of its class.

    An example with several classes gets the mean of their weights, one without classes the weight
    1.

    Args:
      objective: loss per example, such as :func:`paper_loss`.
      weights: one for each class, ``[J]``, none of them negative.

    Raises:
      TypeError: a weight is not a number.
      ValueError: a weight is negative or not finite, or their number is not that of the classes,
        which is known when the objective is called.

    Example:
      >>> import jax.numpy as jnp
      >>> from capsjax.models import Prediction
      >>> from capsjax.training import cross_entropy_loss, weigh_classes
      >>> objective = weigh_classes(cross_entropy_loss, [3.0, 1.0])
      >>> prediction, images = Prediction(jnp.zeros((2, 2))), jnp.ones((2, 2, 2, 1))
      >>> print(objective(prediction, jnp.eye(2), images) / jnp.log(2))
      [3. 1.]
    """
    if not any(isinstance(weight, jax.core.Tracer) for weight in jax.tree.leaves(weights)):
        for number, weight in enumerate(np.ravel(weights).tolist()):
            as_number(f"weights[{number}]", weight, least=0)

    @functools.wraps(objective)
    def with_weights(
        prediction: Prediction, target: jax.Array, images: jax.Array, **options: ArrayLike
    ) -> jax.Array:
        each = jnp.asarray(weights)
        if each.shape != target.shape[-1:]:
            raise ValueError(
                f"weights must have shape [J] = {target.shape[-1:]}, one for each class, got shape"
                f" {each.shape}"
            )
        count = jnp.sum(target, axis=-1)
        weighed = target * jnp.broadcast_to(each, target.shape)
        mean = jnp.sum(weighed, axis=-1) / jnp.maximum(count, 1)
        losses = objective(prediction, target, images, **options)
        return jnp.where(count > 0, mean, 1.0) * losses

    return with_weights


LOSSES: dict[str, Objective] = {
    "paper": paper_loss,
    "official": official_loss,
    "spread": spread_objective,
    "cross_entropy": cross_entropy_loss,
    "binary_cross_entropy": binary_cross_entropy_loss,
    "squared_error": squared_error_loss,
}
# Presets of the authors' code, which scales the loss differently.
_OFFICIAL = ("official", "cifar10", "smallnorb", "svhn")
_ONE_CLASS = ("spread", "cross_entropy")
_OF_LOGITS = ("cross_entropy", "binary_cross_entropy")


def choose_loss(
    name: str | None,
    preset: str,
    model: ModelConfig,
    *,
    several_classes: bool = False,
    regression: bool = False,
) -> str:
    """Returns the name of the loss; None chooses that of the preset's paper or code.

    Raises:
      ValueError: the loss does not fit the network, images with several classes, or numbers to
        predict.
    """
    plain = isinstance(model, BaselineConfig)
    if name is None:
        if regression:
            return "squared_error"
        if plain:
            return "binary_cross_entropy" if several_classes else "cross_entropy"
        if several_classes:
            return "official" if preset in _OFFICIAL else "paper"
        if isinstance(model, MatrixCapsNetConfig):
            return "spread"
        return "official" if preset in _OFFICIAL else "paper"
    check_choice("loss", name, LOSSES)
    if regression != (name == "squared_error"):
        fitting = "squared_error to predict numbers" if regression else "one for classes"
        raise ValueError(f"loss must be {fitting}, got {name!r}")
    if not regression and plain != (name in _OF_LOGITS):
        fitting = "cross_entropy" if plain else "paper, official or spread"
        raise ValueError(f"loss for preset {preset!r} must be {fitting}, got {name!r}")
    if several_classes and name in _ONE_CLASS:
        raise ValueError(f"loss must be for several classes in an image, got {name!r}")
    return name


def _difference(prediction: Prediction, target: jax.Array) -> jax.Array:
    """Scores minus target; the shapes must be equal."""
    scores = prediction.scores
    if jnp.shape(target) != scores.shape:
        raise ValueError(
            f"target must have the shape of the scores, {scores.shape}, got {jnp.shape(target)}"
        )
    return scores - target


def _labels(prediction: Prediction, target: jax.Array) -> jax.Array:
    """The target in the dtype of the scores; the shapes must be equal."""
    scores = prediction.scores
    return as_one_hot("target", target, "scores", scores.shape).astype(scores.dtype)


def _weighed_reconstruction(prediction: Prediction, images: jax.Array) -> jax.Array:
    if prediction.reconstruction is None:
        return jnp.zeros(prediction.scores.shape[:-1], prediction.scores.dtype)
    examples, shape = prediction.scores.shape[:-1], prediction.reconstruction.shape
    rank = len(shape) - len(examples)
    if shape[: len(examples)] != examples or rank < 1:
        raise ValueError(
            f"reconstruction must have the axes {examples} of the scores and those of an image, got"
            f" shape {shape}"
        )
    pixels = tuple(range(-min(rank, 3), 0))
    losses = reconstruction_loss(prediction.reconstruction, images, axis=pixels)
    # Planes of volumes, or several targets.
    others = tuple(range(len(examples), losses.ndim))
    return RECONSTRUCTION_WEIGHT * jnp.sum(losses, axis=others)
