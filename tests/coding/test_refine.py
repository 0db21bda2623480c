"""Refinement: it begins at the encoder's codes, is judged as the search is, and the best codes are kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from revox.checkpoint.load import load_model
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.encode import Encoded
from revox.coding.find import MODEL_PARTS
from revox.coding.invert import InversionConfig, invert
from revox.coding.presets import preset_codes
from revox.coding.prior import CodePrior
from revox.coding.refine import Score, Scorer, posterior_of, refinement
from revox.coding.regularizers import Regularizers
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.model.codec import Codec
from revox.speech import normalize_loudness, read_audio

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = InversionConfig(scales=((512, 80), (1024, 160)))
LAB_ENCODER = Path(__file__).parents[2] / "lab" / "reference-encoder" / "encoder.safetensors"
CLIP = "1034-121119-0000.flac"


@pytest.fixture(scope="module")
def codec(tiny_checkpoint_with_encoder: Path) -> Codec:
    return load_model(tiny_checkpoint_with_encoder, dtype=torch.float32, parts=MODEL_PARTS).audio_tokenizer


def drawn(codec: Codec, frames: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    semantic = torch.randint(codec.config.semantic_codebook_size, (1, frames), generator=generator)
    acoustic = torch.randint(21, (36, frames), generator=generator)
    return torch.cat((semantic, acoustic))


def said(codec: Codec, codes: Tensor) -> Encoded:
    """An encoder's answer whose latents lie on the codes."""
    latents = codec.quantizer.decode(codes[None])[0]
    dim = codec.config.semantic_dim
    return Encoded(codes, torch.cat((latents[:dim], torch.atanh(latents[dim:].clamp(-0.99, 0.99)))))


def coder_with(codec: Codec, answer: Encoded) -> Coder:
    """A checkpoint whose encoder gives this answer to everything."""
    coder = Coder(codec)
    coder.encode = lambda samples, as_served=True: answer  # type: ignore[method-assign]
    return coder


def test_the_score_of_codes_is_what_the_search_itself_says_of_them(
    codec: Codec, tiny_preset_codes: dict[str, Tensor]
):
    def guidance(probabilities: Tensor, values: Tensor) -> Tensor:
        return probabilities[:, 7].sum() + values.square().mean()

    target = codec.decode(drawn(codec, 8, 1)[None])[0]
    prior = CodePrior.from_codes(list(tiny_preset_codes.values()), codec)
    posterior = posterior_of(codec, said(codec, drawn(codec, 8, 2)))
    terms = Regularizers(prior, posterior, guidance)
    config = dataclasses.replace(QUICK, steps=4, local_search_rounds=1, guidance_every=1)
    result = invert(codec, target, config=config, regularizers=terms)
    scorer = Scorer(codec, target, config, terms)
    assert scorer.score(result.codes).total == pytest.approx(result.loss, rel=1e-5)
    start = scorer.score(posterior.codes(21))
    assert start.total == pytest.approx(result.losses[0], rel=1e-5)
    # Every part is there: each of them changes the sum by its own weight.
    assert min(start.presets, start.encoder, start.language_model) > 0
    parts = {"prior": "presets", "posterior": "encoder", "guidance": "language_model"}
    for name, field in parts.items():
        twice = dataclasses.replace(config, **{f"{name}_weight": 2 * getattr(config, f"{name}_weight")})
        again = Scorer(codec, target, twice, terms).score(posterior.codes(21))
        assert getattr(again, field) == pytest.approx(2 * getattr(start, field), rel=1e-5)
        assert again.total == pytest.approx(start.total + getattr(start, field), rel=1e-5)


def test_the_search_begins_at_exactly_the_served_codes_even_where_float32_would_decide_otherwise(
    codec: Codec,
):
    codes = drawn(codec, 12, 3)
    # Latents of other codes altogether: as far from the served ones as rounding could ever be, and farther.
    far = Encoded(codes, said(codec, drawn(codec, 12, 4)).latents)
    assert torch.equal(posterior_of(codec, far).codes(21), codes)
    near = posterior_of(codec, said(codec, codes))
    assert torch.equal(near.codes(21), codes)
    assert torch.allclose(near.log_probabilities.exp().sum(dim=1), torch.ones(12))
    ends = codes.clone()
    ends[1:] = torch.arange(12)[None] % 2 * 20  # the outermost levels
    assert torch.equal(posterior_of(codec, said(codec, ends)).codes(21), ends)


def test_codes_that_are_right_already_are_kept_as_the_encoders(codec: Codec):
    codes = drawn(codec, 6, 5)
    target = codec.decode(codes[None])[0]
    coder = coder_with(codec, said(codec, codes))
    found = find_codes(coder, target, CodingSettings("encoder", refine=3, inversion=QUICK))
    assert found.method == "encoder"
    assert torch.equal(found.codes, codes)
    assert found.scores["encoder"].reconstruction == pytest.approx(0, abs=1e-5)
    assert found.searches["refined"].steps == 3


def test_the_best_of_all_is_kept_whoever_found_it(codec: Codec):
    true, wrong = drawn(codec, 6, 6), drawn(codec, 6, 7)
    target = codec.decode(true[None])[0]
    coder = coder_with(codec, said(codec, wrong))
    found = find_codes(coder, target, CodingSettings("best", refine=3, steps=3, inversion=QUICK))
    totals = {name: score.total for name, score in found.scores.items()}
    assert set(totals) == {"encoder", "refined", "inversion"}
    assert found.method == min(totals, key=lambda name: totals[name])
    assert totals[found.method] <= totals["encoder"]
    free = dataclasses.replace(QUICK, posterior_weight=0.0)  # only the sound counts: the true codes are best
    scorer = Scorer(codec, target, free, Regularizers())
    assert scorer.best_of({"encoder": wrong, "refined": found.codes, "inversion": true})[0] == "inversion"


def test_better_sound_does_not_win_over_codes_that_the_model_refuses(codec: Codec):
    true, wrong = drawn(codec, 6, 6), drawn(codec, 6, 7)
    target = codec.decode(true[None])[0]

    def refusing(probabilities: Tensor, values: Tensor) -> Tensor:
        return 1000 * probabilities[torch.arange(6), true[0]].mean()

    free = dataclasses.replace(QUICK, posterior_weight=0.0)
    scorer = Scorer(codec, target, free, Regularizers(guidance=refusing))
    kept, scores = scorer.best_of({"encoder": wrong, "inversion": true})
    assert scores["inversion"].reconstruction < scores["encoder"].reconstruction
    assert kept == "encoder"


def test_a_refinement_that_is_stopped_is_no_worse_than_the_encoder(codec: Codec):
    true, wrong = drawn(codec, 6, 8), drawn(codec, 6, 9)
    coder = coder_with(codec, said(codec, wrong))
    settings = CodingSettings("encoder", refine=50, inversion=QUICK)
    found = find_codes(coder, codec.decode(true[None])[0], settings, should_stop=lambda: True)
    assert found.stopped
    assert found.searches["refined"].steps == 1
    assert found.scores[found.method].total <= found.scores["encoder"].total


def test_a_score_adds_up():
    score = Score(0.5, 0.25, 0.125, 1.0)
    assert score.regularization == 1.375
    assert score.total == 1.875
    assert score.to_json() == {
        "reconstruction": 0.5, "presets": 0.25, "encoder": 0.125, "language_model": 1.0, "total": 1.875,
    }  # fmt: skip


def test_in_the_lab_a_few_steps_improve_the_true_encoders_codes_and_beat_as_many_of_inversion():
    folder = checkpoint_folder()
    codec = original_codec(folder, LAB_ENCODER)
    model = load_model(folder, dtype=torch.float32, parts=MODEL_PARTS)
    presets = preset_codes(folder, model, max_frames=120)
    coder, prior = Coder(codec, presets), CodePrior.from_codes(presets, codec)
    clip = read_audio(folder.parent / "examples" / CLIP, rate=24000, max_seconds=4.0).samples
    target = torch.from_numpy(normalize_loudness(clip, 24000))[24000 : 24000 + 20 * 1920].clone()
    found = find_codes(coder, target, CodingSettings("encoder", refine=6))
    assert found.method == "refined"
    encoder, refined = found.scores["encoder"], found.scores["refined"]
    assert refined.total < 0.99 * encoder.total
    assert refined.reconstruction < encoder.reconstruction
    plain = invert(codec, target, config=refinement(6), regularizers=Regularizers(prior))
    terms = Regularizers(prior, posterior_of(codec, coder.encode(target)))
    assert refined.total < Scorer(codec, target, InversionConfig(), terms).score(plain.codes).total
