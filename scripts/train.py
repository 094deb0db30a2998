"""Same as `capsjax train`: see its --help."""

from capsjax.cli import train_main

if __name__ == "__main__":
    train_main()
