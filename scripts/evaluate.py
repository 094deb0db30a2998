"""Same as `capsjax evaluate`: see its --help."""

from capsjax.cli import evaluate_main

if __name__ == "__main__":
    evaluate_main()
