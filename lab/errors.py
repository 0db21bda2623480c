"""Errors of the lab that a user can cause."""


class LabError(ValueError):
    """A cause and its fix in one sentence, for the user of `python -m lab`."""
