"""Errors that commands report in one line; any other exception is a bug or a wrong argument."""


class CapsjaxError(Exception):
    """Base of the errors that a command reports in one line.

    Attributes:
      exit_code: exit status of the command.
    """

    exit_code: int = 2

    def __init__(self, message: str):
        # Messages quote errors of other libraries, which may span several lines.
        super().__init__(" ".join(message.split()))


class ConfigError(CapsjaxError, ValueError):
    """Raised when an option is invalid, alone or in combination, or not supported here."""


class DataError(CapsjaxError):
    """Raised when data are missing, damaged or inaccessible."""


class CheckpointError(CapsjaxError):
    """Raised when a checkpoint cannot be written or read."""


class DamagedCheckpointError(CheckpointError):
    """Raised when the files of a checkpoint are incomplete or were changed."""


class ProcessError(CapsjaxError):
    """Raised when processes that train together lose each other, or another takes a run over."""

    exit_code = 1


class DivergedError(CapsjaxError):
    """Raised when the loss or the parameters are not finite; the message names the step."""

    exit_code = 1


def how_to_install(extra: str) -> str:
    """Returns the command that installs the packages of an extra."""
    return f'pip install -e ".[{extra}]" in a clone of capsjax'
