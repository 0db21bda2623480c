"""Errors of deployments, as sentences for the user."""

from __future__ import annotations


class DeployError(ValueError):
    """A deployment cannot be written, started or examined; the message names cause and fix."""
