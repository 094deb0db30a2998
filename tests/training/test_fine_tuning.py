"""Starting from trained parameters, freezing parts, ending early, another learning rate."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsjax.data import Dataset, Split
from capsjax.errors import CapsjaxError
from capsjax.models import EfficientCapsNetConfig, build
from capsjax.training import (
    Checkpoints,
    ConfigError,
    TrainConfig,
    init_state,
    load_network,
    split_network,
    train,
    train_seeds,
)
from capsjax.training.choices import choose_class_weights, choose_model
from capsjax.training.data_description import DataDescription
from capsjax.training.optimizers import make_optimizer
from capsjax.training.run_directory import RunConfig, RunDirectory
from capsjax.training.stopping import StopRequest


def options(run_dir, **others):
    defaults = {"batch_size": 16, "steps": 2, "validation": 20, "driver": "jit"}
    return TrainConfig(run_dir=run_dir, tensorboard=False, **{**defaults, **others})


def params(run_dir, dataset):
    network = load_network(run_dir, dataset=dataset).network
    return split_network(network)[1].params


@pytest.fixture(scope="module")
def source(tmp_path_factory, digits, tiny_with_decoder):
    """A run as training leaves it, with random parameters."""
    directory = RunDirectory(tmp_path_factory.mktemp("source") / "run")
    directory.create()
    config = options(directory.path, validation=0)
    stored = RunConfig(config, tiny_with_decoder, DataDescription.of(digits), given=True)
    directory.write_config(stored)
    _, variables = split_network(build(tiny_with_decoder, rngs=nnx.Rngs(7)))
    checkpoints = Checkpoints(directory.checkpoints, run=stored.shaping())
    checkpoints.save(init_state(variables, make_optimizer(config, 2)), 2, None)
    checkpoints.finish()
    checkpoints.close()
    return directory.path, variables


def test_a_network_for_other_classes_begins_with_the_layers_of_another(
    source, tmp_path, digits, tiny_with_decoder, capsys, monkeypatch
):
    few = [
        Split(s.images[s.labels < 3], s.labels[s.labels < 3]) for s in (digits.train, digits.test)
    ]
    dataset = Dataset("three", *few, ("a", "b", "c"))
    model = dataclasses.replace(tiny_with_decoder, num_classes=3)
    copy = tmp_path / "source"
    shutil.copytree(source[0], copy)
    config = options(tmp_path / "run", init_from=copy, freeze=("conv", "primary"), validation=9)
    train(config, model=model, dataset=dataset)
    said = capsys.readouterr().err
    assert "checkpoint of step 2; new: classes.kernel, decoder.layers.0.kernel" in said
    found, before = params(config.run_dir, dataset), source[1].params
    for part in ("conv", "primary"):
        jax.tree.map(np.testing.assert_array_equal, found[part], before[part])
    trained, old = (p["decoder"]["layers"][1]["kernel"] for p in (found, before))
    assert 0 < np.abs(np.asarray(trained - old)).max() < 0.01  # moved by two steps
    # A run that has begun needs its source no more.
    shutil.rmtree(copy)
    monkeypatch.setattr(StopRequest, "requested", lambda self: True)  # at the step where it resumes
    longer = dataclasses.replace(config, steps=3, resume=True)
    assert train(longer, dataset=dataset).first_step == 2


# In the gate, test_seeds.py trains several seeds, and the test above starts one from a run.
@pytest.mark.slow
def test_several_seeds_start_from_the_same_network(source, tmp_path, digits, tiny_with_decoder):
    configs = [
        options(tmp_path / str(seed), init_from=source[0], freeze=("conv",), seed=seed)
        for seed in range(2)
    ]
    configs = [dataclasses.replace(each, steps=1, validation=0) for each in configs]
    train_seeds(configs, model=tiny_with_decoder, dataset=digits)
    for config in configs:
        assert (config.run_dir / "reconstructions.png").exists()
        found = params(config.run_dir, digits)["conv"]
        jax.tree.map(np.testing.assert_array_equal, found, source[1].params["conv"])


@pytest.mark.parametrize(
    ("others", "match"),
    [
        ({"init_from": "nowhere"}, "nowhere is neither a run directory nor a network in"),
        ({"init_checkpoint": "3"}, "no checkpoint of step 3 in .*, only 2"),
        ({"warmup_steps": 2}, "--warmup-steps must be less than the steps of the run, 2, got 2"),
        ({"freeze": ("konv",)}, "--freeze must name parts of the network, classes, conv, decoder"),
    ],
)
def test_what_a_network_cannot_start_from(
    source, tmp_path, digits, tiny_with_decoder, others, match
):
    config = options(tmp_path / "run", **{"init_from": source[0], **others})
    with pytest.raises(CapsjaxError, match=match):
        train(config, model=tiny_with_decoder, dataset=digits)
    assert not config.run_dir.exists()


def test_a_network_of_other_layers_is_no_start(source, tmp_path, digits):
    model = EfficientCapsNetConfig(conv_features=(4, 4, 4, 128))
    config = options(tmp_path / "run", init_from=source[0])
    with pytest.raises(ConfigError, match=r"shape: this one has .*convs.0.kernel \[5, 5, 1, 4\]"):
        train(config, model=model, dataset=digits)


def test_normalisation_of_frozen_parts_uses_the_running_statistics():
    network = build(EfficientCapsNetConfig(conv_features=(2, 2, 2, 128)), rngs=nnx.Rngs(0))
    frozen = "norms.0"
    apply, variables = split_network(network, frozen=[frozen])
    images = jnp.asarray(np.random.default_rng(0).random((4, 28, 28, 1)), jnp.float32)
    _, after = jax.jit(lambda v, x: apply(v, x, train=True))(variables, images)
    before = variables.batch_stats
    np.testing.assert_array_equal(after["norms"][0]["mean"], before["norms"][0]["mean"])
    assert (after["norms"][1]["mean"] != before["norms"][1]["mean"]).any()


def test_a_run_that_gets_no_better_ends_early(tmp_path, digits, tiny, capsys):
    still = {"learning_rate": 1e-30, "min_learning_rate": 1e-30}
    config = options(tmp_path / "run", checkpoint_every=1, patience=2, steps=9, **still)
    result = train(config, model=tiny, dataset=digits)
    # The first validation is the best, two more are not better.
    assert result.step == 3
    assert "no improvement in the last 2 validations" in capsys.readouterr().err
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(ConfigError, match="finished at step 3; raise --epochs, --steps or --pat"):
        train(again, dataset=digits)
    assert train(dataclasses.replace(again, patience=4), dataset=digits).step == 5
    with pytest.raises(ConfigError, match="--patience is for one run"):
        train_seeds(
            [dataclasses.replace(config, run_dir=tmp_path / s, seed=n) for n, s in enumerate("ab")]
        )


def test_a_learning_rate_that_changes_is_recorded(tmp_path, digits, tiny, monkeypatch):
    config = options(tmp_path / "run", validation=0)
    train(config, model=tiny, dataset=digits)
    tiny_rate = {"learning_rate": 1e-30, "min_learning_rate": 1e-30}
    config = dataclasses.replace(config, resume=True, steps=3, **tiny_rate)
    before = params(config.run_dir, digits)
    train(config, dataset=digits)
    jax.tree.map(np.testing.assert_array_equal, params(config.run_dir, digits), before)
    # From here on, each run is stopped where it resumes.
    monkeypatch.setattr(StopRequest, "requested", lambda self: True)
    train(dataclasses.replace(config, steps=4), dataset=digits)
    written = json.loads((config.run_dir / "config.json").read_text())
    assert written["changes"] == [{"step": 2, **tiny_rate}]
    assert written["train"]["learning_rate"] == 1e-30
    train(dataclasses.replace(config, steps=6, schedule="cosine"), dataset=digits)
    changes = json.loads((config.run_dir / "config.json").read_text())["changes"]
    assert changes[1:] == [{"step": 3, "schedule": "cosine", "steps": 6}]
    with pytest.raises(ConfigError, match="--decay-steps has no effect with --schedule constant"):
        train(dataclasses.replace(config, schedule="constant", decay_steps=5), dataset=digits)
    with pytest.raises(ConfigError, match="--weight-decay must stay 0.0 to resume the run"):
        train(dataclasses.replace(config, weight_decay=0.1), dataset=digits)


def test_balanced_classes_weigh_inversely_to_their_number(digits):
    labels = np.array([0, 0, 0, 1], np.int32)
    split = Split(np.zeros((4, 1, 1, 1), np.uint8), labels)
    dataset = Dataset("two", split, split, ("a", "b"))
    assert choose_class_weights(None, dataset, split) is None
    assert choose_class_weights("balanced", dataset, split) == pytest.approx((2 / 3, 2))
    several = Split(split.images, np.array([[1, 0], [1, 1], [1, 0], [1, 0]], bool))
    assert choose_class_weights(
        "balanced", Dataset("x", several, several, ("a", "b")), several
    ) == (pytest.approx((5 / 8, 5 / 2)))
    assert choose_class_weights((1.0, 2.0), dataset, split) == (1.0, 2.0)
    with pytest.raises(ConfigError, match="--class-weights must be 2 numbers, one for each class"):
        choose_class_weights((1.0,), dataset, split)
    with pytest.raises(ConfigError, match="balanced: class 'c' has no training images"):
        choose_class_weights("balanced", Dataset("x", split, split, ("a", "b", "c")), split)


def test_fields_of_the_network_are_overridden(digits):
    given = ("conv_features=8", "decoder_features=4,5", "leaky=true", "primary_coupling=0.5")
    model = choose_model(TrainConfig(override=given), digits)
    assert (model.conv_features, model.decoder_features) == (8, (4, 5))
    assert (model.leaky, model.primary_coupling) == (True, 0.5)
    assert choose_model(TrainConfig(override=("implementation=null",)), digits)
    assert (
        choose_model(TrainConfig(override=("decoder_features=,",)), digits).decoder_features == ()
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "size=3",
            "--override must name a field of small: decoder_.*; got 'size=3'",
        ),
        ("conv_features=many", "--override conv_features=many: Expected `int`, got `str`"),
        ("conv_features=0", "--override: conv_features must be at least 1, got 0"),
        ("padding=MAYBE", "padding must be 'VALID' or 'SAME', got 'MAYBE'"),
        ("decoder_features=0", r"--override: decoder_features\[0\] must be at least 1, got 0"),
        ("routing=em", "--override cannot set routing, which --routing determines, got 'rout"),
        ("num_classes=3", "--override cannot set num_classes, which the data set determines, got"),
    ],
)
def test_fields_that_cannot_be_overridden(digits, text, match):
    with pytest.raises(ConfigError, match=match):
        choose_model(TrainConfig(override=(text,)), digits)


def test_a_field_is_overridden_once(digits):
    with pytest.raises(ConfigError, match="--override sets conv_features twice"):
        choose_model(TrainConfig(override=("conv_features=8", "conv_features=9")), digits)


def test_a_network_that_is_given_is_not_overridden(tmp_path, digits, tiny):
    config = options(tmp_path / "run", override=("conv_features=8",))
    with pytest.raises(ConfigError, match="--override has no effect on a network whose config"):
        train(config, model=tiny, dataset=digits)
