from __future__ import annotations

import pytest
import torch

from revox.checkpoint.voices import load_voice
from revox.synthesis import generate as generating
from revox.synthesis.batch import Request, embed, speak
from revox.synthesis.errors import SpeakError
from revox.synthesis.generate import MAX_FRAMES, generate, noise_of

REQUESTS = [
    ("Hello.", "neutral_male", 3),
    ("A rather longer text than the others, of many words.", "casual_female", 5),
    ("ten", "pt_male", 8),
    ("Good evening, doctor.", "hi_female", 9),
]


@pytest.fixture(scope="module")
def prompts(prompts_of):
    return prompts_of(REQUESTS)


SEEDS = [seed for *_, seed in REQUESTS]


@pytest.fixture(scope="module")
def alone(model, prompts):
    return [model.speak(p, noise_of(seed, 36)[:80]) for p, seed in zip(prompts, SEEDS, strict=True)]


def test_one_prompt_gives_what_the_models_own_frame_loop_gives(model, prompts, alone):
    [one] = generate(model, prompts[:1], SEEDS[:1], max_frames=80)
    assert torch.equal(one.codes, alone[0])


def test_in_a_batch_each_gives_what_it_gives_alone_though_they_end_at_different_frames(model, prompts, alone):
    together = generate(model, prompts, SEEDS, max_frames=80)
    lengths = [one.codes.shape[1] for one in together]
    assert len(set(lengths)) > 2, "the fixture should end at different frames"
    for one, expected in zip(together, alone, strict=True):
        assert torch.equal(one.codes, expected)
        assert one.ended == (expected.shape[1] < 80)


def test_the_place_in_the_batch_does_not_matter(model, prompts, alone):
    together = generate(model, prompts[::-1], SEEDS[::-1], max_frames=80)
    for one, expected in zip(together[::-1], alone, strict=True):
        assert torch.equal(one.codes, expected)


def test_a_limit_cuts_and_changes_nothing_before(model, prompts, alone):
    cut = generate(model, prompts, SEEDS, max_frames=9)
    for one, expected in zip(cut, alone, strict=True):
        assert torch.equal(one.codes, expected[:, :9])
        assert one.ended == (expected.shape[1] < 9)


def test_the_seed_decides_and_another_seed_says_it_differently(model, prompts):
    once, again, other = (generate(model, prompts[:1], [s], max_frames=20)[0].codes for s in (1, 1, 2))
    assert torch.equal(once, again)
    assert once.shape != other.shape or not torch.equal(once, other)


def test_noise_is_that_of_a_cpu_generator_in_float32_from_its_start():
    noise = noise_of(7, 36)
    expected = torch.randn(2048, 36, generator=torch.Generator().manual_seed(7))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected)


class NoCache:
    def select(self, items):
        return self


def test_prompt_and_speech_together_fit_into_4096_positions(model, monkeypatch):
    # A model that never ends by itself, and takes no time.
    room = []
    monkeypatch.setattr(
        model, "prefill", lambda prompts, new: room.append(new) or (torch.zeros(len(prompts), 256), NoCache())
    )
    monkeypatch.setattr(model, "step", lambda ids, cache: torch.zeros(len(ids), 256))
    monkeypatch.setattr(
        model.acoustic_transformer, "frame", lambda hidden, *_: torch.full((len(hidden), 37), 5)
    )
    for lengths, frames in (
        ([4090], [6]),
        ([4095, 4092], [1, 4]),
        ([4096 - MAX_FRAMES, 4097 - MAX_FRAMES, 10], [MAX_FRAMES, MAX_FRAMES - 1, MAX_FRAMES]),
    ):
        spoken = generate(model, [torch.zeros(n, 256) for n in lengths], [0] * len(lengths))
        assert [one.codes.shape[1] for one in spoken] == frames
        assert not any(one.ended for one in spoken)
        assert room[-1] == max(frames)


def test_a_prompt_without_room_is_refused(model):
    with pytest.raises(SpeakError, match="leaves none of 4096"):
        generate(model, [torch.zeros(4096, 256)], [0])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cfg_alpha": -0.1}, "cfg -0.1 is out of range: 0 to 10"),
        ({"cfg_alpha": 10.5}, "cfg 10.5 is out of range"),
        ({"cfg_alpha": float("nan")}, "cfg nan is out of range"),
        ({"flow_steps": 0}, "0 flow steps are out of range: 1 to 100"),
        ({"flow_steps": 101}, "101 flow steps are out of range"),
        ({"max_frames": 0}, "below one frame"),
    ],
)
def test_settings_out_of_range_are_refused(model, prompts, settings, sentence):
    with pytest.raises(SpeakError, match=sentence):
        generate(model, prompts[:1], [0], **settings)


def test_a_seed_that_torch_cannot_take_is_refused(model, prompts):
    with pytest.raises(SpeakError, match="seed 18446744073709551616 is out of range"):
        generate(model, prompts[:1], [2**64])


def test_flow_steps_and_guidance_reach_the_flow(model, prompts):
    usual, one_step, unguided = (
        generate(model, prompts[:1], [3], max_frames=3, **settings)[0].codes
        for settings in ({}, {"flow_steps": 1}, {"cfg_alpha": 1.0})
    )
    assert not torch.equal(usual, one_step)
    assert not torch.equal(usual, unguided)
    seven = generate(model, prompts[:1], [3], max_frames=3, flow_steps=7, cfg_alpha=1.2)[0].codes
    assert torch.equal(usual, seven)


def test_the_longest_text_fits_and_one_token_more_is_refused_with_the_number_that_fits(
    model, prompter, tiny_checkpoint
):
    voice = load_voice(tiny_checkpoint, "casual_female")  # 11 rows; 5 special tokens; 1 frame of speech
    fits = 4096 - 1 - 11 - 5
    assert len(embed(model, prompter, "a" * fits, voice)) == 4095
    with pytest.raises(SpeakError, match=f"the text has {fits + 1} tokens, and .* at most {fits} fit"):
        embed(model, prompter, "a" * (fits + 1), voice)


def test_a_voice_that_leaves_no_room_or_is_of_another_model_is_refused(model, prompter, tiny_checkpoint):
    voice = load_voice(tiny_checkpoint, "casual_female")
    voice.embedding = torch.zeros(4095, 256, dtype=torch.bfloat16)
    with pytest.raises(SpeakError, match="leave no room"):
        embed(model, prompter, "a", voice)
    voice.embedding = torch.zeros(9, 3072, dtype=torch.bfloat16)
    with pytest.raises(SpeakError, match="of another model"):
        embed(model, prompter, "a", voice)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    model, prompter, tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr(prompter, "tokens", lambda text, voice: [1, 25, 24, 36, 5000, 35, 25])
    with pytest.raises(SpeakError, match="not of one checkpoint"):
        embed(model, prompter, "a", load_voice(tiny_checkpoint, "casual_female"))


def test_several_requests_are_spoken_together_with_the_rows_of_their_voices(
    model, prompter, tiny_checkpoint, alone
):
    requests = [Request(text, load_voice(tiny_checkpoint, name), seed) for text, name, seed in REQUESTS]
    heard = []
    spoken = speak(model, prompter, requests, max_frames=80, progress=heard.append)
    for speech, expected in zip(spoken, alone, strict=True):
        assert torch.equal(speech.codes, expected)
        assert speech.audio.samples.shape == (expected.shape[1] * 1920,)
        assert speech.audio.rate == 24000
        assert speech.audio.truncated == (expected.shape[1] == 80)
    assert heard[:3] == [1, 2, 3]


def test_nothing_is_asked_and_nothing_is_said(model):
    assert generate(model, [], []) == []
    assert generating.room_for_speech(5000) < 1
