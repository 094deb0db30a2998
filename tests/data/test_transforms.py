import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capsjax.data import (
    AffineRanges,
    crop_images,
    epoch_order,
    random_affine,
    random_flip,
    random_placement,
    random_shift,
    scale_pixels,
)


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
    with pytest.raises(TypeError, match="images must be uint8, uint16 or float.*, got int32"):
        scale_pixels(jnp.arange(3))


def test_sixteen_bits_and_floats_lose_nothing():
    deep = scale_pixels(jnp.arange(2**16, dtype=jnp.uint16))
    np.testing.assert_array_equal(np.round(np.asarray(deep, np.float64) * 65535), np.arange(2**16))
    assert scale_pixels(deep) is deep


def shifted_by(image, row, column, fill=0):
    """Shifts an image, filling with a value."""
    out = np.full_like(image, fill)
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


@pytest.mark.parametrize("fill", [0, 3, "edge"])
def test_shifts_are_the_same_on_tpus(request, fill):
    images = jnp.arange(5 * 6 * 7 * 2, dtype=jnp.uint8).reshape(5, 6, 7, 2)
    keys = jax.random.split(jax.random.key(0), 5)
    here = random_shift(keys, images, max_shift=2, fill=fill)
    assert (here != images).any()
    request.getfixturevalue("as_on_tpu")
    np.testing.assert_array_equal(random_shift(keys, images, max_shift=2, fill=fill), here)


def test_an_image_s_shift_is_its_own():
    keys = jax.random.split(jax.random.key(1), 4)
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    together = random_shift(keys, images, max_shift=3)
    alone = random_shift(keys[2:3], images[2:3], max_shift=3)
    np.testing.assert_array_equal(together[2:3], alone)


def test_no_shift_leaves_images_alone():
    keys, images = jax.random.split(jax.random.key(1), 2), jnp.ones((2, 8, 8, 1))
    assert random_shift(keys, images, max_shift=0) is images


def test_shifts_move_in_what_they_are_told():
    image = np.arange(1, 37, dtype=np.uint8).reshape(6, 6, 1)
    keys, many = jax.random.split(jax.random.key(0), 64), jnp.asarray(np.stack([image] * 64))
    black, gray, edge = (
        np.asarray(random_shift(keys, many, max_shift=1, fill=fill)) for fill in (0, 200, "edge")
    )
    np.testing.assert_array_equal(gray, np.where(black == 0, 200, black))
    repeated = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    possible = {repeated[r : r + 6, c : c + 6].tobytes() for r in range(3) for c in range(3)}
    assert {result.tobytes() for result in edge} == possible
    np.testing.assert_array_equal(edge[black > 0], black[black > 0])


@pytest.mark.parametrize(("direction", "number"), [("horizontal", 2), ("vertical", 2), ("both", 4)])
def test_flips_are_equally_likely_and_each_image_s_own(direction, number):
    images = jnp.arange(12).reshape(1, 1, 2, 3, 2).repeat(400, 0).repeat(2, 1)
    keys = jax.random.split(jax.random.key(0), 400)
    flipped = np.asarray(random_flip(keys, images, direction=direction))
    image = np.asarray(images[0, 0])
    possible = {
        "horizontal": [image, image[:, ::-1]],
        "vertical": [image, image[::-1]],
        "both": [image, image[:, ::-1], image[::-1], image[::-1, ::-1]],
    }[direction]
    counts = Counter(each.tobytes() for each in flipped.reshape(800, 2, 3, 2))
    assert set(counts) == {each.tobytes() for each in possible}
    assert max(abs(count - 800 / number) for count in counts.values()) < 90
    assert any(a.tobytes() != b.tobytes() for a, b in flipped)
    np.testing.assert_array_equal(
        random_flip(keys[7:8], images[7:8], direction=direction), flipped[7:8]
    )


def test_bad_arguments_are_named():
    keys, images = jax.random.split(jax.random.key(1), 2), jnp.ones((3, 8, 8, 1))
    with pytest.raises(ValueError, match="max_shift must be at least 0, got -1"):
        random_shift(keys, images, max_shift=-1)
    with pytest.raises(ValueError, match=r"one key per image, shape \(3,\), got shape \(2,\)"):
        random_shift(keys, images, max_shift=2)
    with pytest.raises(ValueError, match="one key per example"):
        random_flip(keys, images, direction="both")
    with pytest.raises(
        ValueError, match="direction must be one of horizontal, vertical, both, got"
    ):
        random_flip(keys, images, direction="up")


TRANSFORMS = [
    functools.partial(random_shift, max_shift=1),
    functools.partial(random_placement, size=9),
    functools.partial(random_affine, size=9),
    functools.partial(random_flip, direction="both"),
    lambda keys, images: crop_images(images, 4, keys),
    lambda keys, images: crop_images(images, 4),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("shape", "several"), [((2, 8, 8), False), ((2, 2, 8, 8, 1), True)])
def test_images_have_four_axes(transform, shape, several):
    keys, images = jax.random.split(jax.random.key(1), 2), jnp.ones(shape)
    if several and getattr(transform, "func", None) is random_flip:
        assert transform(keys, images).shape == shape
        return
    with pytest.raises(ValueError, match=r"images must have shape \[B, .*C\], got shape \(2,"):
        transform(keys, images)


@pytest.mark.parametrize("transform", TRANSFORMS[:-1])
@pytest.mark.parametrize(
    ("keys", "got"), [(jnp.arange(2), "int32"), (jax.random.PRNGKey(0), "uint32"), ([1, 2], "list")]
)
def test_keys_are_typed(transform, keys, got):
    with pytest.raises(TypeError, match=f"keys must be typed as by jax.random.key, got {got}"):
        transform(keys, jnp.ones((2, 8, 8, 1)))


@pytest.mark.parametrize(
    ("fill", "match"),
    [
        (0.5, "fill must be an integer for images of dtype uint8, got 0.5"),
        (300, "fill must be a value of images of dtype uint8, got 300"),
        (-1, "fill must be a value of images of dtype uint8, got -1"),
        (np.nan, "fill must be finite, got nan"),
        ("mirror", "fill must be one of edge, got 'mirror'"),
        (None, "fill must be a number, got None"),
    ],
)
def test_a_fill_is_a_value_of_the_images(fill, match):
    keys = jax.random.split(jax.random.key(1), 2)
    with pytest.raises((TypeError, ValueError), match=match):
        random_shift(keys, jnp.ones((2, 8, 8, 1), jnp.uint8), max_shift=1, fill=fill)


def test_scalar_arrays_are_sizes_too():
    keys, images = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 4, 4, 1))
    for transform, name in ((random_shift, "max_shift"), (random_placement, "size")):
        expected = transform(keys, images, **{name: 6})
        np.testing.assert_array_equal(transform(keys, images, **{name: jnp.int32(6)}), expected)
        with pytest.raises(TypeError, match=f"{name} must be a Python integer, got 6.5"):
            transform(keys, images, **{name: 6.5})
    ranges = (20, jnp.float32(0.5), 1, 1)
    expected = random_affine(keys, images, size=6, ranges=AffineRanges(20, 0.5, 1, 1))
    drawn = random_affine(keys, images, size=jnp.int32(6), ranges=AffineRanges(*ranges))
    np.testing.assert_array_equal(drawn, expected)
