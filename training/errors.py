"""The error that a user can fix, and the exit codes of commands."""

from data.errors import SettingError as SettingError

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # Ctrl-C, as a shell tells it
EXIT_PREEMPTED = 75  # stopped on request with a valid checkpoint: run the same command to go on
