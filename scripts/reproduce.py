"""The command ``capsjax reproduce``: see its --help."""

import sys

from capsjax.cli import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
