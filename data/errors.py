"""Errors that a user can fix. The text names what is wrong and where, what is allowed, and what to do."""


class SettingError(ValueError):
    """A wrong setting or file. Commands print its text alone and exit with 2."""


class DataError(SettingError):
    """A wrong text, folder or disk."""
