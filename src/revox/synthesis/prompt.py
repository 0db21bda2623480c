"""Text and a voice's length -> the prompt's tokens, as mistral-common builds them.

`[BOS] [BEGIN_AUDIO] [AUDIO] x N [NEXT_AUDIO_TEXT] text [REPEAT_AUDIO_TEXT] [BEGIN_AUDIO]`, where N is the
number of the voice's rows (frames + 1). For a voice that tekken.json lists, the tokens are mistral-common's
own `encode_speech_request`; for a voice in memory the same sequence is put together from the same tokenizer.

A caveat for those who send `ref_audio` to other runtimes: mistral-common counts N as
ceil(samples / 24000 * 12.5) + 1 in floating point. For 34 lengths under a minute (13440, 26880, 53760
samples ...: whole numbers of frames whose product rounds up) that is one more than the
ceil(samples / 1920) + 1 rows that the encoder gives. A Voice here counts its rows, so it is not concerned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revox.checkpoint.errors import CheckpointError
from revox.synthesis.errors import SpeakError

if TYPE_CHECKING:
    from revox.checkpoint.voices import Voice


class Prompter:
    """The tokenizer of a checkpoint folder, read once.

    Raises CheckpointError when tekken.json is missing, unreadable, or no text-to-speech tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "tekken.json"
        self._tokenizer = _read(self.path)
        encoder = self._tokenizer.audio_encoder
        ids = encoder.special_ids if encoder is not None else None
        needed = ("audio", "begin_audio", "text_to_audio", "audio_to_text")
        missing = [name for name in needed if ids is None or getattr(ids, name) is None]
        if missing:
            raise CheckpointError(
                f"{self.path} is no text-to-speech tokenizer (without {', '.join(missing)}); "
                "take the tekken.json of a Voxtral TTS checkpoint."
            )
        self._listed: dict[str, int] = dict(encoder.audio_config.voice_num_audio_tokens or {})

    @property
    def audio_token(self) -> int:
        """The id of `[AUDIO]`, whose places a voice's rows take."""
        return self._tokenizer.audio_encoder.special_ids.audio

    @property
    def listed_voices(self) -> dict[str, int]:
        """Voices that tekken.json lists, with their rows."""
        return dict(self._listed)

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of the text alone. Raises SpeakError on text that is empty or no valid Unicode.

        Names of special tokens within the text ("[AUDIO]") are text like any other.
        """
        if not text.strip():
            raise SpeakError("the text is empty; give at least one word to speak")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SpeakError(
                f"the text is not valid Unicode at character {error.start + 1}; save or paste it as UTF-8"
            ) from None
        return self._tokenizer.tokenizer.encode(text, bos=False, eos=False)

    def tokens(self, text: str, voice: Voice) -> list[int]:
        """The prompt for `text` in a voice, listed in the folder or only in memory.

        Raises SpeakError on text that cannot be spoken.
        """
        rows = int(voice.embedding.shape[0])
        if self._listed.get(voice.name) == rows:
            return self.tokens_for_listed(text, voice.name)
        return self.tokens_for_rows(text, rows)

    def tokens_for_listed(self, text: str, name: str) -> list[int]:
        """The prompt by mistral-common itself, for a voice that tekken.json lists.

        Raises SpeakError on text that cannot be spoken or a name that is not listed.
        """
        from mistral_common.protocol.speech.request import SpeechRequest

        self.text_tokens(text)
        if name not in self._listed:
            raise SpeakError(f"{self.path} lists no voice {name!r}; see `revox voice list`")
        return self._tokenizer.encode_speech_request(SpeechRequest(input=text, voice=name)).tokens

    def tokens_for_rows(self, text: str, rows: int) -> list[int]:
        """The prompt for any voice of `rows` rows. Raises SpeakError on text that cannot be spoken."""
        ids = self._tokenizer.audio_encoder.special_ids
        return [
            *self._tokenizer.start(), ids.begin_audio, *[ids.audio] * rows,
            ids.text_to_audio, *self.text_tokens(text), ids.audio_to_text, ids.begin_audio,
        ]  # fmt: skip


def _read(path: Path) -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy or download it again.")
    try:
        # The file's audio section makes mistral-common add the audio encoder.
        return MistralTokenizer.from_file(path).instruct_tokenizer
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy or download it again.") from None
    except Exception as error:  # mistral-common's complaints have many types
        raise CheckpointError(
            f"{path} is not a tokenizer that mistral-common can load ({error}); copy or download it again."
        ) from None
