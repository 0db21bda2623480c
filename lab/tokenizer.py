"""A small tekken.json in the release's layout, which mistral-common loads as a text-to-speech tokenizer.

The text tokens are the 256 bytes, so any text can be encoded, and whole words or filler if asked for. The
special tokens come first, with the release's ids.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from revox.speech.files import replace_file

SPECIAL_TOKENS = 1000  # ids that the release reserves before its text tokens

# The release's ids: some runtimes hard-code them. [TRANSCRIBE] is here because mistral-common requires it.
_NAMED_SPECIALS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
    26: "[OUTPUT_AUDIO]",
    32: "[STREAMING_PAD]",
    33: "[STREAMING_WORD]",
    34: "[TRANSCRIBE]",
    35: "[REPEAT_AUDIO_TEXT]",
    36: "[NEXT_AUDIO_TEXT]",
}

# Words with their leading space, single digits, runs of punctuation, spaces.
_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def minimal_vocab_size(words: Iterable[str] = ()) -> int:
    """The `vocab_size` that params.json needs for `write_tekken(..., words=words)`: 1000 + 256 + words."""
    return SPECIAL_TOKENS + 256 + len(list(words))


PIECES = Path(__file__).parent / "lists" / "pieces.json"


def learn_pieces(texts: Iterable[str], count: int) -> list[str]:
    """The first `count` merges of a byte-pair encoding of `texts`, in their order, which is their rank.

    Merges beyond ASCII are left out: some are parts of a character, which JSON cannot hold.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    split = Split(Regex(_PATTERN), "isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=len(alphabet) + count, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [piece.replace("\u0120", " ") for piece, _ in by_id if len(piece) > 1]  # its sign for a space
    return [piece for piece in merged if piece.isascii()]


def domain_pieces() -> list[str]:
    """The committed pieces of text that get a token of their own, by rank."""
    pieces: list[str] = json.loads(PIECES.read_text(encoding="utf-8"))
    return pieces


def tekken(
    voices: Mapping[str, int],
    *,
    sampling_rate: int = 24000,
    frame_rate: float = 12.5,
    vocab_size: int | None = None,
    words: Iterable[str] = (),
    version: str = "v7",
) -> dict[str, Any]:
    """The contents of a tekken.json.

    voices: name -> rows of its embedding (frames + 1).
    vocab_size: ids in all, specials included; by default as few as possible. Ids beyond the bytes and `words`
    are byte triples that cannot occur in UTF-8, so that they exist and are never used.
    words: pieces that get an id of their own, such as " seven" (a word with its leading space).
    Raises ValueError if vocab_size is too small for the bytes and words.
    """
    words = list(words)
    smallest = minimal_vocab_size(words)
    vocab_size = vocab_size or smallest
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {smallest} ids are needed; ask for at least that many"
        )
    pieces = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    for filler in range(vocab_size - smallest):
        pieces.append(bytes([0xF8 + (filler >> 16), (filler >> 8) & 255, filler & 255]))
    vocab = []
    for rank, piece in enumerate(pieces):
        text: str | None
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            text = None
        vocab.append({"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": text})
    specials = [
        {"rank": rank, "token_str": _NAMED_SPECIALS.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(SPECIAL_TOKENS)
    ]
    return {
        "config": {
            "pattern": _PATTERN,
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": SPECIAL_TOKENS,
            "version": version,
        },
        "vocab": vocab,
        "special_tokens": specials,
        "version": 1,
        "type": "Tekken",
        "audio": {
            "sampling_rate": sampling_rate,
            "frame_rate": frame_rate,
            "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 30.0,
            "voice_num_audio_tokens": dict(voices),
        },
    }


def write_tekken(path: str | Path, voices: Mapping[str, int], **settings: Any) -> int:
    """Write `tekken(voices, **settings)` to `path`, named "...tekken..."; returns its vocab_size."""
    contents = tekken(voices, **settings)
    replace_file(path, json.dumps(contents, indent=1, ensure_ascii=False))
    return contents["config"]["default_vocab_size"]
