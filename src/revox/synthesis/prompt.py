"""Text and a voice -> the prompt: tokens as mistral-common builds them, then embeddings.

`[BOS] [BEGIN_AUDIO] [AUDIO] x N [NEXT_AUDIO_TEXT] text [REPEAT_AUDIO_TEXT] [BEGIN_AUDIO]`, where N is the
length of the voice embedding (frames + 1). The tokens are those of mistral-common's `encode_speech_request`
for a voice that tekken.json lists; put together here, they serve voices in memory as well.

A caveat for those who send `ref_audio` to other runtimes: mistral-common counts N as
ceil(samples / 24000 * 12.5) + 1 in floating point. For 34 lengths under a minute (13440, 26880, 53760
samples ...: whole numbers of frames whose product rounds up) that is one more than the
ceil(samples / 1920) + 1 that the encoder gives. The prompts made here count the voice embedding instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.params import read_json
from revox.model.voxtral import Voxtral
from revox.synthesis.engine import MAX_POSITIONS
from revox.synthesis.errors import SpeakError

if TYPE_CHECKING:
    from revox.checkpoint.voices import Voice


class Prompter:
    """The tokenizer of a checkpoint folder, read once.

    Raises CheckpointError when tekken.json is missing, unreadable, or not a text-to-speech tokenizer.
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
                f"{self.path} is not a text-to-speech tokenizer (without {', '.join(missing)}); "
                "take the tekken.json of a Voxtral TTS checkpoint."
            )

    @property
    def audio_token(self) -> int:
        """The id of `[AUDIO]`, whose places the voice embedding takes."""
        return self._tokenizer.audio_encoder.special_ids.audio

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of the text alone. Raises SpeakError on text that is empty or not valid Unicode.

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

    def tokens(self, text: str | list[int], voice_length: int) -> list[int]:
        """The prompt of `text`, or of its tokens, for a voice embedding of `voice_length` positions.

        Raises SpeakError on text that cannot be spoken.
        """
        text_tokens = self.text_tokens(text) if isinstance(text, str) else text
        ids = self._tokenizer.audio_encoder.special_ids
        return [
            *self._tokenizer.start(), ids.begin_audio, *[ids.audio] * voice_length,
            ids.text_to_audio, *text_tokens, ids.audio_to_text, ids.begin_audio,
        ]  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A text in a voice, as the backbone reads it: `embeddings` `[time, dim]`.

    `text_tokens` is the number of tokens of the text alone; the first `voice_positions` positions are the
    same for every text in this voice.
    """

    embeddings: Tensor
    text_tokens: int
    voice_positions: int = 0


def make_prompt(model: Voxtral, prompter: Prompter, text: str, voice: Voice) -> Prompt:
    """The prompt of `text` in `voice`.

    Raises SpeakError on text that is empty, not valid Unicode or too long, and on a voice of another model.
    """
    dim, vocabulary = model.config.backbone.dim, model.config.backbone.vocab_size
    if voice.embedding.ndim != 2 or voice.embedding.shape[1] != dim:
        raise SpeakError(
            f"voice {voice.name!r} has an embedding {list(voice.embedding.shape)}, this model reads "
            f"[N, {dim}]: the voice is of another model, make it again with this checkpoint"
        )
    text_tokens = prompter.text_tokens(text)
    tokens = prompter.tokens(text_tokens, len(voice.embedding))
    spare = MAX_POSITIONS - 1 - len(tokens)
    if spare < 0:
        fits = len(text_tokens) + spare
        if fits < 1:
            raise SpeakError(
                f"voice {voice.name!r} has an embedding of {len(voice.embedding)} positions, which leave no "
                f"room for text in {MAX_POSITIONS}; make it from a shorter reference"
            )
        raise SpeakError(
            f"the text has {len(text_tokens)} tokens, and with voice {voice.name!r} at most {fits} fit into "
            f"{MAX_POSITIONS} positions; speak it in parts"
        )
    if max(tokens) >= vocabulary:
        raise SpeakError(
            f"{prompter.path} gives token {max(tokens)}, and the model knows {vocabulary}: they are not of "
            "one checkpoint, download it again"
        )
    with torch.inference_mode():
        ids = torch.tensor(tokens, device=model.device)
        embeddings = model.embed_prompt(ids, prompter.audio_token, voice.embedding.to(model.device))
    voice_positions = tokens.index(prompter.audio_token) + len(voice.embedding)
    return Prompt(embeddings, len(text_tokens), voice_positions)


def _read(path: Path) -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if not path.is_file():
        read_json(path)  # which says what is wrong
    try:
        # The file's audio section makes mistral-common add the audio encoder.
        return MistralTokenizer.from_file(path).instruct_tokenizer
    except (OSError, json.JSONDecodeError) as error:
        read_json(path)
        raise CheckpointError(f"{path} cannot be read ({error}); copy or download it again.") from None
    except Exception as error:  # mistral-common's complaints have many types
        raise CheckpointError(
            f"{path} is not a tokenizer that mistral-common can load ({error}); copy or download it again."
        ) from None
