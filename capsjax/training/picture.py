"""Draws images above their reconstructions."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from capsjax.data import Batch, Sampler, StoredSplit
from capsjax.data.dataset import AnySplit
from capsjax.files import replacing
from capsjax.models import ModelConfig
from capsjax.training.programs import as_batch
from capsjax.training.step import Apply, Variables

_GAP = 2
_WIDTH = 960
_PICTURED = 16


def reconstruction_grid(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Arranges images in a row, with rows of reconstructions below them, on white.

    Args:
      rows: pixels of each row in [0, 1], floating ``[N, H, W, C]``. The first three of three or
        more channels are drawn as RGB; otherwise the first channel is drawn in gray.

    Returns:
      An image, uint8 ``[rows, columns, 3]``, enlarged by an integer factor to about 960 columns.

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
        tiles = tiles[..., : 3 if tiles.shape[-1] > 2 else 1]
        top = _GAP + row * (height + _GAP)
        for column, tile in enumerate(tiles):
            left = _GAP + column * (width + _GAP)
            canvas[top : top + height, left : left + width] = tile
    factor = max(1, _WIDTH // (number * (width + _GAP)))
    return canvas.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_reconstructions(
    apply: Apply,
    variables: Variables,
    model: ModelConfig,
    sampler: Sampler,
    test: AnySplit,
    path: Path,
) -> None:
    """Writes test images above their reconstructions as PNG, if the network has a decoder."""
    if not getattr(model, "decoder_features", ()):
        return
    try:
        from PIL import Image
    except ImportError:  # Pillow is optional in training
        return
    chosen = np.linspace(0, len(test.labels) - 1, min(_PICTURED, len(test.labels))).astype(int)
    shown = test.take(chosen).read() if isinstance(test, StoredSplit) else test
    select = sampler.test if shown is test else sampler.test_batch

    @jax.jit
    def draw(variables: Variables, examples: Batch, numbers: jax.Array) -> list[jax.Array]:
        sample = select(examples, numbers)
        if test.labels.ndim > 1:  # any number of classes: the present ones together
            masks = sample.masks[:, None]
        else:
            # As many predicted classes as the image shows.
            prediction, _ = apply(variables, sample.images)
            _, predicted = jax.lax.top_k(prediction.scores, sampler.task.classes_per_image)
            masks = jax.nn.one_hot(predicted, sampler.num_classes)
        drawn, _ = apply(variables, sample.images, target=masks)
        # Pairs are shown as they are; for other tasks the target, which is not standardised.
        is_pair = sample.drawings.ndim > sample.images.ndim
        assert drawn.reconstruction is not None
        return [
            sample.images if is_pair else sample.drawings,
            *jnp.moveaxis(drawn.reconstruction, 1, 0),
        ]

    rows = jax.device_get(draw(variables, as_batch(shown), chosen))
    picture = Image.fromarray(reconstruction_grid(rows))
    with replacing(path) as file:
        picture.save(file, format="png")
