"""Entry point of ``capsjax`` and of ``python -m capsjax``."""

import os
import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line, by default with the arguments of the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C ends the process quietly during imports and after the command.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_standard_streams()
    from capsjax.cli import main as run

    run(argv)


def _open_standard_streams() -> None:
    """Opens the null device for closed standard streams; other files would get their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


if __name__ == "__main__":
    main()
