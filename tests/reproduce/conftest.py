"""The small network and the few digits of the tests of training."""

from training.conftest import digits, tiny

__all__ = ["digits", "tiny"]
