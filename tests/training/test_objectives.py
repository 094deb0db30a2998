import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsjax.models import BaselineConfig, CapsNetConfig, MatrixCapsNetConfig, Prediction
from capsjax.training import (
    absolute_error,
    cross_entropy_loss,
    official_loss,
    paper_loss,
    spread_objective,
    squared_error_loss,
    weigh_classes,
)
from capsjax.training.objectives import LOSSES, binary_cross_entropy_loss, choose_loss


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    lengths, target = rng.random((3, 10)), np.eye(10)[[1, 5, 9]]
    pixels, images = rng.random((3, 4, 4, 1)), rng.random((3, 4, 4, 1))
    present = target * np.maximum(0, 0.9 - lengths) ** 2
    absent = 0.5 * (1 - target) * np.maximum(0, lengths - 0.1) ** 2
    margin = (present + absent).sum(1)
    squared = ((pixels - images) ** 2).sum((1, 2, 3))
    as_32 = [jnp.asarray(x, jnp.float32) for x in (lengths, pixels, images, target)]
    prediction = Prediction(as_32[0], None, as_32[1])
    return prediction, as_32[3], as_32[2], margin, squared


def test_paper_loss_is_margin_plus_weighed_sum_of_squares(case):
    prediction, target, images, margin, squared = case
    np.testing.assert_allclose(
        paper_loss(prediction, target, images), margin + 0.0005 * squared, rtol=1e-6
    )


def test_official_loss_counts_reconstruction_twenty_times_more(case):
    prediction, target, images, margin, squared = case
    expected = 0.05 * (margin + 0.01 * squared)
    np.testing.assert_allclose(official_loss(prediction, target, images), expected, rtol=1e-6)


def test_without_a_decoder_only_the_margin_counts(case):
    prediction, target, images, margin, _ = case
    bare = prediction._replace(reconstruction=None)
    np.testing.assert_allclose(paper_loss(bare, target, images), margin, rtol=1e-6)


@pytest.mark.parametrize("shape", [(16,), (8, 2), (2, 4, 2), (2, 2, 2, 2), (3, 2, 2, 2, 1)])
def test_a_reconstruction_may_have_any_axes(case, shape):
    prediction, target, _, margin, _ = case
    pixels, images = np.random.default_rng(1).random((2, 3, *shape)).astype(np.float32)
    squared = ((pixels - images) ** 2).reshape(3, -1).sum(1)
    prediction = prediction._replace(reconstruction=jnp.asarray(pixels))
    losses = paper_loss(prediction, target, jnp.asarray(images))
    np.testing.assert_allclose(losses, margin + 0.0005 * squared, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (3,), ()])
def test_a_reconstruction_of_other_examples_is_refused(case, shape):
    prediction, target, *_ = case
    prediction = prediction._replace(reconstruction=jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"reconstruction must have the axes \(3,\) of the scores"):
        paper_loss(prediction, target, jnp.zeros(shape))


def test_the_margin_of_the_spread_loss_grows(case):
    prediction, target, images, _, squared = case
    a, right = np.asarray(prediction.scores), np.asarray(target, bool)
    for step, margin in ((None, 0.9), (0, 0.2), (1000, 0.55), (10**6, 0.9)):
        shortfall = np.maximum(0, margin - (a[right][:, None] - a)) ** 2 * ~right
        loss = jax.jit(spread_objective)(prediction, target, images, step=step)
        np.testing.assert_allclose(loss, shortfall.sum(1) + 0.0005 * squared, rtol=1e-5)


def test_cross_entropy(case):
    prediction, target, images, _, _ = case
    scores = np.asarray(prediction.scores, np.float64)
    expected = np.log(np.exp(scores).sum(1)) - (scores * np.asarray(target)).sum(1)
    np.testing.assert_allclose(cross_entropy_loss(prediction, target, images), expected, rtol=1e-5)


def test_binary_cross_entropy_of_several_classes(case):
    prediction, _, images, _, _ = case
    scores = np.asarray(prediction.scores, np.float64)
    present = np.zeros(scores.shape)
    present[:, :2] = 1
    p = 1 / (1 + np.exp(-scores))
    expected = -(present * np.log(p) + (1 - present) * np.log(1 - p)).sum(1)
    loss = binary_cross_entropy_loss(prediction, jnp.asarray(present), images)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_a_nan_is_nan_and_wants_one_number_per_class(case, name):
    prediction, target, images, _, _ = case
    broken = prediction._replace(scores=prediction.scores.at[0, 3].set(jnp.nan))
    losses = LOSSES[name](broken, target, images)
    assert jnp.isnan(losses[0])
    assert jnp.isfinite(losses[1:]).all()
    assert jnp.isnan(LOSSES[name](prediction, target.at[0].set(jnp.nan), images)[0])
    match = "must be one-hot .* for class numbers use jax.nn.one_hot"
    if name == "squared_error":
        match = r"target must have the shape of the scores, \(3, \d+\), got \(3,\)"
    with pytest.raises(ValueError, match=match):
        LOSSES[name](prediction, jnp.array([1, 5, 9]), images)


def test_two_reconstructions_of_an_image_add_up(case):
    prediction, target, images, margin, squared = case
    twice = prediction._replace(reconstruction=jnp.stack([prediction.reconstruction] * 2, axis=1))
    loss = paper_loss(twice, target, jnp.stack([images] * 2, axis=1))
    np.testing.assert_allclose(loss, margin + 2 * 0.0005 * squared, rtol=1e-5)


def test_the_preset_chooses_its_loss():
    assert choose_loss(None, "baseline", BaselineConfig(), several_classes=True) == (
        "binary_cross_entropy"
    )
    assert choose_loss(None, "matrix_capsnet", MatrixCapsNetConfig(), several_classes=True) == (
        "paper"
    )
    with pytest.raises(ValueError, match="must be for several classes in an image, got 'spread'"):
        choose_loss("spread", "small", CapsNetConfig(), several_classes=True)
    assert choose_loss(None, "paper", CapsNetConfig()) == "paper"
    assert choose_loss(None, "official", CapsNetConfig()) == "official"
    assert choose_loss(None, "baseline", BaselineConfig()) == "cross_entropy"
    assert choose_loss(None, "matrix_capsnet", MatrixCapsNetConfig()) == "spread"
    assert choose_loss("official", "small", CapsNetConfig()) == "official"


@pytest.mark.parametrize(
    ("name", "preset", "model", "match"),
    [
        ("paper", "baseline", BaselineConfig(), "must be cross_entropy, got 'paper'"),
        ("cross_entropy", "small", CapsNetConfig(), "must be paper, official or spread"),
        ("mse", "small", CapsNetConfig(), "loss must be one of paper, official, spread, cross"),
    ],
)
def test_a_loss_that_does_not_fit_is_named(name, preset, model, match):
    with pytest.raises(ValueError, match=match):
        choose_loss(name, preset, model)


def test_numbers_to_predict_have_a_loss_of_their_own():
    assert choose_loss(None, "small", CapsNetConfig(), regression=True) == "squared_error"
    assert choose_loss(None, "baseline", BaselineConfig(), regression=True) == "squared_error"
    with pytest.raises(ValueError, match="loss must be squared_error to predict numbers, got"):
        choose_loss("paper", "small", CapsNetConfig(), regression=True)
    with pytest.raises(ValueError, match="loss must be one for classes, got 'squared_error'"):
        choose_loss("squared_error", "small", CapsNetConfig())


def test_squared_error_is_the_formula(case):
    prediction, _, images, _, squared = case
    target = np.random.default_rng(1).normal(size=prediction.scores.shape).astype(np.float32)
    expected = ((np.asarray(prediction.scores, np.float64) - target) ** 2).sum(1)
    loss = squared_error_loss(prediction, jnp.asarray(target), images)
    np.testing.assert_allclose(loss, expected + 0.0005 * squared, rtol=1e-5)
    errors = np.abs(np.asarray(prediction.scores) - target).mean(1)
    np.testing.assert_allclose(absolute_error(prediction, jnp.asarray(target)), errors, rtol=1e-5)


def test_classes_weigh_what_they_are_given(case):
    prediction, _, images, _, _ = case
    number = prediction.scores.shape[1]
    weights = np.arange(1.0, number + 1)
    target = np.zeros((3, number))
    target[0, 2] = target[1, 0] = target[1, 3] = 1  # one class, two classes, none
    plain = paper_loss(prediction, jnp.asarray(target), images)
    weighed = weigh_classes(paper_loss, weights.tolist())(prediction, jnp.asarray(target), images)
    np.testing.assert_allclose(weighed / plain, [3, 2.5, 1], rtol=1e-6)
    for wrong in ([3.0], 3.0, np.ones((number, 1)), [*weights, 1.0]):
        with pytest.raises(ValueError, match=r"weights must have shape \[J\] = \(10,\), one for"):
            weigh_classes(paper_loss, wrong)(prediction, jnp.asarray(target), images)
    for wrong in ([1.0, -1.0], [1.0, np.nan], jnp.array([1.0, np.inf]), [1.0, "2"]):
        with pytest.raises((TypeError, ValueError), match=r"weights\[\d\] must be"):
            weigh_classes(paper_loss, wrong)
    traced = jax.jit(lambda x: weigh_classes(paper_loss, [x, *weights[1:]])(*arguments))
    arguments = prediction, jnp.asarray(target), images
    np.testing.assert_allclose(traced(1.0) / plain, [3, 2.5, 1], rtol=1e-6)
    growing = weigh_classes(spread_objective, weights.tolist())
    assert "step" in inspect.signature(growing).parameters  # which make_train_step looks for
