"""Which methods a request means, and what presets a checkpoint has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from revox.checkpoint.load import load_model
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.errors import CodingError
from revox.coding.find import MODEL_PARTS
from revox.coding.invert import InversionConfig
from revox.coding.presets import preset_codes
from revox.model.codec import Codec
from revox.model.voxtral import Voxtral

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Voxtral:
    return load_model(tiny_checkpoint, dtype=torch.float32, parts=MODEL_PARTS)


@pytest.fixture(scope="module")
def codec(tiny_checkpoint_with_encoder: Path) -> Codec:
    return load_model(tiny_checkpoint_with_encoder, dtype=torch.float32, parts=MODEL_PARTS).audio_tokenizer


def test_the_codes_of_all_presets_are_recovered(
    tiny_checkpoint: Path, model: Voxtral, tiny_preset_codes: dict[str, Tensor]
):
    presets = preset_codes(tiny_checkpoint, model)
    assert len(presets) == 20
    for found, true in zip(presets, tiny_preset_codes.values(), strict=True):
        assert torch.equal(found, true)


def test_presets_beyond_the_limit_are_left_out(tiny_checkpoint: Path, model: Voxtral):
    # 10, 11, 12 frames ...: the third passes 25.
    assert [c.shape[1] for c in preset_codes(tiny_checkpoint, model, max_frames=25)] == [10, 11, 12]


def test_a_stop_while_presets_are_looked_up_keeps_no_part_of_them(model: Voxtral):
    looked: list[int] = []

    def find(should_stop):
        for i in range(3):
            if should_stop is not None and should_stop():
                raise CodingError("stopped")
            looked.append(i)
        return [torch.zeros(37, 2, dtype=torch.long)]

    coder = Coder(model.audio_tokenizer, find)
    with pytest.raises(CodingError, match="stopped"):
        coder.preset_codes(lambda: len(looked) >= 2)
    assert len(looked) == 2
    assert len(coder.preset_codes()) == 1
    assert len(looked) == 5
    coder.preset_codes()
    assert len(looked) == 5


@pytest.mark.parametrize(
    ("has_encoder", "settings", "ways"),
    [
        (False, {}, ("inversion",)),
        (False, {"method": "best", "steps": 3}, ("inversion",)),
        (True, {}, ("encoder",)),
        (True, {"method": "encoder", "refine": 4, "budget": 1.0}, ("encoder", "refined")),
        (True, {"method": "inversion", "steps": 3, "budget": 1.0}, ("inversion",)),
        (True, {"method": "best", "steps": 3}, ("encoder", "inversion")),
        (True, {"method": "best", "refine": 4}, ("encoder", "refined", "inversion")),
    ],
)
def test_the_method_and_what_the_checkpoint_has_decide_whose_codes_there_are(has_encoder, settings, ways):
    assert CodingSettings(**settings).ways(has_encoder) == ways


@pytest.mark.parametrize(
    ("has_encoder", "settings", "ways"),
    [
        (False, {}, ("student",)),
        (False, {"refine": 4, "budget": 1.0}, ("student", "refined")),
        (False, {"method": "inversion", "steps": 3}, ("inversion",)),
        (False, {"method": "best", "refine": 4, "steps": 3}, ("student", "refined", "inversion")),
        (True, {}, ("encoder",)),
        (True, {"method": "student", "refine": 4}, ("student", "refined")),
        (True, {"method": "best"}, ("encoder", "inversion")),
    ],
)
def test_a_trained_student_takes_the_place_of_a_missing_encoder(has_encoder, settings, ways):
    assert CodingSettings(**settings).ways(has_encoder, has_student=True) == ways


@pytest.mark.parametrize(
    ("has_encoder", "settings", "sentence"),
    [
        (True, {"method": "magic"}, "no method 'magic'"),
        (True, {"refine": -1}, "-1 steps"),
        (False, {"method": "encoder"}, "no whole encoder"),
        (False, {"refine": 5}, "this checkpoint has neither: leave it out"),
        (False, {"method": "student"}, "train it once with `revox train student"),
        (True, {"method": "inversion", "refine": 5}, "the method is inversion: leave it out"),
        (True, {"steps": 5}, "--steps is for inversion"),
        (True, {"budget": 5.0}, "--budget limits nothing"),
        (True, {"budget": 0.0}, "a budget of 0 s"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(has_encoder, settings, sentence):
    with pytest.raises(CodingError, match=sentence):
        CodingSettings(**settings).ways(has_encoder)


def test_fewer_steps_shorten_the_local_search_in_proportion_unless_it_is_set():
    assert CodingSettings().search(1) == InversionConfig()
    assert CodingSettings(steps=40).search(1).local_search_rounds == 3  # 12 * 40 / 160
    assert CodingSettings(steps=40, local_search=7).search(1).local_search_rounds == 7
    assert CodingSettings(budget=6.0).search(2).seconds == 3.0
    for refine, options, rounds in ((20, {}, 2), (10, {"local_search": 8}, 8), (10, {"steps": 320}, 1)):
        settings = CodingSettings("best", refine, **options).search(2, refining=True)
        assert (settings.steps, settings.local_search_rounds) == (refine, rounds)


def test_what_changes_an_encoders_codes_is_in_its_record(codec: Codec):
    coder, clip = Coder(codec), torch.zeros(1920 * 2)
    coder.beam_search = lambda transcript, posterior, beam: posterior.codes(21)  # type: ignore[method-assign]
    assert find_codes(coder, clip, CodingSettings(beam=3)).record() == {}  # without words there is no beam
    assert find_codes(coder, clip, CodingSettings(beam=3), transcript="ten").record() == {"beam": 3}
    exact = CodingSettings("encoder", as_served=False)
    assert find_codes(coder, clip, exact).record() == {"as_served": False}


@pytest.mark.parametrize("settings", [{"method": "inversion", "steps": 0}, {"refine": 1}, {}])
def test_a_partial_last_frame_is_completed(codec: Codec, settings: dict):
    clip = 0.1 * torch.randn(1920 * 2 + 1, generator=torch.Generator().manual_seed(0))
    assert find_codes(Coder(codec), clip, CodingSettings(**settings)).codes.shape == (37, 3)


def test_exact_codes_are_those_of_the_float32_encoder(codec: Codec):
    clip = torch.randn(1920 * 40, generator=torch.Generator().manual_seed(0)) * 0.1
    coder = Coder(codec)
    exact = find_codes(coder, clip, CodingSettings("encoder", as_served=False)).codes
    served = find_codes(coder, clip, CodingSettings("encoder")).codes
    assert torch.equal(exact, codec.encode(clip[None])[0])
    assert not torch.equal(exact, served)
    assert codec.output_proj.conv.weight.dtype == torch.float32  # the served one is a copy
