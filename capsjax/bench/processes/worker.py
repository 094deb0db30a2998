"""Calls one function in a fresh process: ``python -m ...processes.worker CALL RESULT``.

CALL holds the pickled function and its argument; the pickled result is written to RESULT.
"""

import os
import pickle
import sys
from pathlib import Path


def main(call: Path, result: Path) -> None:
    """Calls the function."""
    # Unpickling imports jax and capsjax, which is part of the start time of a process.
    function, argument = pickle.loads(call.read_bytes())
    result.write_bytes(pickle.dumps(function(argument)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    # Everything is written; shutting down Python and XLA would take most of a second.
    os._exit(0)
