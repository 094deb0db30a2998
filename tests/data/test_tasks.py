"""Tasks against NumPy, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsjax.data import (
    Batch,
    Distorted,
    Pairs,
    Placed,
    Shifted,
    evaluation_samples,
    is_right,
    random_placement,
)

CLASSES = 4


def split(counts=(5, 3, 6, 2), side=8):
    """Images with their number as pixels, sorted by label."""
    labels = np.repeat(np.arange(CLASSES), counts).astype(np.int32)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] + np.uint8(100)
    return Batch(
        jnp.asarray(np.broadcast_to(images, (len(labels), side, side, 1))), jnp.asarray(labels)
    )


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def numbers_of(batch):
    """Numbers of the gathered images, from their pixels."""
    return np.asarray(batch.images[..., 0, 0, 0]).astype(int) - 100


def test_pairs_are_uniform_over_all_images_of_other_classes():
    digits, draws = split(), 16000
    first = np.arange(draws) % 16
    batch = jax.jit(Pairs().gather)(keys(draws), digits, jnp.asarray(first))
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
    """Centres, shifts, adds and clips two digits."""
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
    labels = np.tile([1, 3], (300, 1)).astype(np.int32)
    made = Pairs().make(
        keys(300), Batch(jnp.asarray(images), jnp.asarray(labels)), num_classes=CLASSES, train=True
    )
    seen = set()
    for n in range(300):
        offsets = []
        for part in np.asarray(made.drawings[n, ..., 0]):
            rows, columns = np.nonzero(part.any(1))[0], np.nonzero(part.any(0))[0]
            offsets.append((rows[0] - 4, columns[0] - 4))
        total, parts = pair_in_numpy(images[n, ..., 0], offsets, 36, 4)
        np.testing.assert_array_equal(np.round(np.asarray(made.images[n, ..., 0]) * 255), total)
        np.testing.assert_array_equal(np.round(np.asarray(made.drawings[n, ..., 0]) * 255), parts)
        assert total.max() == 255
        seen.update(offsets)
    assert {max(abs(r), abs(c)) for r, c in seen} <= set(range(5))
    assert len(seen) == 81  # every shift of up to four pixels, among 600
    np.testing.assert_array_equal(made.target, np.tile([0, 1, 0, 1], (300, 1)))
    np.testing.assert_array_equal(made.masks[:, 1], np.tile([0, 0, 0, 1], (300, 1)))


def test_placing_reaches_every_place_equally_often():
    image = np.full((1, 5, 5, 1), 9, np.uint8)
    out = np.asarray(random_placement(keys(9000), jnp.asarray(np.repeat(image, 9000, 0)), size=7))
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
    make = jax.jit(lambda n: evaluation_samples(task, digits, n, num_classes=CLASSES))
    sample, labels = make(jnp.arange(32))
    later, _ = make(jnp.arange(16, 48))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[16:], b[:16]), sample, later)
    mapped = jax.pmap(lambda n: evaluation_samples(task, digits, n, num_classes=CLASSES))
    parts, part_labels = mapped(jnp.arange(32).reshape(8, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.reshape(b, np.shape(a))),
        (sample, labels),
        (parts, part_labels),
    )
    assert sample.images.shape == (32, *task.image_shape((8, 8, 1)))
    assert np.asarray(sample.target).sum(1).tolist() == [labels[0].size] * 32
    if not isinstance(task, Shifted):
        # The same digits again, with other random numbers.
        assert (np.asarray(sample.images[:16]) != np.asarray(sample.images[16:])).any()


def test_test_images_are_not_shifted():
    digits = split()
    sample, _ = evaluation_samples(Shifted(3), digits, jnp.arange(16), num_classes=CLASSES)
    np.testing.assert_array_equal(np.round(np.asarray(sample.images) * 255), digits.images)


def test_a_pair_is_right_only_if_both_are():
    labels = jnp.array([[0, 1], [2, 3], [1, 0]])
    one_right = jnp.array([[0.9, 0.1, 0.8, 0.0], [0.9, 0.0, 0.8, 0.1], [0.0, 0.9, 0.8, 0.1]])
    assert not is_right(one_right, labels).any()
    both = jax.nn.one_hot(labels, 4).sum(1) + 0.01 * jnp.arange(4)[None]
    assert is_right(both, labels).all()
    np.testing.assert_array_equal(
        is_right(one_right, jnp.array([0, 1, 1])), np.array([True, False, True])
    )


@pytest.mark.parametrize("task", [Placed(), Pairs()])
def test_the_first_test_samples_are_of_all_classes(task):
    labels = jnp.repeat(jnp.arange(5), 20)
    images = Batch(jnp.zeros((100, 28, 28, 1), jnp.uint8), labels)
    _, found = evaluation_samples(task, images, jnp.arange(100), num_classes=5)
    first = np.asarray(found).reshape(100, -1)[:, 0]
    assert set(first[:25]) == set(range(5))
    np.testing.assert_array_equal(np.bincount(first), [20] * 5)
