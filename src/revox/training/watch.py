"""Warnings of the known ways in which restoring an encoder fails, while there is time to act."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """What the checkpoint's own codes look like (its presets and its speech): the perplexity of semantic
    codes, the share of acoustic codes on the first or last level, and the norm of an embedding's frames, mean
    and deviation."""

    perplexity: float
    saturated: float
    embedding_norm: float
    embedding_norm_deviation: float


class Watch:
    """Reads the run's reports and gives each warning once, and again when its cause has come back."""

    PATIENCE = 20  # reports without progress
    SETTLED = 5  # reports before the first warning

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self.reports = 0
        self.best: dict[str, tuple[float, int]] = {}
        self.won: deque[bool] = deque(maxlen=5)
        self.warned: set[str] = set()

    def update(self, row: dict[str, float]) -> list[str]:
        """Warnings that this report gives cause for, each a sentence with what to try."""
        self.reports += 1
        found = self._figure_warnings(row) | self._progress_warnings(row)
        if self.reports <= self.SETTLED:
            return []
        new = [sentence for cause, sentence in found.items() if cause not in self.warned]
        self.warned = set(found)
        return new

    def _figure_warnings(self, row: dict[str, float]) -> dict[str, str]:
        """Cause -> sentence of figures that are far from the checkpoint's own."""
        found: dict[str, str] = {}
        expected = self.expected
        used = row.get("perplexity", expected.perplexity)
        if used < 0.1 * expected.perplexity:
            found["collapse"] = (
                f"the semantic codebook collapses: its perplexity is {used:.0f} codes, the model's "
                f"{expected.perplexity:.0f}; raise weights.diversity, or train on more pairs"
            )
        share = row.get("valid_saturated", 0.0)
        if share > max(3 * expected.saturated, expected.saturated + 0.1):
            found["saturation"] = (
                f"{share:.0%} of the acoustic codes are on the first or last level, of the model's own "
                f"{expected.saturated:.0%}; train on more pairs, or lower weights.reconstruction"
            )
        trained, held = row.get("trained_levels", 0.0), row.get("valid_levels", 0.0)
        if held > 1.2 * trained and "trained_levels" in row:
            found["overfit"] = (
                f"acoustic codes are {held:.2f} levels off in sentences and voices that are held out, "
                f"{trained:.2f} in those that are learned from; raise sentences, or give more different "
                "--texts"
            )
        norm = row.get("valid_embedding_norm", expected.embedding_norm)
        allowed = 4 * max(expected.embedding_norm_deviation, 0.01 * expected.embedding_norm)
        if abs(norm - expected.embedding_norm) > allowed:
            found["embeddings"] = (
                f"the clips' voice embeddings have a norm of {norm:.2f}, the presets' "
                f"{expected.embedding_norm:.2f}: the language model does not know such codes; train on more "
                "pairs"
            )
        return found

    def _progress_warnings(self, row: dict[str, float]) -> dict[str, str]:
        """Cause -> sentence of losses that do not move, or have nothing left to say."""
        found: dict[str, str] = {}
        stalled = []
        for name in ("mel", "acoustic"):
            if name not in row:
                continue
            best, since = self.best.get(name, (float("inf"), self.reports))
            if row[name] < best * 0.995:
                self.best[name] = (row[name], self.reports)
            elif self.reports - since >= self.PATIENCE:
                stalled.append(name)
        if stalled:
            found["stall"] = (
                f"{' and '.join(stalled)} has not fallen in {self.PATIENCE} reports; lower the learning "
                "rate, or let it decay"
            )
        if "discriminator" in row:
            self.won.append(row["discriminator"] < 0.2)
            if len(self.won) == 5 and all(self.won):
                found["discriminator"] = (
                    "the discriminators have won (hinge loss below 0.2 in five reports) and no longer help; "
                    "lower discriminator.learning_rate, or raise discriminator.every"
                )
        return found
