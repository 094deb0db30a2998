"""The command ``capsjax bench``: see its --help."""

import sys

from capsjax.__main__ import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
