"""The error of this room."""


class MetricError(ValueError):
    """A score that cannot be computed; the message is one sentence with the cause and the mend."""
