"""The scorer, scored: original, decoded, a wrong speaker and noise come out in this order, on 20 speakers.

The speakers are the lab's presets as its decoder says them; "decoded" is such a sound by MP3 in a narrow
band, so that the test does not hang on how good the lab's own codec is.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from revox.checkpoint.load import load_model
from revox.coding.find import MODEL_PARTS
from revox.coding.presets import preset_codes
from revox.demo import checkpoint_folder
from revox.evaluation.clips import Clip
from revox.evaluation.measured import NOISE, RECORDING, WRONG_SPEAKER, add_ranks
from revox.evaluation.subject import noise_like
from revox.evaluation.tables import Column, make_row
from revox.losses.spectral import mel_distance, multi_resolution_stft_loss
from revox.metrics.perceptual import estoi
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio, encode_audio, normalize_loudness, read_audio

FRAMES = 38  # 3 s
ROWS = (RECORDING, "decoded", WRONG_SPEAKER, NOISE)


@pytest.fixture(scope="module")
def speakers():
    """20 voices, 3 s each at most."""
    folder = checkpoint_folder()
    model = load_model(folder, dtype=torch.float32, parts=MODEL_PARTS)
    found = {}
    for i, codes in enumerate(preset_codes(folder, model)):
        samples = model.audio_tokenizer.decode(codes[None, :, :FRAMES])[0].numpy()
        found[f"preset {i}"] = Audio(normalize_loudness(samples, 24000), 24000)
    assert len(found) == 20
    return found


def through_mp3(audio):
    """Down to 16 kHz and MP3 there. (At 8 kHz the empty band alone would cost as much STFT distance as a
    wrong speaker.)"""
    narrow, _ = encode_audio(audio.at(16000), "mp3")
    samples = read_audio(narrow, rate=24000).samples[: len(audio.samples)]
    return Audio(np.pad(samples, (0, len(audio.samples) - len(samples))), 24000)


@pytest.fixture(scope="module")
def rows(speakers):
    judge = SpeakerVerifier()
    names, records = list(speakers), []
    for i, name in enumerate(names):
        reference = speakers[name]
        middle = len(reference.samples) // 2
        first, second = (Audio(reference.samples[s], 24000) for s in (slice(middle), slice(middle, None)))
        sounds = {
            RECORDING: reference,
            "decoded": through_mp3(reference),
            WRONG_SPEAKER: speakers[names[(i + 1) % 20]],
            NOISE: noise_like(reference, 0),
        }
        scores = {}
        for row, sound in sounds.items():
            length = min(len(sound.samples), len(reference.samples))
            x, y = (torch.from_numpy(a.samples[:length].copy()) for a in (sound, reference))
            scores[row] = {
                "mel": mel_distance(x, y, 24000),
                "stft": float(multi_resolution_stft_loss(x, y, 24000)),
                "estoi": estoi(reference, sound),
                "voice": judge.embed(second if row == RECORDING else sound),
            }
        records.append(
            (
                Clip(checkpoint_folder(), name, name),
                {
                    "rows": {row: [one] for row, one in scores.items()},
                    "voice": judge.embed(reference),
                    "first_half": judge.embed(first),
                },
            )
        )
    assert add_ranks(records) == 20
    columns = [Column(key, key) for key in ("mel", "stft", "estoi", "similarity", "rank")]
    return {row: make_row(row, "", [r["rows"][row] for _, r in records], columns).cells for row in ROWS}


@pytest.mark.parametrize(("figure", "better"), [("mel", 1), ("stft", 1), ("estoi", -1)])
def test_original_decoded_wrong_speaker_and_noise_come_in_this_order(rows, figure, better):
    values = [better * rows[row][figure].value for row in ROWS]
    assert values == sorted(values), {row: rows[row][figure].value for row in ROWS}
    # And the intervals of original, decoded and the floors do not touch.
    assert better * rows["decoded"][figure].value > better * rows[RECORDING][figure].value
    high = max(better * x for x in (rows["decoded"][figure].low, rows["decoded"][figure].high))
    for floor in (WRONG_SPEAKER, NOISE):
        assert high < min(better * x for x in (rows[floor][figure].low, rows[floor][figure].high))


def test_the_speaker_judge_tells_the_own_voice_from_a_wrong_one_and_from_noise(rows):
    similarity = {row: rows[row]["similarity"].value for row in ROWS}
    assert min(similarity[RECORDING], similarity["decoded"]) > similarity[WRONG_SPEAKER] > similarity[NOISE]
    assert rows["decoded"]["rank"].value < rows[WRONG_SPEAKER]["rank"].value
