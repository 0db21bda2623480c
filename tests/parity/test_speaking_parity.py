"""Speaking: mistral-common's prompt, transformers' Mistral, vllm-omni's frames and sums of rows."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import pytest
import torch
from mistral_common.protocol.speech.request import SpeechRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from oracle import noise_injected, random_backbone_state
from subject import Pair, random_codes, speechlike
from test_backbone_parity import hidden_of, their_backbone
from torch import Tensor, nn
from transformers import MistralModel

from lab.tokenizer import write_tekken
from revox.model.voxtral import Voxtral, parameter_name
from revox.synthesis.engine import Engine, Request, noise_of
from revox.synthesis.prompt import Prompter

TEXTS = [
    "Seven.",
    "Half past nine, für 3 €.",
    " spaced  out ",
    "[AUDIO] is a word here, as is </s>",
    "日本語\n",
]
AUDIO = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tekken(folder / "tekken.json", {"neutral_male": 12, "de_female": 3})
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> MistralTokenizer:
    return MistralTokenizer.from_file(folder / "tekken.json")


def wav_of(samples: Tensor) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(24000)
        out.writeframes((samples * 32767).to(torch.int16).numpy().tobytes())
    return file.getvalue()


@pytest.mark.parametrize("text", TEXTS)
def test_the_prompt_of_a_listed_voice_is_mistral_commons(folder: Path, theirs: MistralTokenizer, text: str):
    expected = theirs.encode_speech_request(SpeechRequest(input=text, voice="neutral_male")).tokens
    assert Prompter(folder).tokens(text, 12) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_the_prompt_of_a_voice_in_memory_is_mistral_commons_for_its_clip(
    folder: Path, theirs: MistralTokenizer, text: str
):
    clip = wav_of(speechlike(6 * 1920, seed=1))
    expected = theirs.encode_speech_request(SpeechRequest(input=text, ref_audio=clip)).tokens
    # Six frames and the end frame.
    assert Prompter(folder).tokens(text, 7) == expected


def test_the_prompt_ends_where_the_first_frame_is_read(folder: Path):
    tokens = Prompter(folder).tokens("ten", 4)
    bos, begin, nxt, repeat = 1, 25, 36, 35
    text = [1000 + byte for byte in b"ten"]
    assert tokens == [bos, begin, *[AUDIO] * 4, nxt, *text, repeat, begin]


def test_mistral_common_counts_one_row_too_many_for_34_lengths_under_a_minute(
    theirs: MistralTokenizer, oracle
):
    encoder = theirs.instruct_tokenizer.audio_encoder
    count = encoder._get_num_audio_token_for_speech_request
    wrong = [n for n in range(1920, 60 * 24000 + 1, 1920) if count(n) != n // 1920 + 1]
    # Off a whole number of frames the two cannot differ by rounding: checked on a coarse grid.
    assert all(count(n) == -(-n // 1920) + 1 for n in range(7, 60 * 24000, 997) if n % 1920)
    assert len(wrong) == 34
    assert wrong[:2] == [13440, 26880]
    assert all(count(n) == n // 1920 + 2 for n in wrong)
    # vllm-omni counts again, in its own way, and agrees with the encoder.
    adapter = oracle.generation.VoxtralTTSProcessorAdapter(theirs.instruct_tokenizer)
    adapter.__dict__ |= {"sampling_rate": 24000, "frame_rate": 12.5}
    assert all(adapter.get_num_audio_tokens(n) == n // 1920 + 1 for n in wrong)


@pytest.fixture(scope="module")
def talker(oracle) -> tuple[Pair, Voxtral, MistralModel]:
    """A whole model that stops speaking now and then, and its parts by others."""
    pair = Pair.small(oracle, torch.float32, seed=30)
    for head in (pair.acoustic.semantic_codebook_output, pair.their_acoustic.semantic_codebook_output):
        head.weight.data[1] *= 2
    state = random_backbone_state(pair.params, seed=31)
    parts = {
        "acoustic_transformer": pair.acoustic,
        "audio_tokenizer": pair.codec,
        "mm_audio_embeddings": pair.embeddings,
    }
    own = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}
    own |= {parameter_name(name): t for name, t in state.items()}
    model = Voxtral(pair.config, with_encoder=True)
    model.load_state_dict(own, assign=True)
    return pair, model.eval().requires_grad_(False), their_backbone(pair.params, state)


def their_speech(pair: Pair, backbone: MistralModel, tokens: Tensor, rows: Tensor, noise: Tensor) -> tuple:
    """Codes `[37, frames]` and whether speech ended by itself: no cache, no batch, the published parts."""
    sequence = nn.functional.embedding(tokens, pair.embeddings.tok_embeddings.weight)
    sequence[tokens == AUDIO] = rows
    spoken = []
    for row in noise:
        hidden = hidden_of(backbone, sequence[None])[:, -1]
        with noise_injected(pair.oracle, row[None]):
            ids = pair.their_acoustic(hidden, torch.tensor([1.2]))
        if int(ids[0, 0]) == 1:
            return torch.stack(spoken, dim=1), True
        spoken.append(ids[0] - 2)
        sequence = torch.cat((sequence, pair.their_codec.encode_tokens([ids[:, :, None]])[0]))
    return torch.stack(spoken, dim=1), False


def test_speech_in_a_batch_is_what_the_published_parts_say_one_at_a_time(talker, folder: Path):
    """First frame at the last token of a prompt with a voice's rows, then each frame's sum fed back."""
    pair, model, backbone = talker
    prompter, limit = Prompter(folder), 24
    requests = [("Seven.", 9, 4), ("Half past nine, for 3.", 14, 5), ("x", 2, 6), ("On and on.", 5, 7)]
    prompts, expected = [], []
    for text, frames, seed in requests:
        rows = model.mm_audio_embeddings.voice_embedding(random_codes(pair.config, 1, frames, seed)[0])
        tokens = torch.tensor(prompter.tokens(text, len(rows)))
        prompts.append(model.embed_prompt(tokens, AUDIO, rows))
        expected.append(their_speech(pair, backbone, tokens, rows, noise_of(seed, 36)[:limit]))
    asked = [Request(prompt, seed, limit) for prompt, (*_, seed) in zip(prompts, requests, strict=True)]
    ours = Engine(model).generate_batch(asked)
    for mine, (codes, ended) in zip(ours, expected, strict=True):
        assert mine.ended is ended
        assert torch.equal(mine.codes(), codes)
    lengths = [codes.shape[1] for codes, _ in expected]
    assert len(set(lengths)) > 1, f"items leave the batch at different times: {lengths}"
    assert {ended for _, ended in expected} == {True, False}, "some end, some meet the limit"
    [alone] = Engine(model).generate_batch(asked[:1])
    assert torch.equal(alone.codes(), expected[0][0])
