"""The teacher codec: its codebook, what its acoustic values cost, and that its run resumes exactly."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab.data import LabUtterance
from lab.frames import FrameFeatures, FrameSet
from lab.semantic import SemanticNetwork, SemanticTraining
from lab.teacher_codec import (
    KNOWN_FRAMES,
    TeacherCodec,
    TeacherCodecTrainer,
    TeacherCodecTraining,
    TeacherData,
    _batch,
    acoustic_bits,
    foreseen_values,
)
from revox.model.config import CodecConfig

CONFIG = CodecConfig(semantic_codebook_size=16, semantic_dim=8)
SIZE = FrameFeatures(CONFIG).size
SETTINGS = TeacherCodecTraining(steps=8, batch=4, frames=6, width=16, blocks=1, warmup=1, decay_steps=2)
SEMANTIC = SemanticNetwork(4, 12, 8, 16, SemanticTraining(width=8))
SEMANTIC.rows.copy_(torch.randn(16, 8, generator=torch.Generator().manual_seed(3)))
SEMANTIC.distance.fill_(3.0)


def data(seed, count=6):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(9, 20, count)
    speech = SimpleNamespace(
        utterances=[
            LabUtterance(f"s{i % 2}", "F", None, "x", 0, int(n) * 1920) for i, n in enumerate(lengths)
        ]
    )
    total = lengths.sum()
    frames = FrameSet(speech, rng.standard_normal((total, SIZE)).astype(np.float16), 1920)
    return TeacherData(frames, rng.integers(0, 16, total).astype(np.int16))


TRAIN = {"synthetic": [data(0), data(3)], "human": [data(1)]}


def trainer(folder, settings=SETTINGS, train=TRAIN):
    return TeacherCodecTrainer(CONFIG, settings, train, {"synthetic": data(2)}, SEMANTIC, folder)


def test_logits_are_distances_to_the_semantic_networks_codebook_in_units_of_its_distance():
    codec = TeacherCodec(CONFIG, SIZE, 16, 1)
    codec.use_codebook(SEMANTIC)
    latent = torch.randn(8, generator=torch.Generator().manual_seed(2))
    expected = -(latent - SEMANTIC.rows).square().sum(-1) / 3.0
    torch.testing.assert_close(codec.semantic_logits(latent[None, None])[0, 0], expected)


def test_a_batch_has_the_codes_of_its_frames():
    sets = TRAIN["synthetic"]
    features, codes = _batch(sets, 40, 5, np.random.default_rng(0))
    known = {
        row.tobytes(): int(code)
        for one in sets
        for row, code in zip(one.frames.features, one.codes, strict=True)
    }
    assert features.shape == (40, 5, SIZE)
    for row, code in zip(features.flatten(0, 1).numpy().astype(np.float16), codes.flatten(), strict=True):
        assert known[row.tobytes()] == int(code)
    assert len({row.tobytes() for row in features.flatten(0, 1).numpy().astype(np.float16)}) > 100


def test_what_was_foreseen_takes_no_bits_and_the_rest_is_counted_in_steps_of_the_levels():
    rng = torch.Generator().manual_seed(0)
    values, semantic = torch.rand((2, 9, 36), generator=rng) - 0.5, torch.randn((2, 9, 8), generator=rng)
    given = []

    def nothing(past):
        given.append(past)
        return torch.zeros_like(values)

    foreseen = foreseen_values(nothing, values, semantic)
    torch.testing.assert_close(foreseen[:, :KNOWN_FRAMES], values[:, :KNOWN_FRAMES])
    assert not foreseen[:, KNOWN_FRAMES:].any()
    found = acoustic_bits(values, foreseen, 21)
    errors = values[:, KNOWN_FRAMES:] * 10
    torch.testing.assert_close(found, (0.5 * torch.log2(1 + errors**2)).mean())
    assert acoustic_bits(values, values, 21) == 0
    (past,) = given
    one, two, mean, now, last = past.split((36, 36, 36, 8, 8), dim=-1)
    for t in (0, 1, 2, 7):
        zero = torch.zeros(2, 36)
        torch.testing.assert_close(one[:, t], values[:, t - 1] if t else zero)
        torch.testing.assert_close(two[:, t], values[:, t - 2] if t > 1 else zero)
        torch.testing.assert_close(mean[:, t], values[:, :t].mean(1) if t else zero)
        torch.testing.assert_close(now[:, t], semantic[:, t])
        torch.testing.assert_close(last[:, t], semantic[:, t - 1] if t else zero[:, :8])


def test_acoustic_values_become_foreseeable_where_their_bits_cost(tmp_path):
    rates = []
    for weight in (0.0, 1.0):
        run = trainer(tmp_path / str(weight), replace(SETTINGS, steps=200, frames=12, rate=weight))
        rows = [run.step() for _ in range(60)]
        rates.append(np.mean([row["rate"] for row in rows[-5:]]))
    assert rates[1] < 0.7 * rates[0]


def test_what_is_foreseen_counts_from_the_chosen_step(tmp_path):
    run = trainer(tmp_path, replace(SETTINGS, rate=1.0, foreseen=1.0, predictable_from=2))
    before = [p.clone() for p in run.foreseen.parameters()]
    rows = [run.step(), run.step()]
    for p, old in zip(run.foreseen.parameters(), before, strict=True):
        torch.testing.assert_close(p, old, rtol=0, atol=1e-5)  # weight decay
    rows.append(run.step())
    assert not torch.equal(run.foreseen[0].weight, before[0])
    for row, counted in zip(rows, (False, False, True), strict=True):
        rest = row["mel"] + 0.3 * row["pitch"] + 0.5 * row["spread"]
        assert row["loss"] == pytest.approx(rest + (row["rate"] if counted else 0.0), rel=1e-4)


def test_what_is_decoded_blindly_has_foreseen_acoustic_values_and_the_rows_of_its_codes(tmp_path):
    run = trainer(tmp_path, replace(SETTINGS, foreseen=1.0))
    decode, seen = run.teacher.decode, []
    run.teacher.decode = lambda *given: (seen.append(given), decode(*given))[1]
    features, codes = _batch(TRAIN["synthetic"], 3, 8, np.random.default_rng(0))
    losses = run.losses(features, codes, training=True)
    values = torch.tanh(run.teacher.encode_latents(features, codes))
    ((given, decoded),) = seen
    torch.testing.assert_close(given, SEMANTIC.rows[codes])
    torch.testing.assert_close(decoded, foreseen_values(run.foreseen, values, given))
    losses["mel"].backward()
    assert run.foreseen[0].weight.grad.abs().sum() > 0
    found = run.losses(features, codes, training=False)
    blind = (decode(given, decoded) - run.teacher.standard(features)).abs()
    torch.testing.assert_close(found["foreseen_mel"], blind[:, KNOWN_FRAMES:, : run.mel_size].mean())


def test_when_it_is_done_acoustic_latents_have_the_size_of_the_levels_and_mean_the_same(tmp_path):
    run = trainer(tmp_path)
    for _ in range(SETTINGS.steps - 1):
        run.step()
    assert torch.equal(run.teacher.gain, torch.ones(36))
    run.step()
    features, codes = _batch(TRAIN["synthetic"] + TRAIN["human"], 50, 8, np.random.default_rng(0))
    plain = run.teacher.encode_latents(features, codes) * run.teacher.gain
    torch.testing.assert_close(run.teacher.encode(features, codes), torch.tanh(plain))
    assert 0.3 < float(plain.square().mean().sqrt()) < 0.5


def test_an_acoustic_latent_that_tells_nothing_stays_small(tmp_path):
    run = trainer(tmp_path)
    last = run.teacher.encoder[-1]
    with torch.no_grad():
        last.weight[0] = 0
        last.bias[0] = 1e-6
    run.use_levels()
    assert torch.isfinite(run.teacher.gain).all()
    assert float(run.teacher.gain[0]) * 1e-6 < 1e-3


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    whole = trainer(tmp_path / "a")
    expected = [whole.step()["loss"] for _ in range(8)]
    first = trainer(tmp_path / "b")
    found = [first.step()["loss"] for _ in range(4)]
    first.save()
    second = trainer(tmp_path / "b")
    assert second.resume()
    found += [second.step()["loss"] for _ in range(4)]
    assert found == expected
    for name, tensor in whole.teacher.state_dict().items():
        assert torch.equal(tensor, second.teacher.state_dict()[name]), name
    assert second.validate() == whole.validate()


def test_synthetic_speech_alone_is_enough(tmp_path):
    run = trainer(tmp_path, train={"synthetic": TRAIN["synthetic"]})
    assert np.isfinite([run.step()["loss"] for _ in range(5)]).all()
