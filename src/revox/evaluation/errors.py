"""What can be wrong with a request to measure. Each message is one sentence: the cause and the mend."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Nothing can be measured as asked: the clips, the checkpoint or a setting will not do."""
