"""The command ``capsjax train``: see its --help."""

import sys

from capsjax.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
