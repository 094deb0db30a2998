"""The command ``capsjax reproduce``: see its --help."""

import sys

from capsjax.__main__ import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
