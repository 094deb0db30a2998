"""The command ``capsjax evaluate``: see its --help."""

import sys

from capsjax.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
