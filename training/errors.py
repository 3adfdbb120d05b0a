"""Errors that a user can mend: the command prints their text alone and exits with 2."""

from __future__ import annotations

from data.errors import DataError


class SettingError(ValueError):
    """A wrong setting or file. The text names it, the value, what is allowed and what to do."""


USER_ERRORS = (SettingError, DataError)

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # Ctrl-C, as a shell tells it
EXIT_PREEMPTED = 75  # stopped on request with a valid checkpoint: run the same command to go on
