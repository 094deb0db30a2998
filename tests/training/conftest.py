"""A small network and a small part of the embedded digits, so that a run takes seconds."""

import dataclasses
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
from jobs import free_port

from capsjax.data import Dataset, Split, load
from capsjax.models import CapsNetConfig
from capsjax.options import expanded

EMULATOR = Path(__file__).parents[1] / "storage_emulator.py"


@pytest.fixture(scope="session")
def digits() -> Dataset:
    full = load("mnist_5k")

    def some(split: Split, number: int) -> Split:
        chosen = np.random.default_rng(0).permutation(len(split.labels))[:number]
        return Split(split.images[chosen], split.labels[chosen])

    return Dataset("mnist_5k", some(full.train, 180), some(full.test, 101), full.class_names)


@pytest.fixture(scope="session")
def tiny() -> CapsNetConfig:
    """Without a decoder, which with the run's picture is a third of what a run compiles."""
    return CapsNetConfig(
        conv_features=8,
        conv_strides=3,
        primary_types=2,
        primary_features=4,
        primary_kernel=3,
        class_features=4,
        decoder_features=(),
    )


@pytest.fixture(scope="session")
def tiny_with_decoder(tiny) -> CapsNetConfig:
    return dataclasses.replace(tiny, decoder_features=(16,))


@pytest.fixture(scope="session")
def storage():
    """The URL of a bucket that an emulator on this machine holds."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    address = f"http://127.0.0.1:{(port := free_port())}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen([sys.executable, EMULATOR, str(port)], **quiet) as emulator,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
                patch.setenv(name, address)
            # Neither asks for credentials, nor whether the bucket has folders.
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            end = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{address}/storage/v1/b/runs", timeout=5).close()
                    break
                except OSError:
                    assert time.monotonic() < end
                    assert emulator.poll() is None
                    time.sleep(0.1)
            yield "gs://runs"
        finally:
            emulator.kill()


@pytest.fixture
def remote(storage):
    """The path of a new folder in object storage."""
    return expanded("run_dir", f"{storage}/{uuid.uuid4().hex}", remote=True)
