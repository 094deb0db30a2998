"""Objectives, optimizers and metrics that are given in Python; numbers to predict."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard_events import scalars

from capsjax.data import DataError, Dataset, Split, load, save_npz
from capsjax.training import (
    Checkpoints,
    ConfigError,
    DivergedError,
    EvaluateConfig,
    TrainConfig,
    evaluate,
    load_network,
    make_train_step,
    predict_test,
    split_network,
    train,
)
from capsjax.training.custom import Custom, try_optimizer
from capsjax.training.programs import as_batch
from capsjax.training.setup import _shared_programs, set_up
from capsjax.training.step import initial_variables


def options(run_dir, **others):
    defaults = {"batch_size": 16, "steps": 2, "validation": 20, "driver": "jit"}
    return TrainConfig(run_dir=run_dir, **{**defaults, **others})


def far(prediction, target, images):
    """An objective of the poses."""
    return jnp.sum(prediction.poses**2, axis=(-2, -1)) + jnp.sum(target, axis=-1)


def length_of_first(prediction, target):
    return prediction.scores[:, 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, tiny):
    config = options(tmp_path_factory.mktemp("custom") / "run", checkpoint_every=1)
    given = {"objective": far, "optimizer": optax.sgd(0.1), "metrics": {"first": length_of_first}}
    return config, given, train(config, model=tiny, dataset=digits, **given)


def test_what_is_given_is_used_and_recorded(trained, digits):
    config, _, result = trained
    scores, _ = predict_test(EvaluateConfig(run_dir=config.run_dir, driver="jit"), dataset=digits)
    assert result.test.metrics["first"] == pytest.approx(scores[:, 0].mean(), rel=1e-5)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["split"] for r in records if "metrics" in r] == ["validation", "validation", "test"]
    assert records[-1]["metrics"] == result.test.metrics
    written = json.loads((config.run_dir / "result.json").read_text())
    assert written["test_metrics"] == result.test.metrics
    ((step, value),) = scalars(config.run_dir / "tensorboard", "test/first")
    assert (step, value) == (2, pytest.approx(result.test.metrics["first"]))
    assert json.loads((config.run_dir / "config.json").read_text())["custom"] == [
        "objective",
        "optimizer",
    ]
    # Plain gradient descent keeps no moments.
    names = Checkpoints(config.run_dir / "checkpoints", read_only=True)._metadata(2)["opt_state"]
    assert not any(names)


def test_what_is_given_may_have_changed_since_the_last_call(tmp_path, digits, tiny):
    # Its program is not among those that runs share.
    before = _shared_programs.cache_info()
    for given in (Custom(objective=far), Custom(metrics={"first": length_of_first})):
        programs = [set_up((options(tmp_path),), tiny, digits, given).feed for _ in range(2)]
        assert programs[0].evaluate is not programs[1].evaluate
    assert _shared_programs.cache_info() == before


def test_an_evaluation_needs_the_objective_for_the_loss_alone(trained, digits):
    config, given, result = trained
    config = EvaluateConfig(run_dir=config.run_dir, driver="jit")
    without = evaluate(config, dataset=digits).test
    assert np.isnan(without.loss)
    assert (without.wrong, without.class_wrong) == (result.test.wrong, result.test.class_wrong)
    del given["optimizer"]
    assert evaluate(config, dataset=digits, **given).test.loss == pytest.approx(result.test.loss)
    given["optimizer"] = optax.sgd(0.1)


def test_a_run_goes_on_with_the_same(trained, digits):
    config, given, _ = trained
    longer = dataclasses.replace(config, steps=3, resume=True)
    message = "Python as at its start: objective and optimizer, got "
    with pytest.raises(ConfigError, match=message + "neither"):
        train(longer, dataset=digits)
    with pytest.raises(ConfigError, match=message + "objective"):
        train(longer, dataset=digits, objective=far)
    assert train(longer, dataset=digits, **given).first_step == 2


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.GradientTransformationExtraArgs(
            lambda _: (), lambda grads, state, params, *, scale=1.0: (grads, state)
        ),
        optax.GradientTransformation(
            lambda _: (), lambda grads, state, params: (jax.lax.pmean(grads, "batch"), state)
        ),
        optax.GradientTransformation(
            lambda _: 0, lambda grads, state, params: (grads, state + jnp.float32(0.5))
        ),
    ],
    ids=["another argument", "the axis of the devices", "promoted state"],
)
def test_what_an_optimizer_may_do(optimizer):
    try_optimizer(optimizer, {"kernel": jnp.ones(2)}, "batch")


def test_a_line_search_leaves_frozen_parts(tmp_path, digits, tiny):
    config = options(tmp_path / "run", steps=1, validation=0, freeze=("conv",))
    train(config, model=tiny, dataset=digits, optimizer=optax.lbfgs())
    found = split_network(load_network(config.run_dir, dataset=digits).network)[1].params
    first = initial_variables(tiny, jax.random.split(jax.random.key(0), 3)[0]).params
    jax.tree.map(np.testing.assert_array_equal, found["conv"], first["conv"])
    assert np.abs(found["classes"]["kernel"] - first["classes"]["kernel"]).max() > 0


def stateful(first, change):
    def update(grads, state, params):
        return grads, {"count": change(state["count"])}

    return optax.GradientTransformation(lambda params: {"count": first}, update)


@pytest.mark.parametrize(
    ("given", "others", "match"),
    [
        ({"objective": far}, {"loss": "paper"}, "--loss has no effect when an objective is given"),
        ({"objective": far}, {"class_weights": "balanced"}, "--class-weights has no effect"),
        ({"optimizer": optax.sgd(1.0)}, {"learning_rate": 0.1}, "--learning-rate has no effect wh"),
        ({"optimizer": optax.sgd(1.0)}, {"clip_norm": 0.1}, "--clip-norm has no effect when an o"),
        ({"objective": "far"}, {}, "objective must be a function, got 'far'"),
        (
            {"optimizer": optax.add_noise(0.1, 0.5, jax.random.key(0))},
            {},
            "must not keep a random key",
        ),
        (
            {"optimizer": stateful(np.int32(0), lambda state: state + 0.5)},
            {},
            r"optimizer must keep the shapes .* \['count'\] from int32 \[\] to float32 \[\]",
        ),
        (
            {"optimizer": stateful((), lambda state: (*state, 1))},
            {},
            "keep the structure of its st",
        ),
        ({"optimizer": stateful((0,), list)}, {}, "keep the structure of its state"),
        ({"optimizer": "adam"}, {}, "optimizer must be an optax.GradientTransformation, got 'adam"),
        ({"metrics": {"first": 3}}, {}, r"metrics\['first'\] must be a function, got 3"),
        ({"metrics": [length_of_first]}, {}, "metrics must be a dict of functions by name, got "),
        ({"metrics": {1: length_of_first}}, {}, "metrics must be a dict of functions by name, got"),
        ({"metrics": {"loss": length_of_first}}, {}, "metrics must not be named 'loss'"),
        ({"objective": lambda p, t, i, step: t}, {}, "missing 1 required positional arg.* 'step'"),
    ],
)
def test_what_cannot_be_given(tmp_path, digits, tiny, given, others, match):
    with pytest.raises((ConfigError, TypeError, ValueError), match=match):
        train(options(tmp_path / "run", **others), model=tiny, dataset=digits, **given)
    assert not (tmp_path / "run").exists()


def scores(prediction, target):
    return prediction.scores


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"objective": lambda p, t, i: jnp.mean(far(p, t, i))},
            r"objective must return one value per example, shape \(2,\), got \(\)",
        ),
        ({"objective": lambda *_: 3.0}, r"objective must return one .*, got 3.0"),
        (
            {"objective": lambda p, t, i: jnp.argmax(t, -1)},
            "objective must return floating-point numbers, got dtype int32",
        ),
        ({"metrics": {"all": scores}}, r"metric 'all' must return .* got \(2, 10\)"),
        (
            {"metrics": {"i": lambda p, t: 1j * p.scores[:, 0]}},
            "metric 'i' must return real numbers, got dtype complex64",
        ),
    ],
)
def test_values_that_are_not_one_number_per_example(tmp_path, digits, tiny, given, match):
    with pytest.raises(ValueError, match=match):
        train(options(tmp_path / "run"), model=tiny, dataset=digits, **given)
    assert not (tmp_path / "run").exists()


def test_predictions_are_written_of_the_same_metrics_alone(trained, digits, tmp_path):
    config = EvaluateConfig(
        run_dir=trained[0].run_dir, predictions=tmp_path / "p.csv", driver="jit"
    )
    with pytest.raises(ValueError, match="metric 'all' must return one value per example"):
        evaluate(config, dataset=digits, metrics={"all": scores})
    with pytest.raises(TypeError, match="objective must be a function, got 3"):
        evaluate(config, dataset=digits, objective=3)


def half(prediction, target):
    return jnp.where(prediction.scores[:, 0] > 0, jnp.nan, 1).astype(jnp.bfloat16)


def test_narrow_moments_and_numbers_that_are_not_finite_are_stored(tmp_path, digits, tiny):
    # The second receives the loss, and stores infinity until it has seen one.
    adapting = optax.contrib.reduce_on_plateau(accumulation_size=2)
    optimizer = optax.chain(optax.adam(1e-3, mu_dtype=jnp.bfloat16), adapting)
    given = {"optimizer": optimizer, "metrics": {"half": half}}
    config = options(tmp_path / "run", steps=1)
    result = train(config, model=tiny, dataset=digits, **given)
    assert np.isnan(result.test.metrics["half"])
    written = json.loads((config.run_dir / "result.json").read_text())
    assert written["test_metrics"] == {"half": None}
    longer = dataclasses.replace(config, steps=2, resume=True)
    assert train(longer, dataset=digits, **given).first_step == 1


@pytest.fixture(scope="module")
def brightness(digits):
    """Digits with two numbers to predict."""

    def measured(split):
        means = split.images.mean((1, 2, 3)).astype(np.float32) / 255
        return Split(split.images, np.stack([means, 1 - means], 1))

    return Dataset("brightness", measured(digits.train), measured(digits.test), ("mean", "rest"))


@pytest.fixture(scope="module")
def regression(tmp_path_factory, brightness, tiny):
    config = options(tmp_path_factory.mktemp("regression") / "run", checkpoint_every=1)
    model = dataclasses.replace(tiny, num_classes=2)
    return config, model, train(config, model=model, dataset=brightness)


def test_numbers_are_predicted(regression, brightness, tmp_path):
    config, _, result = regression
    assert result.test.wrong is None
    assert np.isnan(result.test.error)
    assert result.validation_error is None
    path = tmp_path / "predictions.csv"
    again = EvaluateConfig(run_dir=config.run_dir, predictions=path, driver="jit")
    evaluated = evaluate(again, dataset=brightness)
    assert evaluated.test.loss == pytest.approx(result.test.loss, rel=1e-5)
    scores, labels = predict_test(again, dataset=brightness)
    np.testing.assert_array_equal(labels, brightness.test.labels)
    error = np.abs(scores - labels).mean()
    assert result.test.metrics == {"absolute_error": pytest.approx(error, rel=1e-5)}
    first, *rows = csv.reader(path.read_text().splitlines())
    assert first == [
        "image",
        *(f"{k} of {n}" for k in ("label", "prediction") for n in ("mean", "rest")),
    ]
    written = np.array(rows, float)[:, 1:]
    np.testing.assert_allclose(written, np.hstack([labels, scores]), rtol=1e-6)


def test_the_best_checkpoint_has_the_least_loss(regression):
    config, _, _ = regression
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {r["step"]: r["loss"] for r in records if r["split"] == "validation"}
    assert all(r["error"] is None for r in records)
    checkpoints = Checkpoints(config.run_dir / "checkpoints", read_only=True)
    assert checkpoints.choose("best") == min(losses, key=losses.get)
    checkpoints.close()


def test_a_validation_loss_that_is_not_finite_is_no_best_one(tmp_path, brightness, regression):
    _, model, _ = regression

    def objective(prediction, target, images, step=None):  # NaN in evaluations
        return prediction.scores[:, 0] * (jnp.nan if step is None else 1.0)

    with pytest.raises(DivergedError, match="the validation loss is not finite at step 2"):
        train(options(tmp_path / "run"), model=model, dataset=brightness, objective=objective)


def test_a_regression_goes_on(regression, brightness):
    config, _, _ = regression
    longer = dataclasses.replace(config, steps=3, resume=True)
    assert train(longer, dataset=brightness).first_step == 2


def test_numbers_survive_a_file(brightness, tmp_path):
    save_npz(brightness, tmp_path / "b.npz")
    found = load("npz", data_dir=tmp_path / "b.npz")
    assert found.is_regression
    assert found.class_names == ("mean", "rest")
    np.testing.assert_array_equal(found.train.labels, brightness.train.labels)
    images = np.zeros((2, 4, 4), np.uint8)
    for targets, match in (
        (np.array(["a", "b"]), r"train_targets must be numbers \[N\] or \[N, J\], got <U1 \[2\]"),
        (np.array([0, np.nan]), "train.labels must be finite"),
        (np.array([]), r"train.labels must be .* got float32 \[0, 1\]"),
    ):
        np.savez(
            tmp_path / "c.npz",
            train_images=images,
            train_targets=targets,
            test_images=images,
            test_targets=targets,
        )
        with pytest.raises(DataError, match=match):
            load("npz", data_dir=tmp_path / "c.npz")


def test_classes_and_numbers_are_not_mixed_up(regression, brightness, digits, tmp_path, tiny):
    config, model, _ = regression
    with pytest.raises(ConfigError, match="data set mnist_5k has classes, unlike the run's data"):
        evaluate(EvaluateConfig(run_dir=config.run_dir, driver="jit"), dataset=digits)
    for others, match in (
        ({"until_error": 0.1}, "--until-error is for classes, not for numbers to predict"),
        ({"class_weights": "balanced"}, "--class-weights is for classes, not for numbers"),
        ({"loss": "paper"}, "--loss must be squared_error to predict numbers, got 'paper'"),
    ):
        with pytest.raises(ConfigError, match=match):
            set_up([options(tmp_path, **others)], model, brightness)
    large = dataclasses.replace(
        brightness, test=brightness.test._replace(labels=10 * brightness.test.labels)
    )
    evaluated = evaluate(EvaluateConfig(run_dir=config.run_dir, driver="jit"), dataset=large)
    assert evaluated.test.metrics["absolute_error"] > 1
    with pytest.raises(ConfigError, match="from .* scores of capsule networks lie in"):
        set_up([options(tmp_path)], model, large)


def test_a_step_on_numbers_has_no_error(brightness, tmp_path, regression):
    config, model, _ = regression
    setup = set_up([config], model, brightness)
    sample = setup.sampler.test(as_batch(brightness.test), np.arange(4))
    step = make_train_step(
        setup.apply, optax.sgd(0.1), lambda p, t, _: ((p.scores - t) ** 2).sum(1)
    )
    state = setup.initial._replace(opt_state=optax.sgd(0.1).init(setup.initial.params))
    _, metrics = jax.jit(step)(state, sample)
    assert np.isnan(metrics.error)
    assert np.isfinite(metrics.loss)
