"""Image files: which files are images, and their pixels."""

import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capsjax.data.transforms import white_of
from capsjax.errors import DataError, how_to_install

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CHANNELS = (1, 3, 4)  # of image files


class UnreadableImageError(DataError):
    """Raised for a file that is not an image, or is damaged."""


def list_images(path: Path) -> list[Path]:
    """Returns the images in a folder and its subfolders in sorted order, or the file itself.

    Raises:
      DataError: the path does not exist, or the folder has no images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"no image or directory {path}")
    images = [file for file in files_in(path) if file.suffix.lower() in SUFFIXES]
    if not images:
        raise DataError(f"no images ({kinds()}) in {path}")
    return images


def read_image(
    file: Path,
    *,
    lost: Counter[str],
    size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> npt.NDArray[Any]:
    """Reads the pixels of an image; see :func:`image_pixels`.

    Args:
      file: the image.
      lost: counts images that lose data, by kind.
      size: as in :func:`image_pixels`.
      channels: as in :func:`capsjax.data.load`.

    Raises:
      UnreadableImageError: the file is not an image, or is damaged.
      DataError: Pillow is missing.
      OSError: the operating system refuses to read it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"images need Pillow, which is not installed: {how_to_install('data')}"
        ) from error
    try:
        if not file.is_file():  # reading a pipe would never end
            raise ValueError("it is not a regular file")
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                lost["only the first of several images in a file"] += 1
            if image.mode in ("RGB", "RGBA", "LA") and ";16" in str(image.tile):
                lost["16-bit colours as 8-bit, as Pillow does"] += 1
            return image_pixels(image, size=size, channels=channels)
    # Pillow raises any of these for a damaged file; EINVAL comes from seeking to a wrong offset.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise UnreadableImageError(f"cannot read {file} as an image: {error}") from error


def image_pixels(
    image: Any, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> npt.NDArray[Any]:
    """Returns the pixels of a Pillow image, uint8, uint16 or float32 ``[H, W, C]``.

    Args:
      image: the opened image.
      size: rows and columns to which it is scaled; its longer side is cropped at both ends.
      channels: as in :func:`capsjax.data.load`.

    Raises:
      ValueError: pixels are integers of 32 bits, or floating-point and not in [0, 1].
    """
    from PIL import Image, ImageOps

    mode = image.mode
    # Some formats and versions of Pillow widen 16 bits.
    has_16_bits = mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if has_16_bits or mode == "F":
        pixels = np.asarray(image).astype(np.float32)
        if not (has_16_bits or (pixels.min() >= 0 and pixels.max() <= 1)):
            raise ValueError(
                f"floating-point pixels must lie in [0, 1], got {pixels.min()}..{pixels.max()}"
            )
        if size is not None:
            pixels = np.asarray(_fitted(Image.fromarray(pixels), size))
        if has_16_bits:
            pixels = np.round(pixels).astype(np.uint16)
        white = white_of(pixels.dtype)
        planes = [pixels] * min(channels or 1, 3)
        planes += [np.full_like(pixels, white)] * (channels == 4)
        return np.stack([np.minimum(plane, white) for plane in planes], axis=-1)
    if mode == "I":
        raise ValueError("pixels must have 8 or 16 bits or be floating-point, got 32-bit integers")
    channels = channels or (1 if mode in ("1", "L", "LA") else 3)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels < 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    pixels = np.asarray(image if size is None else _fitted(image, size))
    return pixels.reshape(*pixels.shape[:2], channels)


def _fitted(image: Any, size: tuple[int, int]) -> Any:
    """Scales and crops an image to these rows and columns."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)


def files_in(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders in sorted order, without hidden ones."""
    here = folder.resolve()
    for entry in sorted(entry for entry in folder.iterdir() if entry.name[0] != "."):
        if not entry.is_dir():
            yield entry
        elif entry.resolve() not in (here, *here.parents):  # a link back would never end
            yield from files_in(entry)


def kinds() -> str:
    """Lists the image formats."""
    return ", ".join(suffix[1:] for suffix in SUFFIXES)


def text_of_shape(shape: tuple[int, ...]) -> str:
    """Formats a shape."""
    return " x ".join(map(str, shape))


def widened(pixels: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Converts pixels to a wider dtype, scaled to its white."""
    if pixels.dtype == dtype:
        return pixels
    if dtype == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return pixels.astype(np.float32) / np.float32(white_of(pixels.dtype))
