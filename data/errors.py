"""The one error of this package that is meant for the user."""


class DataError(ValueError):
    """A wrong setting, file or folder. The text names it, says what is allowed and what to do."""
