import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsjax.data import epoch_order, random_shift, scale_pixels


def test_epochs_visit_every_example_once_each_in_an_order_of_its_own():
    orders = [epoch_order(jax.random.key(n), 1000) for n in range(2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert (orders[0] != orders[1]).any()
    np.testing.assert_array_equal(orders[0], epoch_order(jax.random.key(0), 1000))


def test_every_pixel_value_is_a_255th():
    scaled = scale_pixels(jnp.arange(256, dtype=jnp.uint8))
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, np.arange(256) / 255, rtol=1e-7)
    with pytest.raises(TypeError, match="images must be uint8, got float32"):
        scale_pixels(scaled)


def shifted_by(image, row, column):
    """Shifts an image, filling with zeros."""
    out = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if 0 <= y - row < height and 0 <= x - column < width:
                out[y, x] = image[y - row, x - column]
    return out


def test_all_25_shifts_are_made_equally_often_and_no_other():
    image = np.arange(1, 73, dtype=np.uint8).reshape(6, 6, 2)
    number = 5000
    keys = jax.random.split(jax.random.key(0), number)
    moved = np.asarray(random_shift(keys, jnp.asarray(np.stack([image] * number)), max_shift=2))
    possible = {
        shifted_by(image, row, column).tobytes(): (row, column)
        for row in range(-2, 3)
        for column in range(-2, 3)
    }
    counts = dict.fromkeys(possible.values(), 0)
    for result in moved:
        counts[possible[result.tobytes()]] += 1
    assert len(counts) == 25
    # 200 expected of each; six standard deviations are 83.
    assert min(counts.values()) > 117
    assert max(counts.values()) < 283


def test_an_image_s_shift_is_its_own():
    keys = jax.random.split(jax.random.key(1), 4)
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    together = random_shift(keys, images, max_shift=3)
    alone = random_shift(keys[2:3], images[2:3], max_shift=3)
    np.testing.assert_array_equal(together[2:3], alone)


def test_no_shift_leaves_images_alone():
    keys, images = jax.random.split(jax.random.key(1), 2), jnp.ones((2, 8, 8, 1))
    assert random_shift(keys, images, max_shift=0) is images


def test_bad_arguments_are_named():
    keys, images = jax.random.split(jax.random.key(1), 2), jnp.ones((3, 8, 8, 1))
    with pytest.raises(ValueError, match="max_shift must not be negative, got -1"):
        random_shift(keys, images, max_shift=-1)
    with pytest.raises(ValueError, match=r"one key per image, shape \(3,\), got shape \(2,\)"):
        random_shift(keys, images, max_shift=2)
