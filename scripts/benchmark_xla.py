"""Benchmarks XLA compilation: the command ``capsjax bench``."""

from capsjax.cli import main

if __name__ == "__main__":
    main()
