"""The error of this room."""


class MetricError(ValueError):
    """A score that cannot be computed; the message says why and how to fix it."""
