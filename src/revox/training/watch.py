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
        found = {
            "collapse": self._collapse(row), "saturation": self._saturation(row), "stall": self._stall(row),
            "discriminator": self._discriminator(row), "embeddings": self._embeddings(row),
        }  # fmt: skip
        if self.reports <= self.SETTLED:
            return []
        now = {name for name, sentence in found.items() if sentence}
        new = [found[name] for name in found if name in now and name not in self.warned]
        self.warned = now
        return [sentence for sentence in new if sentence]

    def _collapse(self, row: dict[str, float]) -> str | None:
        used = row.get("perplexity")
        if used is None or used >= 0.1 * self.expected.perplexity:
            return None
        return (
            f"the semantic codebook collapses: its perplexity is {used:.0f} codes, the model's "
            f"{self.expected.perplexity:.0f}; raise weights.diversity, or train on more pairs"
        )

    def _saturation(self, row: dict[str, float]) -> str | None:
        share = row.get("valid_saturated")
        limit = max(3 * self.expected.saturated, self.expected.saturated + 0.1)
        if share is None or share <= limit:
            return None
        return (
            f"{share:.0%} of the acoustic codes are on the first or last level, of the model's own "
            f"{self.expected.saturated:.0%}; train on more pairs, or lower weights.reconstruction"
        )

    def _stall(self, row: dict[str, float]) -> str | None:
        stalled = []
        for name in ("mel", "acoustic"):
            if name not in row:
                continue
            best, since = self.best.get(name, (float("inf"), self.reports))
            if row[name] < best * 0.995:
                self.best[name] = (row[name], self.reports)
            elif self.reports - since >= self.PATIENCE:
                stalled.append(name)
        if not stalled:
            return None
        return (
            f"{' and '.join(stalled)} has not fallen in {self.PATIENCE} reports; lower the learning rate, or "
            "let it decay"
        )

    def _discriminator(self, row: dict[str, float]) -> str | None:
        if "discriminator" not in row:
            return None
        self.won.append(row["discriminator"] < 0.2)
        if len(self.won) < 5 or not all(self.won):
            return None
        return (
            "the discriminators have won (hinge loss below 0.2 in five reports) and no longer help; lower "
            "discriminator.learning_rate, or raise discriminator.every"
        )

    def _embeddings(self, row: dict[str, float]) -> str | None:
        norm = row.get("valid_embedding_norm")
        expected = self.expected
        if norm is None or abs(norm - expected.embedding_norm) <= 4 * max(
            expected.embedding_norm_deviation, 0.01 * expected.embedding_norm
        ):
            return None
        return (
            f"the clips' voice embeddings have a norm of {norm:.2f}, the presets' "
            f"{expected.embedding_norm:.2f}: the language model does not know such codes; train on more pairs"
        )
