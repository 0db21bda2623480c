"""What can go wrong in the lab through no fault of the code."""


class LabError(ValueError):
    """A cause and its mend in one sentence, for the person who ran the lab command."""
