"""Random affine transformations and affNIST's files, against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import io, ndimage

from capsjax.data import AffineRanges, DataError, load, random_affine
from capsjax.data.affine import _draw_matrix, _draw_place, _warp

# One program for each shape, which tests share.
transformed = jax.jit(random_affine, static_argnames=("size", "ranges"))


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def digit():
    """An image like a digit: random pixels off the centre, zeros around them."""
    image = np.zeros((28, 28), np.uint8)
    image[6:22, 9:17] = np.random.default_rng(0).integers(1, 256, (16, 8))
    return image


def by_scipy(image, matrix, place, size):
    """The same transformation in SciPy, whose axes are (y, x)."""
    flipped = matrix[::-1, ::-1]
    inverse = np.linalg.inv(flipped)
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - inverse @ place[::-1]
    return ndimage.affine_transform(
        image.astype(np.float64),
        inverse,
        offset,
        output_shape=(size, size),
        order=1,
        mode="constant",
    )


def test_is_the_affine_map_of_scipy():
    image = digit()

    @jax.jit
    def transform(key):
        one, two = jax.random.split(key)
        matrix = _draw_matrix(one, AffineRanges())
        place = _draw_place(two, image[..., None], matrix, 40)
        warped = _warp(jnp.asarray(image[..., None], jnp.float32), matrix, place, 40)
        return matrix, place, warped[..., 0]

    for key in keys(4):
        matrix, place, got = transform(key)
        expected = by_scipy(image, *(np.asarray(x, np.float64) for x in (matrix, place)), 40)
        # Rounding may move a pixel to the next cell, where gray levels differ a little.
        np.testing.assert_allclose(got, expected, atol=0.05)


def test_matrices_have_the_ranges_that_they_are_drawn_from():
    matrices = np.asarray(jax.jit(jax.vmap(lambda k: _draw_matrix(k, AffineRanges())))(keys(4000)))
    # The first column of A = R S D is a R e_x.
    angles = np.rad2deg(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    across = np.linalg.norm(matrices[:, :, 0], axis=1)
    down = np.linalg.det(matrices) / across
    cos, sin = np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))
    shear = (cos * matrices[:, 0, 1] + sin * matrices[:, 1, 1]) / down
    for values, low, high in (
        (angles, -20, 20),
        (across, 0.8, 1.2),
        (down, 0.8, 1.2),
        (shear, -0.2, 0.2),
    ):
        width = high - low
        assert low - 1e-3 * width <= values.min() < low + 0.01 * width
        assert high - 0.01 * width < values.max() <= high + 1e-3 * width
        # Mean and deviation of a uniform distribution, within five standard errors.
        assert abs(values.mean() - (low + high) / 2) < 5 * width / np.sqrt(12 * 4000)
        assert abs(values.std() - width / np.sqrt(12)) < 0.03 * width


def test_nothing_falls_out_and_every_place_is_reached():
    image = digit()
    still = AffineRanges(rotation=0, shear=0, least_scale=1, most_scale=1)
    images = jnp.asarray(np.stack([image] * 2000)[..., None])
    out = np.asarray(transformed(keys(2000), images, size=40, ranges=still))
    assert out.shape == (2000, 40, 40, 1)
    assert out.dtype == np.uint8
    totals = out.sum((1, 2, 3), dtype=np.int64)
    # Interpolation distributes and rounds the gray levels.
    np.testing.assert_allclose(totals, image.sum(dtype=np.int64), rtol=0.01)
    columns = (out > 0).any((1, 3)).argmax(1)
    assert set(range(32)) <= set(columns)  # 8 columns fit into 40 at 33 positions
    distorted = np.asarray(transformed(keys(200, 1), images[:200], size=40)).astype(np.float64)
    assert (distorted.sum((1, 2, 3)) > 0.55 * image.sum()).all()


def test_an_image_s_transformation_is_its_own():
    images = jnp.asarray(np.stack([digit()] * 4)[..., None])
    together = transformed(keys(4), images, size=40)
    alone = transformed(keys(4)[2:3], images[2:3], size=40)
    np.testing.assert_array_equal(together[2:3], alone)
    assert (together[0] != together[1]).any()


def test_a_blank_image_and_one_that_is_too_large():
    blank = transformed(keys(1), np.zeros((1, 28, 28, 1), np.float32), size=40)
    np.testing.assert_array_equal(blank, 0)
    full = transformed(keys(1), np.ones((1, 28, 28, 1), np.float32), size=20)
    np.testing.assert_allclose(full[0, 5:15, 5:15], 1, atol=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"one key per image, shape \(2,\), got shape \(3,\)"):
        random_affine(keys(3), jnp.ones((2, 28, 28, 1)), size=40)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        random_affine(keys(2), jnp.ones((2, 28, 28, 1)), size=0)
    for ranges, match in (
        (AffineRanges(least_scale=0), "least_scale must be positive and .* got least_scale=0.0"),
        (
            AffineRanges(least_scale=1.5),
            "at most most_scale, got least_scale=1.5 and most_scale=1.2",
        ),
        (AffineRanges(rotation=np.nan), "rotation must be finite, got nan"),
    ):
        with pytest.raises(ValueError, match=match):
            random_affine(keys(2), jnp.ones((2, 28, 28, 1)), size=40, ranges=ranges)


def write_batches(folder, counts):
    """Writes files in the published format: a struct whose matrix has one image per column."""
    folder.mkdir(parents=True)
    rng, kept = np.random.default_rng(0), []
    for number, count in enumerate(counts, 1):
        images = rng.integers(0, 256, (count, 40, 40), np.uint8)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        struct = {"image": images.reshape(count, -1).T, "label_int": labels[None]}
        io.savemat(folder / f"{number}.mat", {"affNISTdata": struct}, do_compression=True)
        kept.append((images, labels))
    return [np.concatenate(x) for x in zip(*kept, strict=True)]


def test_affnist_s_files(tmp_path):
    images, labels = write_batches(tmp_path / "test_batches", [3, 2, 1, *[1] * 8])
    dataset = load("affnist", data_dir=tmp_path)
    np.testing.assert_array_equal(dataset.test.images[..., 0], images)
    np.testing.assert_array_equal(dataset.test.labels, labels)
    assert dataset.image_shape == (40, 40, 1)
    assert len(dataset.train.labels) == 0
    trained, _ = write_batches(tmp_path / "training_and_validation_batches", [4])
    np.testing.assert_array_equal(load("affnist", data_dir=tmp_path).train.images[..., 0], trained)


def test_errors_of_affnist_are_one_line(tmp_path):
    with pytest.raises(DataError, match="affnist needs --data-dir"):
        load("affnist")
    with pytest.raises(DataError, match=r"expects \*.mat files in .*test_batches, got none"):
        load("affnist", data_dir=tmp_path)
    (tmp_path / "test_batches").mkdir()
    (tmp_path / "test_batches" / "1.mat").write_bytes(b"no MATLAB file at all" * 40)
    with pytest.raises(DataError, match=r"affnist cannot read .*1\.mat: ") as error:
        load("affnist", data_dir=tmp_path)
    assert "\n" not in str(error.value)
