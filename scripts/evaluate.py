"""The command ``capsjax evaluate``: see its --help."""

import sys

from capsjax.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
