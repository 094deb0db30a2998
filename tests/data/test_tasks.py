"""Samples against NumPy, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsjax.data import (
    Batch,
    Cropped,
    Distorted,
    Pairs,
    Placed,
    Sampler,
    Shifted,
    is_right,
    random_placement,
)

CLASSES = 4


def split(counts=(5, 3, 6, 2), side=8):
    """Images whose pixels are their index, in the order of their labels."""
    labels = np.repeat(np.arange(CLASSES), counts).astype(np.int32)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] + np.uint8(100)
    return Batch(
        jnp.asarray(np.broadcast_to(images, (len(labels), side, side, 1))), jnp.asarray(labels)
    )


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def numbers_of(batch):
    """Which images were selected, by their pixels."""
    return np.asarray(batch.images[..., 0, 0, 0]).astype(int) - 100


def test_pairs_are_uniform_over_all_images_of_other_classes():
    digits, draws = split(), 16000
    first = np.arange(draws) % 16
    batch = jax.jit(Pairs().select)(keys(draws), digits, jnp.asarray(first))
    labels, drawn = np.asarray(batch.labels), numbers_of(batch)
    np.testing.assert_array_equal(drawn[:, 0], first)
    np.testing.assert_array_equal(labels, np.asarray(digits.labels)[drawn])
    assert (labels[:, 0] != labels[:, 1]).all()
    for image in range(16):
        counts = np.bincount(drawn[first == image, 1], minlength=16)
        others = np.asarray(digits.labels) != digits.labels[image]
        assert (counts[~others] == 0).all()
        expected = 1000 / others.sum()
        assert (np.abs(counts[others] - expected) < 6 * np.sqrt(expected)).all()


def pair_in_numpy(images, offsets, size, most):
    """Each digit centred, moved, added, clipped."""
    total, parts = np.zeros((size, size), int), []
    for image, (row, column) in zip(images, offsets, strict=True):
        canvas = np.zeros((size + 2 * most, size + 2 * most), int)
        top = (size - image.shape[0]) // 2 + most
        canvas[
            top + row : top + row + image.shape[0], top + column : top + column + image.shape[1]
        ] = image
        parts.append(canvas[most : most + size, most : most + size])
        total += parts[-1]
    return np.minimum(total, 255), parts


def test_pairs_are_shifted_added_and_clipped():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (300, 2, 28, 28, 1), np.uint8)
    render = jax.jit(functools.partial(Pairs().render, train=True))
    pictures, drawings = map(np.asarray, render(keys(300), images))
    seen = set()
    for n in range(300):
        offsets = []
        for part in drawings[n, ..., 0]:
            rows, columns = np.nonzero(part.any(1))[0], np.nonzero(part.any(0))[0]
            offsets.append((rows[0] - 4, columns[0] - 4))
        total, parts = pair_in_numpy(images[n, ..., 0], offsets, 36, 4)
        np.testing.assert_array_equal(np.round(pictures[n, ..., 0] * 255), total)
        np.testing.assert_array_equal(np.round(drawings[n, ..., 0] * 255), parts)
        assert total.max() == 255
        seen.update(offsets)
    assert {max(abs(r), abs(c)) for r, c in seen} <= set(range(5))
    assert len(seen) == 81  # every shift of up to four pixels, among 600


@pytest.mark.parametrize("task", [Shifted(), Pairs(12, 2)], ids=["single", "pairs"])
def test_targets_and_masks_are_those_of_the_labels(task):
    make = jax.jit(Sampler(task, CLASSES).train)
    sample = make(split(), keys(1)[0], np.arange(6), np.arange(3, 9))
    labels = np.asarray(sample.labels).reshape(6, -1)
    hot = np.eye(CLASSES)[labels]
    np.testing.assert_array_equal(sample.target, hot.sum(1))
    np.testing.assert_array_equal(np.asarray(sample.masks).reshape(hot.shape), hot)
    np.testing.assert_array_equal(labels[:, 0], split().labels[3:9])


def test_labels_must_be_integers():
    numbers, floats = jnp.arange(6), split()._replace(labels=split().labels.astype(float))
    sampler = Sampler(Shifted(), CLASSES)
    for make in (sampler.test, lambda d, n: sampler.train(d, keys(1)[0], n, n)):
        with pytest.raises(TypeError, match="labels must be class numbers, .* got dtype float32"):
            jax.eval_shape(make, floats, numbers)


def test_a_prediction_that_is_not_a_number_is_wrong():
    scores, labels = jnp.array([[jnp.nan, jnp.nan], [1.0, jnp.nan], [1.0, 0.0]]), jnp.zeros(3, int)
    np.testing.assert_array_equal(is_right(scores, labels), [False, False, True])
    assert is_right(scores[:0], labels[:0]).shape == (0,)


def test_other_bad_arguments_are_named():
    with pytest.raises(TypeError, match="task must be a Task, got 10"):
        Sampler(10, Shifted())
    with pytest.raises(TypeError, match="num_classes must be a Python integer, got True"):
        Sampler(Shifted(), True)
    with pytest.raises(TypeError, match="labels must be class numbers, .* got dtype float32"):
        is_right(jnp.ones((2, 3)), jnp.ones(2))
    for labels in (jnp.array([0]), jnp.array([[[0]], [[1]]]), jnp.zeros((2, 4), int), jnp.array(0)):
        with pytest.raises(ValueError, match=r"labels must have shape .* or \[B, k\] .*\(2, 3\)"):
            is_right(jnp.ones((2, 3)), labels)
    with pytest.raises(ValueError, match=r"labels that are bool must have shape \(2, 3\), got"):
        is_right(jnp.ones((2, 3)), jnp.ones((2, 1), bool))
    with pytest.raises(ValueError, match=r"scores must have shape \[B, J\], got shape \(3,\)"):
        is_right(jnp.ones(3), jnp.zeros(3, int))
    with pytest.raises(TypeError, match="split.labels must be an array, got None"):
        Sampler(Shifted(), CLASSES).test(split()._replace(labels=None), jnp.arange(2))


@pytest.mark.parametrize(
    ("task", "flip"), [(Shifted(), None), (Pairs(12, 2), "both")], ids=["single", "pairs"]
)
def test_a_training_sample_depends_on_step_position_and_image_alone(task, flip):
    digits, sampler, key = split(), Sampler(task, CLASSES, flip), keys(1)[0]
    make = jax.jit(lambda key, at, indices: sampler.train(digits, key, at, indices))
    whole = make(key, jnp.arange(16), jnp.arange(16))
    part = make(key, jnp.arange(8, 16), jnp.arange(8, 16))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(
            jax.random.key_data(a)[8:] if a is whole.keys else a[8:],
            jax.random.key_data(b) if a is whole.keys else b,
        )
    moved, other = (
        make(key, jnp.arange(16)[::-1], jnp.arange(16)),
        make(keys(2)[1], jnp.arange(16), jnp.arange(16)),
    )
    for different in (moved, other):
        assert (np.asarray(different.images) != np.asarray(whole.images)).any()
        assert (jax.random.key_data(different.keys) != jax.random.key_data(whole.keys)).any()


def test_a_split_with_other_counts_of_labels_and_images_is_refused():
    digits = split()
    sampler, first = Sampler(Shifted(), CLASSES), jnp.arange(2)
    with pytest.raises(ValueError, match=r"one label per image, shape \(16,\), got .*\(3,\)"):
        sampler.train(digits._replace(labels=digits.labels[:3]), keys(1)[0], first, first)
    batch = Batch(digits.images[:2], digits.labels[:1])
    for sample in (
        lambda: sampler.train_batch(batch, keys(1)[0], first),
        lambda: sampler.test(batch, first),
        lambda: sampler.test_batch(batch, first),
    ):
        with pytest.raises(ValueError, match=r"one label per image, shape \(2,\), got .*\(1,\)"):
            sample()
    with pytest.raises(ValueError, match=r"where labels are bool, shape \(16, 'J'\), got"):
        sampler.test(digits._replace(labels=digits.labels > 1), first)
    for key, got in ((jnp.zeros(2, jnp.uint32), "uint32"), (3, "int")):
        with pytest.raises(TypeError, match=f"key must be typed as by jax.random.key, got {got}"):
            sampler.train(digits, key, first, first)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Shifted(-1), "max_shift must be at least 0, got -1"),
        (lambda: Shifted(0.5), "max_shift must be a Python integer, got 0.5"),
        (lambda: Placed("a"), "size must be a Python integer, got 'a'"),
        (lambda: Pairs(36, -1), "max_shift must be at least 0, got -1"),
        (lambda: Cropped(brightness=np.nan), "brightness must be finite, got nan"),
        (lambda: Cropped(contrast=3), r"contrast must be a pair \(smallest, largest\), got 3"),
        (lambda: Cropped(contrast=(2, 1)), r"must be \(smallest, largest\), got \(2, 1\)"),
        (lambda: Sampler(Shifted(), 3, flip="up"), "flip must be one of horizontal, .* got 'up'"),
    ],
)
def test_options_of_tasks_are_checked_when_they_are_made(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


@pytest.mark.parametrize("task", [Shifted(), Pairs(), Placed(), Distorted(), Cropped(4)], ids=str)
def test_samples_do_not_depend_on_the_width_of_numbers(task):
    first = np.arange(4, dtype=np.int32)

    def samples():
        sampler, digits = Sampler(task, CLASSES, flip="both"), split()
        return sampler.train(digits, keys(1)[0], first, first), sampler.test(digits, first)

    expected = samples()
    with jax.enable_x64(True):
        got = samples()
    for sample, same in zip(got, expected, strict=True):
        for name in ("images", "target", "masks", "drawings"):
            x, y = getattr(sample, name), getattr(same, name)
            assert x.dtype == y.dtype == jnp.float32
            np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.parametrize("task", [Shifted(), Pairs(), Placed(), Distorted(), Cropped(4)], ids=str)
def test_a_batch_without_images(task):
    images = split().images[jnp.zeros((0, 2) if isinstance(task, Pairs) else 0, int)]
    pixels, _ = task.render(keys(0), images, train=True)
    assert pixels.shape[0] == 0


def test_placing_reaches_every_place_equally_often():
    image = np.full((1, 5, 5, 1), 9, np.uint8)
    place = jax.jit(functools.partial(random_placement, size=7))
    out = np.asarray(place(keys(9000), np.repeat(image, 9000, 0)))
    assert (out.sum((1, 2, 3)) == 9 * 25).all()
    rows, columns = (out[..., 0] > 0).any(2).argmax(1), (out[..., 0] > 0).any(1).argmax(1)
    counts = np.bincount(3 * rows + columns, minlength=9)
    assert (np.abs(counts - 1000) < 200).all()
    with pytest.raises(
        ValueError, match=r"size must be at least that of the images, \(5, 5\), got"
    ):
        random_placement(keys(1), jnp.asarray(image), size=4)


TASKS = [Shifted(), Placed(12), Distorted(12), Pairs(12, 2)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_test_sample_depends_on_its_number_alone(task):
    digits = split()
    sampler = Sampler(task, CLASSES)
    make = jax.jit(lambda numbers: sampler.test(digits, numbers))
    sample, later = make(jnp.arange(32)), make(jnp.arange(16, 48))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[16:], b[:16]), sample, later)
    parts = jax.pmap(lambda n: sampler.test(digits, n))(jnp.arange(32).reshape(8, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.reshape(b, np.shape(a))), sample, parts
    )
    assert sample.images.shape == (32, *task.image_shape((8, 8, 1)))
    assert np.asarray(sample.target).sum(1).tolist() == [sample.labels[0].size] * 32
    if not isinstance(task, Shifted):
        # The same digits again, otherwise made.
        assert (np.asarray(sample.images[:16]) != np.asarray(sample.images[16:])).any()


def test_test_images_are_not_shifted():
    digits = split()
    sample = jax.jit(Sampler(Shifted(3), CLASSES).test)(digits, np.arange(16))
    np.testing.assert_array_equal(np.round(np.asarray(sample.images) * 255), digits.images)


@pytest.mark.parametrize(
    ("task", "dtype"),
    [(Shifted(1, 0.5), np.uint16), (Pairs(9, 1), np.uint16), (Pairs(9, 1), np.float32)],
)
def test_pixels_of_other_dtypes_are_those_of_bytes(task, dtype):
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 8, 8, 1), np.uint8)
    images = images if isinstance(task, Pairs) else images[:, 0]
    other = (images / 255 * (1 if dtype == np.float32 else 65535)).astype(dtype)
    render = jax.jit(functools.partial(task.render, train=True))
    for a, b in zip(*(render(keys(4), x) for x in (images, other)), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.51 / 255)


def test_a_fill_is_a_grey_or_the_edge():
    with pytest.raises(ValueError, match="fill must be 'edge' or from 0 .* to 1 .*, got 255"):
        Shifted(fill=255)


def test_flips_leave_all_else_as_it_was():
    digits = Batch(jax.random.randint(keys(1)[0], (16, 4, 4, 1), 0, 256, jnp.uint8), split().labels)
    first, key = jnp.arange(16), keys(1)[0]
    plain, flipped = (
        jax.jit(Sampler(Shifted(0), CLASSES, flip).train)(digits, key, first, first)
        for flip in (None, "horizontal")
    )
    straight = (plain.images == flipped.images).all((1, 2, 3))
    np.testing.assert_array_equal(
        flipped.images,
        jnp.where(straight[:, None, None, None], plain.images, plain.images[:, :, ::-1]),
    )
    assert 0 < straight.sum() < 16
    np.testing.assert_array_equal(*(jax.random.key_data(x.keys) for x in (plain, flipped)))


def test_a_pair_is_right_only_if_both_are():
    labels = jnp.array([[0, 1], [2, 3], [1, 0]])
    one_right = jnp.array([[0.9, 0.1, 0.8, 0.0], [0.9, 0.0, 0.8, 0.1], [0.0, 0.9, 0.8, 0.1]])
    assert not is_right(one_right, labels).any()
    both = jax.nn.one_hot(labels, 4).sum(1) + 0.01 * jnp.arange(4)[None]
    assert is_right(both, labels).all()
    np.testing.assert_array_equal(
        is_right(one_right, jnp.array([0, 1, 1])), np.array([True, False, True])
    )


def test_any_number_of_classes():
    labels = jnp.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    scores = jnp.array([[0.9, 0.2, 0.3], [0.9, 0.8, 0.1], [0.9, 0.9, 0.9]])
    np.testing.assert_array_equal(is_right(scores, labels), np.array([True, False, True]))
    images, three = jnp.zeros((3, 4, 4, 1), jnp.uint8), jnp.arange(3)
    sampler = Sampler(Shifted(0), num_classes=3)
    sample = jax.jit(sampler.train)(Batch(images, labels), keys(1)[0], three, three[::-1])
    np.testing.assert_array_equal(sample.target, labels[::-1])
    np.testing.assert_array_equal(sample.masks, labels[::-1])
    with pytest.raises(ValueError, match=r"one label per image, shape \(3,\), got .*\(2, 3\)"):
        sampler.train(Batch(images, labels[:2]), keys(1)[0], three, three)


@pytest.mark.parametrize("task", [Placed(), Pairs()])
def test_the_first_test_samples_are_of_all_classes(task):
    images = Batch(np.zeros((100, 28, 28, 1), np.uint8), np.repeat(np.arange(5), 20))
    sample = jax.jit(Sampler(task, 5).test)(images, np.arange(100))
    first = np.asarray(sample.labels).reshape(100, -1)[:, 0]
    assert set(first[:25]) == set(range(5))
    np.testing.assert_array_equal(np.bincount(first), [20] * 5)
