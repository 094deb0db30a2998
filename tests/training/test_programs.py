import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsjax import models
from capsjax.bench import read_program
from capsjax.data import Batch, Sampler, Shifted, epoch_order
from capsjax.training import (
    StepMetrics,
    TrainState,
    init_state,
    make_driver,
    make_evaluate,
    make_run_steps,
    make_train_step,
    paper_loss,
    paper_optimizer,
    programs,
    split_network,
)
from capsjax.training.programs import NEVER

BATCH = 16
SAMPLER = Sampler(Shifted(), 10)


class Programs:
    """The two programs of a driver, with data and state in place."""

    def __init__(self, name, digits, config, devices=None, learning_rate=1e-3):
        self.driver = make_driver(name, batch_size=BATCH, devices=devices)
        self.apply, variables = split_network(models.build(config, rngs=nnx.Rngs(0)))
        optimizer = paper_optimizer(learning_rate, floor=min(1e-6, learning_rate))
        step = make_train_step(self.apply, optimizer, paper_loss, axis_name=self.driver.axis_name)
        self._run = make_run_steps(step, SAMPLER, self.driver, batch_size=BATCH)
        self._evaluate = make_evaluate(
            self.apply, paper_loss, SAMPLER, self.driver, batch_size=BATCH
        )
        self.initial = jax.device_get(init_state(variables, optimizer))
        self.restart()
        self.train, self.test = (
            self.driver.replicate(Batch(jnp.asarray(s.images), jnp.asarray(s.labels)))
            for s in (digits.train, digits.test)
        )
        self.order = self.driver.replicate(epoch_order(jax.random.key(1), len(digits.train.labels)))
        self.key = self.driver.replicate(jax.random.key(2))

    def restart(self):
        self.state = self.driver.replicate(self.initial)

    def run(self, number):
        self.state, sums = self._run(self.state, self.train, self.order, self.key, np.int32(number))
        return jax.device_get(sums)

    def evaluate(self, first=0, batches=7):
        numbers = map(np.int32, (first, batches, len(self.test.labels)))
        return jax.device_get(self._evaluate(self.state.variables, self.test, *numbers))


@pytest.fixture(scope="module")
def compiled(digits, tiny):
    """The programs of a driver, which tests share, before their first step."""
    of = functools.cache(lambda name: Programs(name, digits, tiny))

    def restarted(name):
        of(name).restart()
        return of(name)

    return restarted


@pytest.mark.parametrize("name", ["pmap", "shard"])
def test_eight_devices_agree_with_one(compiled, name):
    expected, programs = compiled("jit"), compiled(name)
    expected_sums = expected.run(5)
    assert len(programs.driver.devices) == 8
    sums = programs.run(5)
    np.testing.assert_allclose(sums.loss, expected_sums.loss, rtol=1e-5)
    np.testing.assert_allclose(sums.error, expected_sums.error, rtol=1e-6)
    # Adam divides by the root of squared gradients: where those are tiny, rounding shows.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        jax.device_get(programs.state.params),
        jax.device_get(expected.state.params),
    )
    ours, theirs = programs.evaluate(), expected.evaluate()
    assert (ours.wrong, ours.examples) == (theirs.wrong, theirs.examples)
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-4)


@pytest.mark.parametrize("name", ["pmap", "shard"])
def test_the_devices_share_the_batch_and_exchange_gradients(compiled, name):
    programs = compiled(name)
    if name == "shard":
        lowered = programs._run.lower(
            programs.state, programs.train, programs.order, programs.key, np.int32(1)
        )
        text = lowered.compile().as_text()
        # Two examples of sixteen on each device: the images that enter the convolution.
        assert "f32[2,28,28,1]" in text
        assert "f32[16,28,28,1]" not in text
        assert "all-reduce" in text
    programs.run(1)
    for leaf in jax.tree.leaves(programs.state):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize("name", ["jit", "pmap", "shard"])
def test_how_steps_are_grouped_into_calls_changes_no_bit(compiled, name):
    programs = compiled(name)
    programs.run(4)
    together = jax.device_get(programs.state)
    programs.restart()
    for number in (1, 2, 1):
        programs.run(number)
    jax.tree.map(np.testing.assert_array_equal, together, jax.device_get(programs.state))


@pytest.fixture
def in_blocks(monkeypatch):
    """Programs as for GPUs, with three steps in a block."""
    monkeypatch.setattr(programs, "_launches_kernels", lambda driver: True)
    monkeypatch.setattr(programs, "_BLOCK", 3)


@pytest.mark.parametrize("name", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_blocks_of_steps_train_like_single_steps(digits, tiny, compiled, name, request):
    one_by_one = compiled(name)
    request.getfixturevalue("in_blocks")
    blocks = Programs(name, digits, tiny)
    np.testing.assert_allclose(blocks.run(7).loss, one_by_one.run(7).loss, rtol=1e-6)
    together = jax.device_get(blocks.state)
    blocks.restart()
    for number in (2, 4, 1):
        blocks.run(number)
    jax.tree.map(np.testing.assert_array_equal, together, jax.device_get(blocks.state))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        together.params,
        jax.device_get(one_by_one.state.params),
    )


@pytest.mark.parametrize(
    ("name", "fixture"),
    [("jit", "tiny"), ("pmap", "tiny"), ("shard", "tiny"), ("jit", "in_blocks")],
)
def test_the_state_is_donated_and_one_program_serves_every_number(
    digits, tiny, name, fixture, request, caplog
):
    request.getfixturevalue(fixture)
    programs = Programs(name, digits, tiny)
    before = programs.state
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for number in (1, 3, 2):
            programs.run(number)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert sum("Finished XLA compilation" in message for message in caplog.messages) == 1


class Recorder:
    """Runs a step that records its samples instead of training."""

    def __init__(self, name, batch_size, num_steps, devices=None, **options):
        self.driver = make_driver(name, batch_size=batch_size, devices=devices)
        self.batch_size, self.num_steps = batch_size, num_steps

        def step(state, sample):
            """Writes labels, keys and pixels of each example to its step and position."""
            positions = self.driver.batch_positions(batch_size)
            seen = (sample.labels, jax.random.key_data(sample.keys), sample.images)
            params = [
                x.at[state.step, positions].add(y) for x, y in zip(state.params, seen, strict=True)
            ]
            state = state._replace(step=state.step + 1, params=self.gathered(state.params, params))
            return state, StepMetrics(jnp.zeros(()), jnp.zeros(()))

        self.run = make_run_steps(step, SAMPLER, self.driver, batch_size=batch_size, **options)

    def gathered(self, before, after):
        """Each device has written its part of the batch."""
        written = self.driver.sum([b - a for a, b in zip(before, after, strict=True)])
        return [a + b for a, b in zip(before, written, strict=True)]

    def empty(self):
        shape = (self.num_steps, self.batch_size)
        params = [
            jnp.zeros(shape, jnp.int32),
            jnp.zeros((*shape, 2), jnp.uint32),
            jnp.zeros((*shape, 28, 28, 1)),
        ]
        return TrainState(jnp.zeros((), jnp.int32), params, {}, ())

    def record(self, examples, key):
        order = epoch_order(jax.random.key(1), len(examples.labels))
        arguments = self.driver.replicate((self.empty(), examples, order, key))
        state, _ = self.run(*arguments, np.int32(self.num_steps))
        return jax.device_get(state.params), np.asarray(order)

    def record_stream(self, examples, key):
        """The same from a chunk of all batches."""
        order = np.asarray(epoch_order(jax.random.key(1), len(examples.labels)))
        order = order[: self.num_steps * self.batch_size].reshape(self.num_steps, -1)
        chunk = self.driver.place_chunk(jax.tree.map(lambda x: np.asarray(x)[order], examples))
        state, key = self.driver.replicate((self.empty(), key))
        state, _ = self.run(state, chunk, np.int32(0), key, np.int32(self.num_steps))
        return jax.device_get(state.params)

    def trip_counts(self, digits, sharding):
        """Those of the compiled program's loops."""
        examples = Batch(jnp.asarray(digits.train.images), jnp.arange(180))
        arguments = (self.empty(), examples, jnp.arange(180), jax.random.key(0), np.int32(7))
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )
        text = self.run.lower(*shapes).compile().as_text()
        return [loop.trip_count for loop in read_program(text).loops]


def test_an_epoch_visits_each_example_once(digits):
    examples = Batch(jnp.asarray(digits.train.images), jnp.arange(180))
    (labels, _, _), _ = Recorder("jit", 18, 10).record(examples, jax.random.key(0))
    assert sorted(labels.ravel()) == list(range(180))


@pytest.mark.parametrize("name", ["jit", "pmap", "shard"])
def test_each_step_and_position_has_its_own_key(digits, name):
    """Samples are those of the documented keys, and no two steps have the same shifts."""
    examples = Batch(jnp.asarray(digits.train.images), jnp.arange(180))
    key, positions = jax.random.key(7), jnp.arange(BATCH)
    (labels, keys, images), order = Recorder(name, BATCH, 3).record(examples, key)
    for step in range(3):
        step_key = jax.random.fold_in(key, step)
        chosen = order[step * BATCH : (step + 1) * BATCH]
        np.testing.assert_array_equal(labels[step], chosen)
        expected = [jax.random.split(jax.random.fold_in(step_key, n))[1] for n in range(BATCH)]
        np.testing.assert_array_equal(keys[step], [jax.random.key_data(k) for k in expected])
        sample = SAMPLER.train(examples, step_key, positions, jnp.asarray(chosen))
        np.testing.assert_array_equal(images[step], sample.images)
    assert len(np.unique(keys.reshape(-1, 2), axis=0)) == 3 * BATCH


def test_seeds_together_see_what_each_sees_alone(digits):
    examples = Batch(jnp.asarray(digits.train.images), jnp.arange(180))
    together, alone = Recorder("pmap", BATCH, 2, several_seeds=True), Recorder("pmap", BATCH, 2)
    keys = jax.random.split(jax.random.key(5), 2)
    orders = jnp.stack([epoch_order(key, 180) for key in keys])
    states = jax.tree.map(lambda x: jnp.stack([x, x]), together.empty())
    arguments = together.driver.replicate((states, examples, orders, keys))
    both, sums = together.run(*arguments, np.int32(2))
    assert sums.loss.shape == (2,)
    for n in range(2):
        arguments = alone.driver.replicate((alone.empty(), examples, orders[n], keys[n]))
        state, _ = alone.run(*arguments, np.int32(2))
        jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(a[n], b), both, state)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("name", [pytest.param("jit", marks=pytest.mark.slow), "pmap"])
def test_a_stream_in_blocks_has_the_samples_of_images_that_stay(digits, name):
    examples = Batch(jnp.asarray(digits.train.images), jnp.arange(180))
    kept, _ = Recorder(name, BATCH, 7).record(examples, jax.random.key(7))
    streamed = Recorder(name, BATCH, 7, streamed=True).record_stream(examples, jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, kept, streamed)


@pytest.mark.usefixtures("in_blocks")
def test_the_loop_over_a_block_has_a_constant_length(digits):
    recorder = Recorder("jit", BATCH, 7)
    trips = recorder.trip_counts(digits, recorder.driver.sharding())
    # The lengths of the loops over whole blocks and over the rest are not constant. There are
    # others, of random numbers.
    assert (trips.count(3), trips.count(None)) == (1, 2)


def test_on_an_absent_h200_steps_run_in_blocks(digits, absent_h200):
    recorder = Recorder("jit", BATCH, 7, devices=absent_h200.mesh.devices.ravel().tolist())
    assert recorder.trip_counts(digits, absent_h200) == [None, 16, None]


@pytest.mark.parametrize("name", ["jit", "pmap"])
def test_evaluation_counts_every_example_once(digits, compiled, name):
    programs = compiled(name)
    programs.run(3)
    sums = programs.evaluate()  # 101 examples in batches of 16: the last one holds 5
    images = jnp.asarray(digits.test.images, jnp.float32) / 255
    target = jax.nn.one_hot(digits.test.labels, 10)
    variables = jax.device_get(programs.state.variables)
    prediction, _ = jax.jit(programs.apply)(variables, images, target=target)
    wrong = np.sum(np.argmax(prediction.scores, axis=-1) != digits.test.labels)
    assert (sums.examples, sums.wrong) == (101, wrong)
    np.testing.assert_allclose(sums.loss, np.sum(paper_loss(prediction, target, images)), rtol=1e-5)
    parts = [programs.evaluate(first, number) for first, number in ((0, 2), (2, 4), (6, 1))]
    assert sum(p.examples for p in parts) == 101
    assert sum(p.wrong for p in parts) == wrong


def test_the_first_step_with_a_loss_that_is_not_finite_is_told(digits, tiny, compiled):
    programs = Programs("jit", digits, tiny, learning_rate=1e38)
    sums = programs.run(6)
    assert 1 < sums.bad_step <= 6
    programs = compiled("jit")
    assert programs.run(2).bad_step == NEVER
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), programs.state.params)
    programs.state = programs.state._replace(params=params)
    assert programs.run(2).bad_step == 3


@pytest.mark.parametrize(
    ("name", "size", "devices", "match"),
    [
        ("pmap", 12, None, "divisible by the number of devices, 8, got 12"),
        ("tpu", 16, None, "driver must be one of pmap, jit, shard, got 'tpu'"),
        ("jit", 16, 2, "driver 'jit' runs on one device, got 2"),
        (None, 16, None, "driver must be one of pmap, jit, shard, got None"),
        ("jit", 0, None, "batch_size must be at least 1, got 0"),
        ("jit", 16, 0, "devices must hold at least one device, got none"),
    ],
)
def test_a_driver_that_cannot_be_is_refused(name, size, devices, match):
    if devices is not None:
        devices = jax.devices()[:devices]
    with pytest.raises(ValueError, match=match):
        make_driver(name, batch_size=size, devices=devices)


def test_arguments_of_the_wrong_type_are_named():
    with pytest.raises(TypeError, match="batch_size must be a Python integer, got True"):
        make_driver("jit", batch_size=True)
    with pytest.raises(TypeError, match="devices must be a sequence of devices, got 1"):
        make_driver("jit", devices=1)
    with pytest.raises(TypeError, match="batch_size must be a Python integer, got None"):
        make_run_steps(lambda *_: None, SAMPLER, make_driver("jit"), batch_size=None)
