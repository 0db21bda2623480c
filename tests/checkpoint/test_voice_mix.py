from __future__ import annotations

import pytest
import torch

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.voice_mix import mix_codes, parse_weights


def codes(seed: int, frames: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    semantic = torch.randint(500, (1, frames), generator=generator)
    return torch.cat((semantic, torch.randint(low, high, (36, frames), generator=generator)))


def test_a_mix_has_the_statistics_between_its_voices_and_the_frames_of_the_heaviest():
    voices = {"low": codes(0, 400, 2, 7), "high": codes(1, 300, 10, 19)}
    mixed = mix_codes(voices, {"low": 0.75, "high": 0.25}, 21)
    torch.testing.assert_close(mixed[0], voices["low"][0])
    # Uniform levels 2 to 6 (mean 4, variance 2) and 10 to 18 (mean 14, variance 80/12).
    acoustic = mixed[1:].double()
    assert float(acoustic.mean()) == pytest.approx(0.75 * 4 + 0.25 * 14, abs=0.1)
    expected = 0.75 * 2**0.5 + 0.25 * (80 / 12) ** 0.5
    assert float(acoustic.std(1).mean()) == pytest.approx(expected, abs=0.15)


def test_nearly_all_of_one_voice_is_that_voice_and_levels_stay_in_range():
    voices = {"a": codes(0, 50, 0, 21), "b": codes(1, 60, 15, 21)}
    torch.testing.assert_close(mix_codes(voices, {"a": 1 - 1e-9, "b": 1e-9}, 21), voices["a"])
    mixed = mix_codes(voices, {"a": 0.5, "b": 0.5}, 21)
    assert mixed.shape == (37, 50)
    assert int(mixed[1:].min()) >= 0
    assert int(mixed[1:].max()) <= 20


def test_a_codebook_that_never_moves_moves_as_a_whole():
    still = torch.cat((torch.zeros(1, 10), torch.full((36, 10), 4.0))).long()
    lively = codes(3, 100, 0, 21)
    assert mix_codes({"a": still, "b": lively}, {"a": 0.9, "b": 0.1}, 21)[1:].unique(dim=1).shape[1] == 1


def test_weights_add_up_to_one_and_mistakes_are_told():
    assert parse_weights(["a=3", "b=1"]) == {"a": 0.75, "b": 0.25}
    for parts, sentence in (
        (["a=1"], "two voices"),
        (["a", "b=1"], "not a voice and its weight"),
        (["a=0", "b=1"], "not a voice and its weight"),
        (["a=nan", "b=1"], "not a voice and its weight"),
        (["a=inf", "b=1"], "not a voice and its weight"),
        (["a=1", "a=2"], "given twice"),
    ):
        with pytest.raises(VoiceError, match=sentence):
            parse_weights(parts)
