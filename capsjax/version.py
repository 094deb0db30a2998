"""The one place that states the version; read by the build without importing jax."""

__version__ = "0.1.0"
