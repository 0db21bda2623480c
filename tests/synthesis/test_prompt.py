from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from revox.checkpoint.errors import CheckpointError
from revox.checkpoint.voices import load_voice
from revox.speech import Audio, write_audio
from revox.synthesis.errors import SpeakError
from revox.synthesis.prompt import Prompter, make_prompt

TEXTS = ["Hello.", "Half past nine, für 3 €.", "  two\nlines\t", "[AUDIO][BEGIN_AUDIO]", "数字 🎙"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_prompt_is_mistral_commons_for_a_listed_voice_of_the_same_length(prompter, text):
    from mistral_common.protocol.speech.request import SpeechRequest

    tokenizer = prompter._tokenizer
    listed = tokenizer.audio_encoder.audio_config.voice_num_audio_tokens
    for name, length in list(listed.items())[:4]:
        theirs = tokenizer.encode_speech_request(SpeechRequest(input=text, voice=name)).tokens
        assert prompter.tokens(text, length) == theirs


@pytest.mark.parametrize("frames", [1, 8, 40])
def test_an_unlisted_voice_gets_the_prompt_of_ref_audio_of_whole_frames(prompter, frames):
    from mistral_common.protocol.speech.request import SpeechRequest

    clip = io.BytesIO()
    write_audio(clip, Audio(np.zeros(1920 * frames, np.float32), 24000), "wav")
    request = SpeechRequest(input="Hello.", ref_audio=clip.getvalue())
    theirs = prompter._tokenizer.encode_speech_request(request).tokens
    assert prompter.tokens("Hello.", frames + 1) == theirs


def test_mistral_common_counts_one_row_too_many_for_34_lengths_under_a_minute(prompter):
    # The caveat in prompt.py. If this fails, mistral-common has mended it and the caveat can go.
    count = prompter._tokenizer.audio_encoder._get_num_audio_token_for_speech_request
    too_many = [n for n in range(1920, 60 * 24000, 1920) if count(n) != n // 1920 + 1]
    assert len(too_many) == 34
    assert too_many[:3] == [13440, 26880, 53760]


def test_names_of_special_tokens_in_the_text_are_only_text(prompter):
    tokens = prompter.tokens("[AUDIO] </s> [BEGIN_AUDIO]", 5)
    assert tokens.count(prompter.audio_token) == 5
    assert min(prompter.text_tokens("[AUDIO] </s> [BEGIN_AUDIO]")) >= 1000


def test_special_tokens_are_found_by_name_wherever_they_are(tiny_checkpoint_copy):
    # The same file with the ids of [NEXT_AUDIO_TEXT] and [REPEAT_AUDIO_TEXT] exchanged.
    path = tiny_checkpoint_copy / "tekken.json"
    text = (
        path.read_text()
        .replace("[NEXT_AUDIO_TEXT]", "[X]")
        .replace("[REPEAT_AUDIO_TEXT]", "[NEXT_AUDIO_TEXT]")
    )
    path.write_text(text.replace("[X]", "[REPEAT_AUDIO_TEXT]"))
    moved = Prompter(tiny_checkpoint_copy)
    assert moved.tokens("a", 2) == [1, 25, 24, 24, 35, 1097, 36, 25]


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_text_is_refused(prompter, text):
    with pytest.raises(SpeakError, match="text is empty"):
        prompter.tokens(text, 5)


def test_broken_unicode_is_refused(prompter):
    with pytest.raises(SpeakError, match="not valid Unicode at character 3"):
        prompter.tokens("ab\udc80", 5)


def test_a_folder_without_a_usable_tokenizer_is_refused(tiny_checkpoint_copy):
    path = tiny_checkpoint_copy / "tekken.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(CheckpointError, match=r"tekken\.json is not valid JSON"):
        Prompter(tiny_checkpoint_copy)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tekken\.json is not a tokenizer"):
        Prompter(tiny_checkpoint_copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tekken\.json is missing"):
        Prompter(tiny_checkpoint_copy)


def test_a_tokenizer_of_a_text_model_is_refused(tiny_checkpoint_copy):
    import json

    path = tiny_checkpoint_copy / "tekken.json"
    contents = json.loads(path.read_text())
    del contents["audio"]
    path.write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match="not a text-to-speech tokenizer"):
        Prompter(tiny_checkpoint_copy)


def test_the_longest_text_fits_and_one_token_more_is_refused_with_the_number_that_fits(
    model, prompter, tiny_checkpoint
):
    voice = load_voice(tiny_checkpoint, "casual_female")  # 11 rows; 5 special tokens; 1 frame of speech
    fits = 4096 - 1 - 11 - 5
    assert len(make_prompt(model, prompter, "a" * fits, voice).embeddings) == 4095
    with pytest.raises(SpeakError, match=f"the text has {fits + 1} tokens, and .* at most {fits} fit"):
        make_prompt(model, prompter, "a" * (fits + 1), voice)


def test_a_voice_that_leaves_no_room_or_is_of_another_model_is_refused(model, prompter, tiny_checkpoint):
    voice = load_voice(tiny_checkpoint, "casual_female")
    voice.embedding = torch.zeros(4095, 256, dtype=torch.bfloat16)
    with pytest.raises(SpeakError, match="leave no room"):
        make_prompt(model, prompter, "a", voice)
    voice.embedding = torch.zeros(9, 3072, dtype=torch.bfloat16)
    with pytest.raises(SpeakError, match="of another model"):
        make_prompt(model, prompter, "a", voice)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    model, prompter, tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr(prompter, "text_tokens", lambda text: [5000])
    with pytest.raises(SpeakError, match="not of one checkpoint"):
        make_prompt(model, prompter, "a", load_voice(tiny_checkpoint, "casual_female"))
