"""A picture of images over their reconstructions (floor 5)."""

from pathlib import Path

import numpy as np

_GAP = 2
_WIDTH = 960


def reconstruction_grid(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Arranges images in a row and their reconstructions below them, on white.

    Args:
      images: uint8 ``[N, H, W, C]`` with 1 or 3 channels.
      reconstructions: pixels in [0, 1], floating, of the same shape.

    Returns:
      uint8 ``[rows, columns, 3]``, enlarged by a whole factor to about 960 columns.

    Example:
      >>> import numpy as np
      >>> from capsjax.training.picture import reconstruction_grid
      >>> reconstruction_grid(np.zeros((16, 28, 28, 1), np.uint8), np.zeros((16, 28, 28, 1))).shape
      (124, 964, 3)
    """
    below = np.round(np.clip(reconstructions, 0, 1) * 255).astype(np.uint8)
    number, height, width, _ = images.shape
    canvas = np.full((_GAP + 2 * (height + _GAP), _GAP + number * (width + _GAP), 3), 255, np.uint8)
    for row, tiles in enumerate((images, below)):
        top = _GAP + row * (height + _GAP)
        for column, tile in enumerate(tiles):
            left = _GAP + column * (width + _GAP)
            canvas[top : top + height, left : left + width] = tile
    factor = max(1, _WIDTH // (number * (width + _GAP)))
    return canvas.repeat(factor, axis=0).repeat(factor, axis=1)


def write_picture(path: Path, images: np.ndarray, reconstructions: np.ndarray) -> None:
    """Writes :func:`reconstruction_grid` as PNG."""
    from PIL import Image

    Image.fromarray(reconstruction_grid(images, reconstructions)).save(path)
