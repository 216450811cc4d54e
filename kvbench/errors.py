"""The two errors that kvbench adds to Python's own."""


class BackendUnavailable(RuntimeError):
    """This machine lacks what was asked for; the message says what is missing and the command that supplies it."""


class CapacityError(ValueError):
    """More tokens than a cache was made for; nothing was written."""
