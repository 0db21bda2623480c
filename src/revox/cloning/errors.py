"""What can be wrong with a request to clone a voice. Each message is one sentence: the cause and the mend."""

from __future__ import annotations

from revox.coding.errors import CodingError


class CloneError(CodingError):
    """A voice cannot be cloned as asked: the clip, the consent or a setting will not do."""
