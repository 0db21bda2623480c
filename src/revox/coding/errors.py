"""What can be wrong with a request to find the codes of a recording."""

from __future__ import annotations


class CodingError(ValueError):
    """Codes cannot be found as asked. The message is one sentence with the cause and the fix."""
