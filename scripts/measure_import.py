"""Compares the import time of capsjax with that of jax and flax.nnx.

Runs fresh processes in alternation and prints the medians and their ratio.
"""

import argparse
import statistics
import subprocess
import sys
import time

WITHOUT = "import jax, flax.nnx"
WITH = "import jax, flax.nnx, capsjax.nn"  # which imports ops and routing


def seconds(statement: str) -> float:
    """Returns the wall time of a fresh process that runs a statement, in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measures the imports and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="number of alternations (default: 9)")
    rounds = parser.parse_args().rounds
    seconds(WITHOUT), seconds(WITH)  # brings the files into the page cache
    pairs = [(seconds(WITHOUT), seconds(WITH)) for _ in range(rounds)]
    without, with_capsjax = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{WITHOUT}: {without:.2f} s")
    print(f"{WITH}: {with_capsjax:.2f} s")
    print(f"ratio of medians over {rounds} rounds: {with_capsjax / without:.2f}")


if __name__ == "__main__":
    main()
