"""Writes a folder of realistic photographs to train on: python make.py FOLDER.

Two unbalanced classes of Fashion-MNIST are enlarged to different sizes and stored in different
modes and formats, some in subfolders. Some files are broken.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from capsjax.data import load

NUMBERS = {"Sneaker": 400, "Ankle boot": 60}
FORMATS = ("jpg", "png", "tif", "webp")
MODES = ("L", "RGB", "RGBA", "P")


def photograph(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Returns an enlarged image with borders, whose sides differ."""
    size = int(rng.integers(40, 400))
    image = Image.fromarray(pixels[..., 0]).resize((size, size), Image.Resampling.BICUBIC)
    framed = Image.new("L", (size, size + int(rng.integers(0, size // 4))))
    framed.paste(image, (0, (framed.height - size) // 2))
    return framed


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", help="where TFDS has prepared Fashion-MNIST")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    # Only the images that are taken are decoded.
    garments = load("tfds:fashion_mnist", data_dir=options.data_dir, in_memory=False)
    for name, number in NUMBERS.items():
        of_class = np.flatnonzero(garments.train.labels == garments.class_names.index(name))
        folder = options.folder / name.lower().replace(" ", "-")
        taken = garments.train.take(rng.permutation(of_class)[:number]).read()
        for n, pixels in enumerate(taken.images):
            album = folder / f"album-{n % 3}" if n % 5 == 0 else folder
            album.mkdir(parents=True, exist_ok=True)
            extension, mode = FORMATS[n % 4], MODES[n // 4 % 4]
            mode = "RGB" if extension in ("jpg", "webp") and mode == "P" else mode
            mode = "RGB" if extension == "jpg" and mode == "RGBA" else mode
            image = photograph(pixels, rng).convert(mode)
            image.save(album / f"{n:04}.{extension}")
        whole = (folder / "0001.png").read_bytes()
        (folder / "cut-short.png").write_bytes(whole[: len(whole) // 2])
        (folder / "empty.jpg").touch()
        (folder / "notes.txt").write_text("not an image")
    print(f"{sum(NUMBERS.values())} photographs and 6 broken or other files in {options.folder}")


if __name__ == "__main__":
    main()
