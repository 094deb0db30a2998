import numpy as np
import pytest

from capsjax.data import DataError, load

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


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "bmp"])
def test_suffixes(tmp_path, suffix):
    assert load("image_folder", data_dir=make(tmp_path, suffix=suffix)).image_shape == (5, 6, 1)


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


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    make(tmp_path)
    pixels = np.full((5, 6), 0xABCD, np.uint16)
    for file in tmp_path.rglob("*.png"):
        Image.fromarray(pixels).save(file)
    images = load("image_folder", data_dir=tmp_path).train.images
    assert np.unique(images).tolist() == [0xAB]


def test_hidden_and_other_files_are_passed_over(tmp_path):
    make(tmp_path)
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("notes")
    (tmp_path / "train" / ".thumbnails").mkdir()
    assert len(load("image_folder", data_dir=tmp_path).train.labels) == 4


def test_no_directory_given():
    assert (
        refusal(None)
        == "image_folder needs --data-dir, a directory with train/<class>/ and test/<class>/"
    )


def test_missing_directory(tmp_path):
    assert refusal(tmp_path / "no") == (
        f"image_folder expects one folder per class in {tmp_path / 'no' / 'train'}, "
        "which does not exist"
    )


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    assert refusal(tmp_path).endswith(f"in {tmp_path / 'train'}, got none")


def test_class_without_images(tmp_path):
    make(tmp_path)
    for file in (tmp_path / "test" / "dog").iterdir():
        file.unlink()
    assert refusal(tmp_path).endswith(f"files in {tmp_path / 'test' / 'dog'}, got none")


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
    assert text.endswith(f"got {got} in {odd}")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_image(tmp_path, content):
    make(tmp_path)
    broken = tmp_path / "train" / "cat" / "1.png"
    broken.write_bytes(content)
    assert f"cannot read {broken} as an image" in refusal(tmp_path)


def test_truncated_image(tmp_path):
    make(tmp_path, size=(64, 64))
    broken = tmp_path / "test" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert f"cannot read {broken} as an image" in refusal(tmp_path)


def test_thirty_two_bits_are_refused(tmp_path):
    make(tmp_path)
    odd = tmp_path / "train" / "cat" / "0.png"
    Image.new("F", (6, 5)).save(odd, format="TIFF")
    assert "pixels must have 8 or 16 bits, got 32 bits" in refusal(tmp_path)


def test_without_pillow(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert refusal(tmp_path).endswith('pip install -e ".[data]" in a clone of capsjax')
