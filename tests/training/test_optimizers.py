"""Learning rates by step, weight decay, clipping, and parts that are not trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capsjax.training import ConfigError, TrainConfig, paper_optimizer
from capsjax.training.choices import freeze_parts
from capsjax.training.optimizers import make_optimizer, make_schedule

PARAMS = {
    "conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "convs": {"0": {"kernel": jnp.ones((2, 2)), "prior": jnp.ones((2, 2))}},
}
GRADS = jax.tree.map(lambda x: 0.5 * x, PARAMS)


def updates(optimizer, *gradients):
    """The updates of the last of some steps."""
    state = optimizer.init(PARAMS)
    for grads in gradients:
        found, state = optimizer.update(grads, state, PARAMS)
    return found


def rates(steps, **options):
    config = TrainConfig(learning_rate=0.1, min_learning_rate=0.01, **options)
    schedule = make_schedule(config, 101)
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_learning_rates():
    exponential = {"decay_rate": 0.5, "decay_steps": 10}
    np.testing.assert_allclose(rates([0, 10, 20, 999], **exponential), [0.1, 0.05, 0.025, 0.01])
    cosine = rates([0, 50, 100, 200], schedule="cosine")
    np.testing.assert_allclose(cosine, [0.1, 0.055, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_allclose(rates([0, 999], schedule="constant"), [0.1, 0.1])


@pytest.mark.parametrize("schedule", ["exponential", "cosine", "constant"])
def test_warm_up_comes_before_the_schedule(schedule):
    found = rates([0, 1, 3, 4], schedule=schedule, warmup_steps=4)
    np.testing.assert_allclose(found, [0.02, 0.04, 0.08, 0.1], rtol=1e-6)
    assert rates([104], schedule="cosine", warmup_steps=4) == pytest.approx([0.01])
    late = rates([14], warmup_steps=4, decay_rate=0.5, decay_steps=10)
    assert late == pytest.approx([0.05])


def test_by_default_it_is_the_paper_s():
    ours, paper = (make_optimizer(TrainConfig(), 10), paper_optimizer())
    assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(paper.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, updates(ours, GRADS), updates(paper, GRADS))


def test_weight_decay_is_of_kernels_alone():
    plain = updates(make_optimizer(TrainConfig(), 10), GRADS)
    decayed = updates(make_optimizer(TrainConfig(weight_decay=0.1), 10), GRADS)
    np.testing.assert_array_equal(decayed["conv"]["bias"], plain["conv"]["bias"])
    np.testing.assert_array_equal(decayed["convs"]["0"]["prior"], plain["convs"]["0"]["prior"])
    kernel = plain["conv"]["kernel"] - 1e-3 * 0.1
    np.testing.assert_allclose(decayed["conv"]["kernel"], kernel, rtol=1e-5)


def test_gradients_are_clipped_together():
    norm = float(optax.tree.norm(GRADS))
    large = jax.tree.map(lambda x: 100 * x, GRADS)
    clipped = make_optimizer(TrainConfig(clip_norm=norm), 10)
    # Adam does not see the scale of one gradient alone, but of two.
    found = updates(clipped, large, GRADS)
    expected = updates(make_optimizer(TrainConfig(), 10), GRADS, GRADS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_frozen_parts_stay_and_have_no_moments():
    optimizer = freeze_parts(optax.adam(0.1), PARAMS, ["conv"])
    found = updates(optimizer, GRADS)
    np.testing.assert_array_equal(found["conv"]["kernel"], 0)
    assert (found["convs"]["0"]["kernel"] != 0).all()  # whose name begins with the same letters
    arrays = jax.tree.leaves(optimizer.init(PARAMS))
    assert [x.shape for x in arrays if x.ndim] == [(2, 2)] * 4


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (["con"], "--freeze must name parts of the network, conv, convs, got 'con'"),
        (["conv", "convs.0"], "--freeze must leave something to train, got conv, convs.0"),
    ],
)
def test_what_cannot_be_frozen(parts, match):
    with pytest.raises(ConfigError, match=match):
        freeze_parts(optax.adam(0.1), PARAMS, parts)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"schedule": "cosine", "decay_rate": 0.5}, "--decay-rate has no effect with --schedule c"),
        ({"schedule": "constant", "min_learning_rate": 1e-5}, "--min-learning-rate has no effect"),
        ({"decay_rate": 1.0, "decay_steps": 9}, "--decay-steps has no effect with --decay-rate 1"),
        ({"init_checkpoint": "best"}, "--init-checkpoint has no effect without --init-from"),
    ],
)
def test_options_without_effect(options, match):
    with pytest.raises(ConfigError, match=match):
        TrainConfig(**options).check_effect()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"schedule": "linear"}, "--schedule must be one of exponential, cosine, constant, got 'l"),
        ({"patience": 1.5}, "--patience must be an integer, got 1.5"),
        ({"freeze": "conv"}, "--freeze must be a tuple of strings, got 'conv'"),
        (
            {"class_weights": "same"},
            "--class-weights must be balanced or a tuple of numbers, got 'same'",
        ),
        ({"class_weights": [-1.0]}, r"--class-weights must be positive, got \(-1.0,\)"),
        ({"run_dir": 3}, "--run-dir must be a path, got 3"),
        ({"clip_norm": 0.0}, "--clip-norm must be positive, got 0.0"),
        ({"clip_norm": float("nan")}, "--clip-norm must be positive, got nan"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0, got -1.0"),
        ({"weight_decay": float("inf")}, "--weight-decay must be at least 0, got inf"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0, got -1"),
        ({"warmup_steps": 2**31}, "--warmup-steps must be below 2147483648"),
        ({"patience": 0}, "--patience must be at least 1, got 0"),
        ({"patience": 1, "validation": 0}, "--patience needs validation images, got --validation"),
        ({"class_weights": (1.0, 0.0)}, "--class-weights must be positive"),
        ({"class_weights": ()}, "--class-weights needs at least one value"),
        ({"freeze": ()}, "--freeze needs at least one value"),
        ({"override": ("conv_features",)}, "--override must be FIELD=VALUE, got 'conv_features'"),
    ],
)
def test_values_that_cannot_be(options, match):
    with pytest.raises(ConfigError, match=match):
        TrainConfig(**options)
