"""A recording that came over HTTP to a voice, by the model that is served."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from revox.checkpoint.voices import Voice
from revox.cloning.errors import CloneError

if TYPE_CHECKING:
    from revox.api import Revox
    from revox.cloning.consent import Consent
    from revox.coding.invert import InversionProgress
    from revox.serving.state import Reference


class CloneByModel:
    """By the served model: its encoder (`by` "encoder") or inversion in so many seconds."""

    def __init__(self, tts: Revox, by: str, seconds: float) -> None:
        self.tts, self.by, self.seconds = tts, by, seconds
        self._presets: list[Any] | None = None
        self._finding = threading.Lock()

    def _preset_codes(self, should_stop: Callable[[], bool] | None) -> list[Any]:
        """What the checkpoint's voices are made of, found once; half of it is never kept."""
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
        progress: Callable[[InversionProgress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Voice:
        """The voice, with its provenance.

        ref_text: what is said in the recording, of which inversion then asks the language model. progress and
        should_stop: of inversion, which takes long. Raises AudioError or CloneError.
        """
        from revox.cloning.clone import clone_voice
        from revox.coding.likelihood import opinion_on

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
            progress=progress,
            should_stop=should_stop,
        )
        voice = cloned.voice
        record = voice.provenance | {"consent": consent.model_dump(mode="json", exclude_none=True)}
        return Voice(name, voice.codes, voice.embedding, record)
