"""Makes voices of recordings that came over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from revox.checkpoint.voices import Voice
from revox.cloning.errors import CloneError
from revox.progress import Progress, ProgressCallback, ignore_progress
from revox.speech import select_reference

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.cloning.consent import Consent
    from revox.coding.invert import InversionProgress
    from revox.serving.references import Reference


class ServedCloner:
    """Clones with the served checkpoint: `by` "encoder", at once, or by "inversion", within `seconds`."""

    def __init__(self, tts: Revox, by: str, seconds: float) -> None:
        self.tts, self.by, self.seconds = tts, by, seconds
        self._presets: list[Any] | None = None
        self._finding = threading.Lock()

    def check(self, reference: Reference, ref_text: str | None) -> None:
        """Check a recording before it is cloned. Raises AudioError or CodingError if it is unusable."""
        from revox.cloning.clone import check_transcript

        check_transcript(ref_text)
        select_reference(reference.audio, rate=self.tts.sampling_rate, whole=ref_text is not None)

    def _preset_codes(self, should_stop: Callable[[], bool] | None) -> list[Any]:
        """The codes of the checkpoint's voices, found once; an interrupted search is not kept."""
        from revox.cloning.clone import preset_codes

        with self._finding:
            if self._presets is None:
                found = preset_codes(self.tts.folder, self.tts.model, should_stop=should_stop)
                if should_stop is not None and should_stop():
                    raise CloneError("it was stopped")
                self._presets = found
            return self._presets

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
        from revox.cloning.clone import clone_voice
        from revox.coding.likelihood import opinion_on

        def show(at: InversionProgress) -> None:
            progress(Progress(at.phase, at.step, at.steps, {"seconds_left": at.seconds_left}))

        searches = self.by == "inversion"
        opinion = None
        if ref_text is not None and searches:
            tokens_of = partial(self.tts.prompter.tokens_for_rows, ref_text)
            opinion = opinion_on(self.tts.model, tokens_of, self.tts.prompter.audio_token)
        cloned = clone_voice(
            self.tts.model,
            reference.audio,
            consent=consent.statement,
            name=name,
            method=self.by,
            budget=self.seconds if searches else None,
            presets=self._preset_codes(should_stop) if searches else (),
            source=reference.data,
            transcript=ref_text,
            opinion=opinion,
            progress=show,
            should_stop=should_stop,
        )
        voice = cloned.voice
        record = voice.provenance | {"consent": consent.model_dump(mode="json", exclude_none=True)}
        return Voice(name, voice.codes, voice.embedding, record)
