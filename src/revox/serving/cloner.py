"""Makes voices of recordings that came over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from revox.checkpoint.voices import Voice
from revox.progress import ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.cloning.clone import SelectedSpeech
    from revox.cloning.consent import Consent
    from revox.serving.references import Reference


class ServedCloner:
    """Clones with the served checkpoint: `by` "encoder", at once, or by "inversion", within `seconds`."""

    def __init__(self, tts: Revox, by: str, seconds: float) -> None:
        self.tts, self.by = tts, by
        self.budget = seconds if by == "inversion" else None

    def check(self, reference: Reference, ref_text: str | None) -> None:
        """Check a recording before it is cloned. Raises AudioError or CodingError if it is unusable."""
        self._select(reference, ref_text)

    def _select(self, reference: Reference, ref_text: str | None) -> SelectedSpeech:
        return self.tts.select(reference.audio, transcript=ref_text, source=reference.data)

    def __call__(
        self,
        reference: Reference,
        *,
        name: str,
        consent: Consent,
        ref_text: str | None,
        progress: ProgressCallback = ignore_progress,
        should_stop: Callable[[], bool] | None = None,
    ) -> Voice:
        """The voice, with its provenance. ref_text: the transcript, which guides an inversion.

        Raises AudioError or CodingError.
        """
        cloned = self.tts.clone(
            self._select(reference, ref_text), consent=consent, name=name, transcript=ref_text,
            method=self.by, budget=self.budget, progress=progress, should_stop=should_stop,
        )  # fmt: skip
        return Voice(name, cloned.codes, cloned.embedding, cloned.provenance)
