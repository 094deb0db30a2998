"""Draws the README's figures from a run: ``python scripts/draw_readme.py RUN``."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from capsjax.data import scale_pixels
from capsjax.files import replacing
from capsjax.training import load_network
from capsjax.viz import dissect, reconstruct
from capsjax.viz.draw import diagram_of, save

DOCS = Path(__file__).parents[1] / "docs" / "images"
IMAGE = 3  # number of the test image in the diagram
DIMENSIONS = 16
FRAMES = 24  # per dimension, which swings from 0 to 0.25, to -0.25 and back
SIDE, GAP, COLUMNS, LINE = 68, 6, 10, 20


def main() -> None:
    """Writes the diagram in both themes as SVG and PNG, and the animation of dimensions."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/draw_readme.py RUN")
    loaded = load_network(Path(sys.argv[1]))
    images = scale_pixels(jnp.asarray(loaded.test.images[:400]))
    DOCS.mkdir(parents=True, exist_ok=True)
    anatomy = dissect(loaded.network, images[IMAGE])
    for theme in ("light", "dark"):
        figure = diagram_of(
            loaded.network,
            anatomy,
            class_names=loaded.dataset.class_names,
            num_children=6,
            theme=theme,
        )
        save(figure, DOCS / f"diagram-{theme}.svg")
        save(figure, DOCS / f"diagram-{theme}.png", dpi=100)
    animate(loaded.network, images, np.asarray(loaded.test.labels[:400]))
    for path in sorted(DOCS.iterdir()):
        print(f"{path.relative_to(DOCS.parents[1])}: {path.stat().st_size / 1000:.0f} kB")


def animate(network, images, labels) -> None:
    """Animates every fourth dimension of the digits' capsules, one after another."""
    prediction = network(images)
    predicted, longest = (f(prediction.scores, axis=-1) for f in (np.argmax, np.max))
    correct = predicted == labels
    # For each class, the correctly classified image with the longest capsule.
    chosen = [
        int(np.argmax(np.where(correct & (labels == digit), longest, -1)))
        for digit in range(COLUMNS)
    ]
    poses = prediction.poses[jnp.array(chosen)]
    parents = jnp.arange(COLUMNS)
    swing = 0.25 * np.sin(2 * np.pi * np.arange(FRAMES) / FRAMES)
    frames = []
    for d in range(0, DIMENSIONS, 4):
        for by in swing:
            moved = poses.at[parents, parents, d].add(by)
            pixels = np.asarray(reconstruct(network, moved, parents))[..., 0]
            strip = tiles(np.round(255 * pixels).astype(np.uint8))
            frames.append(
                labelled(strip, f"dimension {d + 1}: {by:+.2f}".replace("-", "\N{MINUS SIGN}"))
            )
    with replacing(DOCS / "dimensions.webp") as out:
        frames[0].save(
            out,
            "WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=60,
            loop=0,
            quality=60,
            method=6,
        )


def tiles(images) -> Image.Image:
    """Returns the enlarged images in a row."""
    strip = Image.new("L", (COLUMNS * (SIDE + GAP) + GAP, SIDE + 2 * GAP + LINE), 0)
    for n, image in enumerate(images):
        big = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        strip.paste(big, (GAP + n * (SIDE + GAP), GAP))
    return strip.convert("RGB")


def labelled(strip, text) -> Image.Image:
    """Writes a line of text below the row."""
    middle = (strip.width // 2, strip.height - GAP - LINE // 2)
    ImageDraw.Draw(strip).text(
        middle, text, fill=(220, 220, 220), font=ImageFont.load_default(14), anchor="mm"
    )
    return strip


if __name__ == "__main__":
    main()
