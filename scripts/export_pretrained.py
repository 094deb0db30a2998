"""Stores a run's network in the package: ``python scripts/export_pretrained.py RUN NAME``."""

import dataclasses
import datetime
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from capsjax import models
from capsjax.data import scale_pixels
from capsjax.models.trained import About, rounded, save_pretrained
from capsjax.training import load_network
from capsjax.training.run_directory import RunDirectory

FOLDER = Path(models.__file__).parent


def main(run: Path, name: str) -> None:
    """Stores the parameters of the last checkpoint and their test error after rounding."""
    loaded, config = load_network(run), RunDirectory(run).read_config()
    network = rounded(loaded.network)
    predict = jax.jit(lambda images: network(scale_pixels(images)).scores.argmax(-1))
    images, labels = loaded.test
    wrong = sum(
        int(np.sum(predict(jnp.asarray(images[n : n + 500])) != labels[n : n + 500]))
        for n in range(0, len(labels), 500)
    )
    preset = models.configure(config.train.preset)
    overrides = {
        field.name: getattr(config.model, field.name)
        for field in dataclasses.fields(preset)
        if getattr(config.model, field.name) != getattr(preset, field.name)
    }
    options = {
        key: value
        for key, value in config.train.to_json().items()
        if value != getattr(type(config.train)(), key) and key != "data_dir"
    }
    command = " ".join(
        ["capsjax train", *(f"--{k.replace('_', '-')} {v}" for k, v in options.items())]
    )
    about = About(
        preset=config.train.preset,
        overrides=overrides,
        dataset=config.data.name,
        classes=config.data.class_names,
        test_error=wrong / len(labels),
        test_count=len(labels),
        command=command,
        date=datetime.date.today().isoformat(),
    )
    path = FOLDER / f"{name}.npz"
    save_pretrained(network, about, path)
    print(
        f"{path}: {path.stat().st_size / 1e6:.2f} MB, test error {about.test_error:.2%}; {command}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
