"""A picture of images over their reconstructions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_GAP = 2
_WIDTH = 960


def reconstruction_grid(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Arranges images in a row and their reconstructions in rows below them, on white.

    Args:
      rows: of each row the pixels in [0, 1], floating ``[N, H, W, C]``; of two channels, which
        are those of a stereo pair, the first is shown.

    Returns:
      uint8 ``[rows, columns, 3]``, enlarged by a whole factor to about 960 columns.

    Example:
      >>> import numpy as np
      >>> from capsjax.training.picture import reconstruction_grid
      >>> reconstruction_grid([np.zeros((16, 28, 28, 1))] * 2).shape
      (124, 964, 3)
    """
    number, height, width, _ = rows[0].shape
    shape = (_GAP + len(rows) * (height + _GAP), _GAP + number * (width + _GAP), 3)
    canvas = np.full(shape, 255, np.uint8)
    for row, pixels in enumerate(rows):
        tiles = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
        tiles = tiles[..., :1] if tiles.shape[-1] == 2 else tiles
        top = _GAP + row * (height + _GAP)
        for column, tile in enumerate(tiles):
            left = _GAP + column * (width + _GAP)
            canvas[top : top + height, left : left + width] = tile
    factor = max(1, _WIDTH // (number * (width + _GAP)))
    return canvas.repeat(factor, axis=0).repeat(factor, axis=1)


def write_picture(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Writes :func:`reconstruction_grid` as PNG."""
    from PIL import Image

    Image.fromarray(reconstruction_grid(rows)).save(path)
