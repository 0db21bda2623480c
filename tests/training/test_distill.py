"""Whisper distillation against hand-computed alignments and a tiny Whisper with random weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from revox.speech import Audio, write_audio
from revox.training.data import ClipBatches, ClipSampler, find_sources
from revox.training.distill import (
    AsrDistillation,
    DistillTargets,
    TokenStates,
    WhisperTeacher,
    frames_of_attention,
    targets_of_crop,
)
from revox.training.distiller import Distiller, StatesCache
from revox.training.errors import TrainingError
from revox.training.resampling import Resampler
from revox.training.settings import EncoderTraining

transformers = pytest.importorskip("transformers")

RATE = 24000
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
SPECIALS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|transcribe|>",
    "<|notimestamps|>",
]
IDS = {token: i for i, token in enumerate([*LETTERS, *SPECIALS])}


def save_whisper(folder, *, multilingual=False, heads=((0, 1), (1, 0)), seed=0, positions=24, layers=1):
    """A Whisper of two thin layers with random weights, saved as the real ones are."""
    specials = (
        SPECIALS if multilingual else [s for s in SPECIALS if s not in ("<|en|>", "<|de|>", "<|transcribe|>")]
    )
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *specials])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "normalizer.json").write_text("{}")
    tokenizer = transformers.WhisperTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=layers, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_target_positions=positions,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start, init_std=0.5,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    generation = dict(
        max_length=20, decoder_start_token_id=start, eos_token_id=end, pad_token_id=end, suppress_tokens=None,
        begin_suppress_tokens=None, no_timestamps_token_id=vocabulary["<|notimestamps|>"],
    )  # fmt: skip
    if heads is not None:
        generation["alignment_heads"] = [list(pair) for pair in heads]
    if multilingual:
        generation |= dict(
            is_multilingual=True,
            lang_to_id={"<|en|>": vocabulary["<|en|>"], "<|de|>": vocabulary["<|de|>"]},
            task_to_id={"transcribe": vocabulary["<|transcribe|>"]},
        )
    model.generation_config = transformers.GenerationConfig(**generation)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("multilingual"), multilingual=True, heads=None)


@pytest.fixture(scope="module")
def teacher(folder):
    return WhisperTeacher.load(str(folder))


def shares(spread):
    return spread / spread.sum(-1, keepdim=True)


def clips(*seconds):
    """Tones with noise `[batch, samples]` at 24 kHz, and their lengths."""
    rng = np.random.default_rng(0)
    sizes = [round(s * RATE) for s in seconds]
    batch = np.zeros((len(sizes), max(sizes)), dtype=np.float32)
    for i, n in enumerate(sizes):
        t = np.arange(n) / RATE
        batch[i, :n] = 0.3 * np.sin(2 * np.pi * (200 + 150 * i) * t) * (
            1 + np.sin(9 * t)
        ) + 0.01 * rng.normal(size=n)
    return torch.from_numpy(batch), torch.tensor(sizes)


# --- alignment


def test_attention_is_cut_to_the_clip_and_summed_into_its_frames():
    # 0.16 s: two frames of 80 ms, eight positions of 20 ms; the rest of the window is beyond the clip.
    attention = torch.tensor(
        [[0.1, 0.1, 0.0, 0.0, 0.2, 0.0, 0.2, 0.2, 0.1, 0.1], [0, 0, 0, 0.5, 0.25, 0, 0, 0, 0.25, 0]]
    )
    expected = torch.tensor([[0.2 / 0.8, 0.6 / 0.8], [0.5 / 0.75, 0.25 / 0.75]])
    torch.testing.assert_close(shares(frames_of_attention(attention, 3840, RATE, 1920)), expected)


def test_a_clip_that_ends_within_a_position_and_a_frame_keeps_both():
    # 0.09 s is 4.5 positions and 1.125 frames: five positions, two frames.
    attention = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0, 0.3, 0.7]])
    out = shares(frames_of_attention(attention, 2160, RATE, 1920))
    torch.testing.assert_close(out, torch.tensor([[0.8, 0.2], [0.0, 1.0]]))


def test_a_position_that_two_frames_share_is_divided_by_time():
    # Frames of 30 ms: position 1 (20 to 40 ms) lies half in each of the first two.
    out = frames_of_attention(torch.tensor([[0.5, 0.4, 0.1]]), 960, 16000, 480)
    torch.testing.assert_close(out, torch.tensor([[0.7, 0.3]]))


def test_a_crop_has_the_tokens_that_pay_it_half_of_their_attention_in_its_own_frames():
    # 0.32 s are 16 positions; the crop is 0.1 to 0.26 s: positions 5 to 12 and two frames of 80 ms.
    attention = torch.zeros(4, 16)
    attention[0, 4] = 1.0  # before it
    attention[1, 5], attention[1, 9] = 0.25, 0.75  # in its first frame and in its second
    attention[2, 12], attention[2, 13] = 0.6, 0.4  # mostly in its second
    attention[3, 12], attention[3, 13] = 0.4, 0.6  # mostly behind it
    states = TokenStates(torch.arange(8.0).view(4, 2), attention)
    hidden, alignment = targets_of_crop(states, 2400, 3840, RATE)
    torch.testing.assert_close(hidden, states.hidden[1:3])
    torch.testing.assert_close(alignment, torch.tensor([[0.25, 0.75], [0.0, 1.0]]))
    # 10 ms later, positions 5 and 9 lie half in the first frame.
    moved, alignment = targets_of_crop(states, 2640, 3600, RATE)
    torch.testing.assert_close(moved, states.hidden[1:3])
    torch.testing.assert_close(alignment[0], torch.tensor([0.5 / 0.875, 0.375 / 0.875]))


# --- states that are kept


class Counted:
    """A teacher that counts the clips it is asked for, and their seconds and words."""

    def __init__(self, teacher):
        self.teacher, self.name, self.asked = teacher, "tiny", []

    def states(self, waves, rate, lengths, transcripts, languages):
        self.asked += [(round(int(n) / rate, 2), text) for n, text in zip(lengths, transcripts, strict=True)]
        return self.teacher.states(waves, rate, lengths, transcripts, languages)


def speech(folder, seconds, text):
    """Two speakers of one recording each, the first with a transcript."""
    for i in range(2):
        (folder / f"speaker{i}").mkdir(parents=True)
        waves, _ = clips(seconds)
        write_audio(folder / f"speaker{i}" / "a.flac", Audio(waves[0].numpy() * (1 + i) / 2, RATE))
    (folder / "speaker0" / "a.txt").write_text(text)
    return find_sources([str(folder)], cache=folder / "cache", workers=0)


def batches(sources, seconds):
    return ClipBatches(ClipSampler(sources, seconds=seconds, batch=2, seed=0), RATE, workers=0)


def distiller(teacher, folder, limit=1e9):
    torch.manual_seed(0)
    counted = Counted(teacher)
    return counted, Distiller(counted, AsrDistillation(4, teacher.width), RATE, StatesCache(folder, limit))


def latents(samples):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, -(-samples // 1920), 4, generator=rng)


def test_whole_clips_teach_the_same_as_without_a_cache_and_are_computed_once(teacher, tmp_path):
    sources = speech(tmp_path / "speech", 0.5, "abc")
    counted, distill = distiller(teacher, tmp_path / "states")
    with batches(sources, 0.64) as drawn:
        batch = next(drawn).fitted(15360)
        targets = teacher.targets(batch.waveforms, RATE, batch.lengths, batch.transcripts, batch.languages)
        wanted = float(distill.distillation(latents(15360), targets).detach())
        first = float(distill(latents(15360), batch).detach())
        assert first == pytest.approx(wanted, abs=2e-3)  # float16
        for _ in range(6):
            distill(latents(15360), next(drawn).fitted(15360))
        assert set(counted.asked) == {(0.5, "abc"), (0.5, None)}
        assert len(counted.asked) == 2
        again, fresh = distiller(teacher, tmp_path / "states")
        assert float(fresh(latents(15360), batch).detach()) == first
        assert again.asked == []  # another process finds them
        for file in (tmp_path / "states").rglob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1])
        assert float(fresh(latents(15360), batch).detach()) == first
        assert len(again.asked) == len(set(batch.ids))  # damaged: computed again


def test_crops_are_taught_from_the_states_of_their_whole_clip_and_its_words(teacher, tmp_path):
    sources = speech(tmp_path / "speech", 2.0, "abcdefghij")
    counted, distill = distiller(teacher, tmp_path / "states")
    with batches(sources, 0.64) as drawn:
        starts = []
        for _ in range(6):
            batch = next(drawn).fitted(15360)
            starts += batch.starts
            assert math.isfinite(float(distill(latents(15360), batch).detach()))
    assert len(set(starts)) > 4
    assert set(counted.asked) == {(2.0, "abcdefghij"), (2.0, None)}
    assert len(counted.asked) == 2


def test_of_long_recordings_windows_are_kept_that_hold_every_crop(teacher, tmp_path):
    sources = speech(tmp_path / "speech", 35.0, "abc")
    counted, distill = distiller(teacher, tmp_path / "states")
    with batches(sources, 0.64) as drawn:
        for _ in range(4):
            distill(latents(15360), next(drawn).fitted(15360))
    assert {asked for asked in counted.asked} == {(30.0, None)}  # its words are not those of a window
    assert 2 <= len(counted.asked) <= 4  # two windows of two recordings


def test_no_more_states_are_kept_than_was_allowed_and_the_rest_is_taught_all_the_same(teacher, tmp_path):
    sources = speech(tmp_path / "speech", 0.5, "abc")
    counted, distill = distiller(teacher, tmp_path / "none", limit=100)
    _, kept = distiller(teacher, tmp_path / "states")
    with batches(sources, 0.64) as drawn:
        batch = next(drawn).fitted(15360)
        wanted = float(kept(latents(15360), batch).detach())
        for _ in range(2):
            assert float(distill(latents(15360), batch).detach()) == wanted
    assert len(counted.asked) == 4  # every time
    assert not (tmp_path / "none").exists()


def test_what_whisper_cannot_hear_at_once_is_refused_before_anything_is_prepared():
    with pytest.raises(ValueError, match="seconds is at most 28"):
        EncoderTraining(whisper="w", weights={"distillation": 1.0}, seconds=29.0)


def test_uniform_attention_weighs_frames_by_how_many_positions_they_hold(folder):
    blind = WhisperTeacher.load(str(folder))
    for layer in blind._model.model.decoder.layers:  # no query sees any key: the softmax is uniform
        layer.encoder_attn.q_proj.weight.zero_()
        layer.encoder_attn.q_proj.bias.zero_()
    waves, lengths = clips(0.1)
    found = blind.targets(waves, RATE, lengths, ["abc"])
    torch.testing.assert_close(found.alignment[0], torch.tensor([[0.8, 0.2]]).expand(4, 2))


# --- the teacher


def heard_as(folder, wave):
    """The mel features of a clip `[samples]`, by transformers; the resampler has its own test."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    samples = Resampler(RATE, 16000)(torch.from_numpy(wave)).numpy()
    return extractor(samples, sampling_rate=16000, return_tensors="pt").input_features


def expected_targets(folder, wave, ids, heads, prompt):
    """One clip through transformers alone, with loops: hidden states and alignment of its tokens."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    features = heard_as(folder, wave)
    with torch.no_grad():
        out = model(
            features, decoder_input_ids=torch.tensor([[*prompt, *ids]]), output_attentions=True,
            output_hidden_states=True,
        )  # fmt: skip
        logits = model.proj_out(out.decoder_hidden_states[-1])
    torch.testing.assert_close(logits, out.logits)  # so these are the states that logits are made of
    positions, frames = math.ceil(len(wave) / RATE * 50), math.ceil(len(wave) / 1920)
    hidden = out.decoder_hidden_states[-1][0, len(prompt) - 1 : len(prompt) - 1 + len(ids)]
    alignment = np.zeros((len(ids), frames))
    for token in range(len(ids)):
        for position in range(positions):
            for layer, head in heads:
                weight = float(out.cross_attentions[layer][0, head, len(prompt) - 1 + token, position])
                alignment[token, position // 4] += weight
        alignment[token] /= alignment[token].sum()
    return hidden, torch.from_numpy(alignment).float()


def test_targets_equal_transformers_own_states_and_the_named_heads_attention(folder, teacher):
    waves, lengths = clips(0.5, 0.71)
    found = teacher.targets(waves, RATE, lengths, ["abcd", "HELLO"])
    start, silent = 28, 29
    for i, text in enumerate(["Ġabcd", "Ġhello"]):
        ids = [LETTERS.index(letter) for letter in text]
        hidden, alignment = expected_targets(
            folder, waves[i, : lengths[i]].numpy(), ids, [(0, 1), (1, 0)], [start, silent]
        )
        torch.testing.assert_close(found.hidden[i], hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.alignment[i], alignment, atol=1e-4, rtol=1e-4)
    assert found.alignment[0].shape == (5, 7)
    assert found.alignment[1].shape == (6, 9)


def test_a_multilingual_teacher_is_told_or_finds_the_language_and_uses_the_last_layers_heads(multilingual):
    teacher = WhisperTeacher.load(str(multilingual))
    waves, lengths = clips(0.4, 0.4)
    wave = waves[0].numpy()
    ids = [LETTERS.index(letter) for letter in "Ġab"]
    told = teacher.targets(waves, RATE, lengths, ["ab", "ab"], languages=["de", "en"])
    model = transformers.WhisperForConditionalGeneration.from_pretrained(multilingual)
    for i, language in enumerate(("<|de|>", "<|en|>")):
        prompt = [IDS[t] for t in ("<|startoftranscript|>", language, "<|transcribe|>", "<|notimestamps|>")]
        hidden, alignment = expected_targets(multilingual, waves[i].numpy(), ids, [(1, 0), (1, 1)], prompt)
        torch.testing.assert_close(told.hidden[i], hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(told.alignment[i], alignment, atol=1e-4, rtol=1e-4)
    features = heard_as(multilingual, wave)
    found = int(model.detect_language(features)[0])
    left = teacher.targets(waves[:1], RATE, lengths[:1], ["ab"])
    asked = teacher.targets(
        waves[:1], RATE, lengths[:1], ["ab"], languages=[SPECIALS[found - len(LETTERS)].strip("<|>")]
    )
    torch.testing.assert_close(left.hidden[0], asked.hidden[0])
    with pytest.raises(TrainingError, match="does not know the language 'xx'; it knows de, en"):
        teacher.targets(waves, RATE, lengths, ["ab", "ab"], languages=["xx", None])


def test_a_clips_targets_do_not_depend_on_padding_or_on_other_clips(teacher):
    waves, lengths = clips(0.33, 0.9, 0.5)
    waves[0, lengths[0] :] = 5.0  # whatever lies there
    texts = ["ab", "a longer text here", None]
    together = teacher.targets(waves, RATE, lengths, texts)
    for i, n in enumerate(lengths):
        alone = teacher.targets(waves[i : i + 1, :n], RATE, lengths[i : i + 1], texts[i : i + 1])
        torch.testing.assert_close(together.hidden[i], alone.hidden[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.alignment[i], alone.alignment[0], atol=1e-5, rtol=1e-4)


def test_a_clip_without_transcript_is_heard_by_the_teacher(folder):
    teacher = WhisperTeacher.load(str(folder))
    waves, lengths = clips(0.5)
    features = heard_as(folder, waves[0].numpy())
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    generated = [i for i in model.generate(features)[0].tolist() if i < 27]
    assert generated  # random weights babble letters
    found = teacher.targets(waves, RATE, lengths, [None])
    hidden, _ = expected_targets(folder, waves[0].numpy(), generated, [(0, 1)], [28, 29])
    torch.testing.assert_close(found.hidden[0], hidden, atol=1e-4, rtol=1e-4)


def test_special_tokens_are_in_no_target_and_a_clip_without_words_has_none(teacher):
    waves, lengths = clips(0.3, 0.3)
    found = teacher.targets(waves, RATE, lengths, ["ab<|endoftext|>", "  "])
    assert [len(h) for h in found.hidden] == [3, 0]  # the space before the word is a token here
    assert found.alignment[1].shape == (0, 4)


def test_a_text_longer_than_the_decoder_is_cut_where_it_ends(teacher):
    waves, lengths = clips(0.3)
    found = teacher.targets(waves, RATE, lengths, ["abcdefghijklmnopqrstuvwxyz"])
    short = teacher.targets(waves, RATE, lengths, ["abcdefgh"])
    assert len(found.hidden[0]) == 24 - 2
    torch.testing.assert_close(found.hidden[0][:9], short.hidden[0])


def test_what_cannot_be_heard_is_a_sentence(teacher):
    waves = torch.zeros(1, 31 * RATE)
    with pytest.raises(TrainingError, match=r"31\.0 s cannot be distilled: Whisper takes 30 s"):
        teacher.targets(waves, RATE, torch.tensor([31 * RATE]), ["a"])
    with pytest.raises(TrainingError, match="not a whole number of samples"):
        teacher.targets(waves, 22051, torch.tensor([100]), ["a"])


def test_pickled_weights_and_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(TrainingError, match="name the folder or hub id of a Whisper"):
        WhisperTeacher.load(str(tmp_path))
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TrainingError, match="cannot be loaded as a Whisper"):
        WhisperTeacher.load(str(tmp_path))


def test_alignment_heads_of_another_model_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="alignment heads that this Whisper of 2 layers of 2 heads"):
        WhisperTeacher.load(str(save_whisper(tmp_path, heads=((5, 0),))))


# --- the loss


def by_hand():
    """Two frames, two tokens, identity projection: cosines that can be worked out on paper."""
    latents = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    alignment = [torch.tensor([[1.0, 0.0], [0.5, 0.5]])]
    hidden = [torch.tensor([[3.0, 4.0], [0.0, -2.0]])]
    # token 1: (1, 0) with (3, 4): 0.6; token 2: (0.5, 0.5) with (0, -2): -1/sqrt(2)
    return latents, DistillTargets(hidden, alignment), 1 - (0.6 - 1 / math.sqrt(2)) / 2


def identity_loss():
    loss = AsrDistillation(2, 2)
    with torch.no_grad():
        loss.projection.weight.copy_(torch.eye(2))
    return loss


def test_the_loss_is_one_minus_the_mean_cosine_worked_out_by_hand():
    latents, targets, expected = by_hand()
    assert math.isclose(float(identity_loss()(latents, targets).detach()), expected, rel_tol=1e-6)


def test_padding_and_other_clips_do_not_change_a_clips_value_and_the_batch_is_their_mean():
    latents, targets, expected = by_hand()
    batch = torch.full((3, 3, 2), 7.0)
    batch[0, :2], batch[1] = latents[0], torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    both = DistillTargets(
        [targets.hidden[0], torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.zeros(0, 2)],
        [
            targets.alignment[0],
            torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
            torch.zeros(0, 3),
        ],
    )
    for i, value in enumerate((expected, 1 / 3, 0.0)):
        one = DistillTargets(both.hidden[i : i + 1], both.alignment[i : i + 1])
        assert float(identity_loss()(batch[i : i + 1], one).detach()) == pytest.approx(value)
    # The third clip has no words: it is in no mean.
    mean = identity_loss()(batch, both)
    assert math.isclose(float(mean.detach()), (expected + 1 / 3) / 2, rel_tol=1e-6)


def test_gradient_reaches_latents_and_projection_and_never_the_teacher(folder):
    teacher = WhisperTeacher.load(str(folder))
    waves, lengths = clips(0.5, 0.3)
    waves.requires_grad_(True)
    targets = teacher.targets(waves, RATE, lengths, ["abc", "d"])
    assert not any(t.requires_grad for t in (*targets.hidden, *targets.alignment))
    assert not any(p.requires_grad for p in teacher._model.parameters())
    assert not teacher._model.training
    loss = AsrDistillation(4, teacher.width)
    latents = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    loss(latents, targets).backward()
    assert waves.grad is None
    assert (latents.grad[0].abs().sum(1) > 0).all()
    assert (latents.grad[1, 4:] == 0).all()
    assert float(loss.projection.weight.grad.abs().sum()) > 0
    assert set(loss.state_dict()) == {"projection.weight"}


def test_training_the_projection_alone_brings_the_loss_down(teacher):
    waves, lengths = clips(0.5, 0.3)
    targets = teacher.targets(waves, RATE, lengths, ["abc", "d"])
    torch.manual_seed(0)
    loss, latents = AsrDistillation(8, teacher.width), torch.randn(2, 7, 8)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(latents, targets)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.3 < 0.6 < values[0]


def test_a_batch_without_words_gives_zero_and_a_graph_for_every_process():
    loss = AsrDistillation(3, 2)
    empty = DistillTargets([torch.zeros(0, 2)], [torch.zeros(0, 4)])
    value = loss(torch.randn(1, 4, 3), empty)
    value.backward()
    assert float(value.detach()) == 0
    assert (loss.projection.weight.grad == 0).all()


def test_latents_of_other_lengths_than_the_targets_are_refused():
    latents, targets, _ = by_hand()
    with pytest.raises(TrainingError, match=r"1 clips of 1 frames do not fit targets of \[2\]"):
        identity_loss()(latents[:, :1], targets)
