"""Benchmarks XLA compilation: the command ``capsjax bench``."""

from capsjax.cli import bench_main

if __name__ == "__main__":
    bench_main()
