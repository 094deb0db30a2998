"""Same as `capsjax reproduce`: see its --help."""

from capsjax.cli import reproduce_main

if __name__ == "__main__":
    reproduce_main()
