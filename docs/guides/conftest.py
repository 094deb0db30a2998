"""Code of the guides runs in an empty directory."""

import pytest


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """Changes to a temporary directory, where the examples leave their files."""
    monkeypatch.chdir(tmp_path)
