"""Code of the guides runs as a reader's does: in an empty directory, with JAX's own settings."""

import jax
import pytest


@pytest.fixture(autouse=True)
def readers_settings(tmp_path, monkeypatch):
    """Changes to a temporary directory, and undoes the tests' stricter promotion of ranks."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        yield
