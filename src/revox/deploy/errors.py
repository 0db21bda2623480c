"""What goes wrong with a deployment, as a sentence for the user."""

from __future__ import annotations


class DeployError(ValueError):
    """A deployment cannot be written, started or examined; the message has the cause and the mend."""
