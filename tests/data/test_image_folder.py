import errno
import os
import shutil
import struct

import numpy as np
import pytest

from capsjax.data import DataError, load
from capsjax.data.image_files import image_pixels

Image = pytest.importorskip("PIL.Image")


def make(root, *, mode="L", size=(6, 5), classes=("cat", "dog"), suffix="png", number=2):
    """Writes a folder data set; `size` is width x height, as in Pillow."""
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                color = 1 if mode == "1" else 10 * label + index
                Image.new(mode, size, color).save(folder / f"{index}.{suffix}")
    return root


def refusal(root):
    with pytest.raises(DataError) as error:
        load("image_folder", data_dir=root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_classes_and_files_come_in_the_order_of_their_names(tmp_path):
    dataset = load("image_folder", data_dir=make(tmp_path, classes=("dog", "cat")))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.image_shape == (5, 6, 1)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    # "dog" was written first, with pixels 0 and 1.
    assert dataset.train.images[:, 0, 0, 0].tolist() == [10, 11, 0, 1]


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "bmp", "tif", "webp", "gif"])
def test_suffixes(tmp_path, suffix):
    channels = 3 if suffix in ("gif", "webp") else 1  # which know no grayscale
    shape = load("image_folder", data_dir=make(tmp_path, suffix=suffix)).image_shape
    assert shape == (5, 6, channels)


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("LA", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)],
)
def test_channels(tmp_path, mode, channels):
    if mode in ("LA", "RGB", "RGBA"):
        make(tmp_path)
        for file in tmp_path.rglob("*.png"):
            Image.open(file).convert(mode).save(file)
    else:
        make(tmp_path, mode=mode)
    assert load("image_folder", data_dir=tmp_path).image_shape == (5, 6, channels)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_all_and_bytes_beside_them_their_values(tmp_path, suffix):
    make(tmp_path)
    deep = tmp_path / "train" / "dog" / f"1.{suffix}"
    (tmp_path / "train" / "dog" / "1.png").unlink()
    Image.fromarray(np.full((5, 6), 0xABCD, np.uint16)).save(deep)
    dataset = load("image_folder", data_dir=tmp_path)
    assert dataset.train.images.dtype == np.uint16
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 0x0101, 0x0A0A, 0xABCD]
    assert dataset.test.images.dtype == np.uint8
    # In floating point too, and scaled without the loss.
    Image.new("F", (6, 5), 0.25).save(tmp_path / "train" / "dog" / "2.tif")
    train = load("image_folder", data_dir=tmp_path, image_size=4, channels=3).train.images
    assert (train.dtype, train.shape) == (np.float32, (5, 4, 4, 3))
    np.testing.assert_allclose(train[3:, 0, 0, 2], [0xABCD / 0xFFFF, 0.25])
    assert train[2, 0, 0, 0] == np.float32(10) / np.float32(255)


def test_orientation_is_that_of_exif(tmp_path):
    image = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6))
    image.getexif()[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=image.getexif())
    with Image.open(tmp_path / "turned.png") as opened:
        pixels = image_pixels(opened)
    np.testing.assert_array_equal(pixels[..., 0], np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_is_laid_on_white_or_kept(tmp_path, mode):
    path = tmp_path / "a.png"
    if mode == "P":
        Image.new("P", (2, 2)).save(path, transparency=0)
    else:
        Image.new(mode, (2, 2), (0,) * len(mode)).save(path)
    for channels, pixel in (
        (None, [255] if mode == "LA" else [255] * 3),
        (1, [255]),
        (3, [255] * 3),
        (4, [0] * 4),
    ):
        with Image.open(path) as image:
            assert image_pixels(image, channels=channels)[0, 0].tolist() == pixel


def test_what_is_not_used_is_counted_and_named(tmp_path, caplog):
    make(tmp_path)
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("notes")
    (tmp_path / "train" / ".thumbnails").mkdir()
    load("image_folder", data_dir=tmp_path)
    (line,) = caplog.messages
    assert line.endswith(
        f"skips 1 of 9 files in {tmp_path}: 1 .txt; the first is train/cat/notes.txt"
    )
    caplog.clear()
    (tmp_path / "val" / "cat").mkdir(parents=True)
    for n in range(2):
        (tmp_path / "val" / "cat" / f"{n}.png").touch()
    frames = [Image.new("L", (6, 5), n) for n in range(3)]
    frames[0].save(tmp_path / "train" / "cat" / "2.tif", save_all=True, append_images=frames[1:])
    assert len(load("image_folder", data_dir=tmp_path).train.labels) == 5
    assert "skips 3 of 12 files" in caplog.messages[0]
    assert ": 2 .png, 1 .txt; the first is" in caplog.messages[0]
    assert "reads only the first of several images in a file: 1 files" in caplog.messages[1]


def test_folders_inside_of_a_class_are_read(tmp_path):
    make(tmp_path)
    inside = tmp_path / "train" / "cat" / "0-more" / "still"
    inside.mkdir(parents=True)
    Image.new("L", (6, 5), 99).save(inside / "a.png")
    (inside / "back").symlink_to(tmp_path / "train" / "cat")  # which would never end
    train = load("image_folder", data_dir=tmp_path).train
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [99, 0, 1, 10, 11]


@pytest.mark.parametrize("inside", ["train", "."])
def test_without_test_images_a_tenth_is_split_off(tmp_path, inside, caplog):
    make(tmp_path, number=12)
    shutil.rmtree(tmp_path / "test")
    caplog.set_level("INFO")
    folder = tmp_path / "train" if inside == "." else tmp_path
    dataset = load("image_folder", data_dir=folder)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0] * 11 + [1] * 11
    assert dataset.test.labels.tolist() == [0, 1]
    seen = {*dataset.train.images[:, 0, 0, 0].tolist(), *dataset.test.images[:, 0, 0, 0].tolist()}
    assert seen == {*range(12), *range(10, 22)}
    assert "image_folder tests on 2 of 24 images, a tenth of each class" in caplog.text
    again = load("image_folder", data_dir=folder)
    np.testing.assert_array_equal(again.test.images, dataset.test.images)


def test_mixed_sizes_and_modes_are_made_alike(tmp_path):
    make(tmp_path)
    Image.new("RGB", (9, 20), "white").save(tmp_path / "train" / "cat" / "0.png")
    dataset = load("image_folder", data_dir=tmp_path, image_size=8, channels=1)
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.train.images.max((1, 2, 3)).tolist() == [255, 1, 10, 11]
    for options, text in (
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            load("image_folder", data_dir=tmp_path, **options)


def test_a_directory_one_level_off_is_hinted_at(tmp_path):
    root = make(tmp_path / "pets")
    for given, text in (
        (root / "train", f"got cat, dog; did you mean {root}?"),
        (root / "test", f"got cat, dog; did you mean {root}?"),
        (root / "train" / "cat", f"got no folders; did you mean {root}?"),
        (tmp_path, f"got pets; did you mean {root}?"),
        (root / "train" / "cat" / "0.png", "which is not a directory"),
    ):
        assert refusal(given) == (
            f"image_folder expects train/<class>/ and test/<class>/ in {given}, {text}"
        )
    (root / "train").rename(root / "Training")
    assert refusal(root).endswith(f"in {root}, got Training, test")
    idx = tmp_path / "idx"
    idx.mkdir()
    (idx / "train-images-idx3-ubyte.gz").touch()
    assert "got files in the idx format of MNIST; use --dataset mnist, or" in refusal(idx)


def test_no_directory_given():
    assert (
        refusal(None)
        == "image_folder needs --data-dir, a directory with train/<class>/ and test/<class>/, or"
        " with <class>/"
    )


def test_missing_directory(tmp_path):
    assert refusal(tmp_path / "no") == (
        f"image_folder expects train/<class>/ and test/<class>/ in {tmp_path / 'no'}, "
        "which does not exist"
    )


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    assert refusal(tmp_path).endswith(f"in {tmp_path / 'train'}, got none")


def test_class_without_images(tmp_path):
    make(tmp_path)
    for file in (tmp_path / "test" / "dog").iterdir():
        file.unlink()
    assert refusal(tmp_path).endswith(
        f"webp) in {tmp_path / 'test' / 'dog'}, got none; remove the directory if there is no such"
        " class"
    )


@pytest.mark.parametrize(("having", "lacking"), [("train", "test"), ("test", "train")])
def test_classes_differ(tmp_path, having, lacking):
    make(tmp_path)
    (tmp_path / having / "eel").mkdir()
    text = refusal(tmp_path)
    assert f"{tmp_path / having / 'eel'} exists, {tmp_path / lacking / 'eel'} does not" in text


@pytest.mark.parametrize(("mode", "size"), [("L", (7, 5)), ("RGB", (6, 5))])
def test_the_first_image_that_differs_is_named(tmp_path, mode, size):
    make(tmp_path)
    odd = tmp_path / "train" / "dog" / "1.png"
    Image.new(mode, size).save(odd)
    got = f"{size[1]} x {size[0]} x {3 if mode == 'RGB' else 1}"
    text = refusal(tmp_path)
    assert "5 x 6 x 1 like the first" in text
    assert f"got {got} in {odd}; --image-size and --channels convert them" in text


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path, content, caplog):
    make(tmp_path, size=(64, 64))
    broken, short = tmp_path / "train" / "dog" / "0.png", tmp_path / "test" / "cat" / "1.png"
    broken.write_bytes(content)
    short.write_bytes(short.read_bytes()[:60])
    dataset = load("image_folder", data_dir=tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 11]
    assert dataset.test.labels.tolist() == [0, 1, 1]
    files = [tmp_path / "test" / file for file in ("cat/0.png", "dog/0.png", "dog/1.png")]
    assert list(dataset.test_files) == [str(file) for file in files]
    (warning,) = caplog.messages
    assert warning.startswith("image_folder leaves out 2 of 8 images, which cannot be read: cannot")
    for file in (broken, short):
        assert f"cannot read {file} as an image" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_the_system_cannot_read_is_not_left_out(tmp_path, monkeypatch, in_memory):
    """As on a failing disk or network: another run would see other images."""
    make(tmp_path)
    bad, opened = tmp_path / "train" / "cat" / "1.png", Image.open

    def fail(file):
        if file == bad:
            raise OSError(errno.EIO, "Input/output error")
        return opened(file)

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=f"cannot read {bad}: Input/output error"):
        load("image_folder", data_dir=tmp_path, in_memory=in_memory).train.read()


def test_a_damaged_file_that_points_beyond_its_end_is_left_out(tmp_path, caplog):
    """Pillow seeks there, which the operating system refuses."""
    make(tmp_path)
    beyond = b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63 - 1) + bytes(64)
    (tmp_path / "train" / "cat" / "beyond.tif").write_bytes(beyond)
    assert len(load("image_folder", data_dir=tmp_path).train.labels) == 4
    assert "leaves out 1 of 9 images" in caplog.text


def test_what_is_no_file_is_left_out(tmp_path, caplog):
    make(tmp_path)
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    (tmp_path / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(load("image_folder", data_dir=tmp_path).train.labels) == 4
    assert "leaves out 2 of 10 images" in caplog.text


def test_a_class_without_an_image_that_can_be_read(tmp_path):
    make(tmp_path)
    for file in (tmp_path / "train" / "dog").iterdir():
        file.write_bytes(b"")
    assert refusal(tmp_path).startswith("image_folder finds no image of class 'dog': cannot read")
    for file in (tmp_path / "test").rglob("*.png"):
        file.write_bytes(b"")
    assert refusal(tmp_path).startswith("image_folder finds no image: cannot read")


def test_pixels_of_unknown_range_are_left_out(tmp_path, caplog):
    make(tmp_path)
    odd = tmp_path / "train" / "cat" / "0.png"
    for image, reason in (
        (
            Image.new("I", (6, 5)),
            "pixels must have 8 or 16 bits or be floating-point, got 32-bit in",
        ),
        (Image.new("F", (6, 5), 2.0), "floating-point pixels must lie in [0, 1], got 2.0..2.0"),
    ):
        image.save(odd, format="TIFF")
        assert len(load("image_folder", data_dir=tmp_path).train.labels) == 3
        assert reason in caplog.messages[-1]


def test_without_pillow(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert refusal(tmp_path).endswith('pip install -e ".[data]" in a clone of capsjax')
