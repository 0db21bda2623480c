"""The teacher codec: its codebook, what it distills, and that its run resumes exactly."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from lab.data import LabUtterance
from lab.frames import FrameFeatures, FrameSet
from lab.language_data import SYMBOLS
from lab.teacher_codec import (
    KNOWN_FRAMES,
    TeacherCodec,
    TeacherCodecTrainer,
    TeacherCodecTraining,
    TeacherData,
    acoustic_bits,
    foreseen_values,
)
from lab.whisper_states import WhisperStates
from revox.model.config import CodecConfig
from revox.training.distill import DistillTargets

CONFIG = CodecConfig(semantic_codebook_size=16, semantic_dim=8)
SIZE, WIDTH = FrameFeatures(CONFIG).size, 12
SETTINGS = TeacherCodecTraining(
    steps=8, batch=4, frames=6, width=16, blocks=1, warmup=1, decay_steps=2, distilled=3, quantized_from=3
)


def data(seed, count=6):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(9, 20, count)
    speech = SimpleNamespace(
        utterances=[
            LabUtterance(f"s{i % 2}", "F", None, "x", 0, int(n) * 1920) for i, n in enumerate(lengths)
        ]
    )
    frames = FrameSet(speech, rng.standard_normal((lengths.sum(), SIZE)).astype(np.float16), 1920)
    states = WhisperStates({}, {}, {})
    for i, n in enumerate(lengths):
        tokens = int(rng.integers(2, 6)) if i else 0  # the first has no timed word
        alignment = rng.random((tokens, n)) ** 4
        states.hidden[i] = rng.standard_normal((tokens, WIDTH)).astype(np.float16)
        states.alignment[i] = (alignment / alignment.sum(1, keepdims=True)).astype(np.float16)
        states.encoded[i] = (rng.standard_normal((n, WIDTH)) + 3).astype(np.float16)
    symbols = {i: rng.integers(1, SYMBOLS, 2 * n).astype(np.int16) for i, n in enumerate(lengths) if i % 2}
    return TeacherData(frames, states, symbols)


TRAIN = {"synthetic": data(0), "human": data(1)}


def trainer(folder, settings=SETTINGS, train=TRAIN):
    return TeacherCodecTrainer(CONFIG, settings, train, {"synthetic": data(2)}, folder)


@pytest.fixture
def codec():
    return TeacherCodec(CONFIG, SIZE, 16, 1)


def test_the_codebook_is_made_of_clusters_and_every_latent_has_its_nearest_row(codec):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn((900, 8), generator=rng)
    codec.make_codebook(latents, rng, rounds=60)
    distances = torch.stack([(latents - row).square().sum(-1) for row in codec.rows], dim=-1)
    codes = codec.semantic_logits(latents[None])[0].argmax(-1)
    torch.testing.assert_close(distances.gather(1, codes[:, None])[:, 0], distances.min(-1).values)
    assert len(set(codes.tolist())) == 16
    for code, row in enumerate(codec.rows):  # k-means has come to rest
        torch.testing.assert_close(row, latents[codes == code].mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(codec.distance, distances.min(-1).values.mean(), rtol=1e-3, atol=0)


def test_logits_are_distances_in_units_of_the_mean_distance(codec):
    codec.sums.copy_(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)))
    codec.usage.fill_(0.5)
    codec.distance.fill_(3.0)
    latent = torch.randn(8, generator=torch.Generator().manual_seed(2))
    expected = -(latent - codec.sums / 0.5).square().sum(-1) / 3.0
    torch.testing.assert_close(codec.semantic_logits(latent[None, None])[0, 0], expected)


def test_following_keeps_usage_at_a_mean_of_1_and_moves_rows_to_their_latents(codec):
    rng = torch.Generator().manual_seed(0)
    codec.sums.copy_(torch.randn((16, 8), generator=rng))
    settings = replace(SETTINGS, rarest=0.0, codebook_decay=0.9)
    latents, codes = torch.randn((200, 8), generator=rng), torch.arange(200) % 10
    before = codec.rows.clone()
    for _ in range(300):
        codec.follow(latents, codes, settings, rng)
        assert float(codec.usage.mean()) == pytest.approx(1, abs=1e-4)
    for code in range(10):
        torch.testing.assert_close(codec.rows[code], latents[codes == code].mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.rows[10:], before[10:], atol=1e-4, rtol=1e-3)  # unused: in place
    expected = (latents - codec.rows[codes]).square().sum(-1).mean()
    torch.testing.assert_close(codec.distance, expected, rtol=1e-3, atol=0)


def test_a_batch_moves_a_row_as_far_as_a_larger_batch_of_the_same_latents(codec):
    rng = torch.Generator().manual_seed(0)
    codec.sums.copy_(torch.randn((16, 8), generator=rng))
    latents, codes = torch.randn((32, 8), generator=rng), torch.arange(32) % 16
    other = TeacherCodec(CONFIG, SIZE, 16, 1)
    other.sums.copy_(codec.sums)
    codec.follow(latents, codes, SETTINGS, rng)
    other.follow(latents.repeat(5, 1), codes.repeat(5), SETTINGS, rng)
    torch.testing.assert_close(codec.rows, other.rows)
    torch.testing.assert_close(codec.usage, other.usage)


def test_codes_that_are_rare_are_put_where_latents_are(codec):
    rng = torch.Generator().manual_seed(0)
    codec.sums.copy_(torch.randn((16, 8), generator=rng) + 100)
    codec.usage[7] = 0.1
    codec.sums[7] *= 0.1
    latents, codes = torch.randn((40, 8), generator=rng), torch.arange(40) % 5
    before = codec.rows.clone()
    codec.follow(latents, codes, replace(SETTINGS, rarest=0.1, codebook_decay=0.99), rng)
    assert float((latents - codec.rows[7]).abs().sum(-1).min()) < 1e-5
    assert float(codec.usage[7]) == 0.5
    torch.testing.assert_close(codec.rows[8:], before[8:])  # 0.99 is not yet rare


def by_hand(run, chosen):
    """The two losses of the utterances `chosen`, each by itself, from their latents without quantization."""
    of = TRAIN["synthetic"]
    words, cosines = [], []
    for i in chosen:
        features = of.frames.features[of.frames.starts[i] : of.frames.ends[i]].astype(np.float32)
        semantic, _ = run.teacher.encode_latents(torch.from_numpy(features)[None])
        hidden, alignment, encoded = (
            torch.from_numpy(found[i].astype(np.float32))
            for found in (of.states.hidden, of.states.alignment, of.states.encoded)
        )
        words.append(run.words(semantic, DistillTargets([hidden], [alignment])))
        guess, goal = run.sounds(semantic[0]), encoded - run.center
        cosines.append(functional.cosine_similarity(guess, goal, dim=-1))
    return torch.stack(words).mean(), 1 - torch.cat(cosines).mean()


def test_the_distillation_is_that_of_each_utterance_by_itself(tmp_path):
    run = trainer(tmp_path)
    known = [i for i in range(6) if len(TRAIN["synthetic"].states.hidden[i])]
    assert known == [1, 2, 3, 4, 5]
    chosen = [known[i] for i in np.random.default_rng(5).integers(len(known), size=4)]
    found = run.distillation(TRAIN["synthetic"], 4, np.random.default_rng(5), training=False)
    words, sounds = by_hand(run, chosen)
    torch.testing.assert_close(found["words"], words)
    torch.testing.assert_close(found["sounds"], sounds)


def test_phonemes_are_read_from_each_half_of_the_frames_where_they_are_known(tmp_path):
    run, of = trainer(tmp_path), TRAIN["synthetic"]
    chosen = [[1, 2, 3, 4, 5][i] for i in np.random.default_rng(5).integers(5, size=4)]
    found = run.distillation(of, 4, np.random.default_rng(5), training=False)["phonemes"]
    terms = []
    for i in set(chosen) & {1, 3, 5}:
        features = of.frames.features[of.frames.starts[i] : of.frames.ends[i]].astype(np.float32)
        semantic, _ = run.teacher.encode_latents(torch.from_numpy(features)[None])
        logits = run.phonemes(semantic[0]).reshape(-1, SYMBOLS)  # the first half of a frame, then the second
        nats = functional.cross_entropy(
            logits, torch.from_numpy(of.symbols[i].astype(np.int64)), reduction="none"
        )
        terms += [nats] * chosen.count(i)
    assert terms
    torch.testing.assert_close(found, torch.cat(terms).mean())


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
        settings = replace(SETTINGS, steps=200, batch=4, frames=12, quantized_from=20, rate=weight)
        run = trainer(tmp_path / str(weight), settings)
        rows = [run.step() for _ in range(60)]
        rates.append(np.mean([row["rate"] for row in rows[-5:]]))
    assert rates[1] < 0.7 * rates[0]


def test_what_is_decoded_blindly_has_neither_true_acoustic_values_nor_latents_without_quantization(tmp_path):
    run = trainer(tmp_path, replace(SETTINGS, foreseen=1.0, quantized_from=0))
    run.teacher.sums.copy_(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)))
    rows, seen = run.teacher.rows.clone(), []
    decode = run.teacher.decode
    run.teacher.decode = lambda *given: (seen.append(given), decode(*given))[1]
    features = torch.from_numpy(TRAIN["synthetic"].frames.batch(3, 8, np.random.default_rng(0)).astype("f4"))
    losses = run.reconstruction(features, training=True)
    semantic, acoustic = run.teacher.encode_latents(features)
    hard, _ = run._quantized(semantic, training=False)
    ((given, values),) = seen
    # The codebook has followed the latents since: what was given lay on rows of before.
    torch.testing.assert_close(torch.cdist(given.flatten(0, 1), rows).min(-1).values, torch.zeros(24))
    assert torch.cdist(semantic.flatten(0, 1), rows).min(-1).values.min() > 0.1
    foreseen = foreseen_values(run.foreseen, torch.tanh(acoustic), given)
    torch.testing.assert_close(values, foreseen)
    losses["mel"].backward()
    assert run.foreseen[0].weight.grad.abs().sum() > 0
    found = run.reconstruction(features, training=False)
    blind = (decode(hard, foreseen_values(run.foreseen, torch.tanh(acoustic), hard)) - run.teacher.standard(
        features)).abs()[:, KNOWN_FRAMES:, : run.mel_size].mean()  # fmt: skip
    assert float(found["foreseen_mel"].detach()) == pytest.approx(float(blind.detach()), rel=0.05)


def test_latents_are_quantized_from_the_chosen_step_and_gradients_pass(tmp_path):
    run = trainer(tmp_path)
    rows = []
    for _ in range(5):
        rows.append(run.step())
    assert [row["commitment"] > 0 for row in rows] == [False] * 3 + [True] * 2
    semantic = torch.randn((4, 3, 8), generator=torch.Generator().manual_seed(0)).requires_grad_()
    given, codes = run._quantized(semantic, training=False)
    torch.testing.assert_close(given, run.teacher.rows[codes])
    given.sum().backward()
    assert torch.equal(semantic.grad, torch.ones_like(semantic))


def test_when_it_is_done_acoustic_latents_have_the_size_of_the_levels_and_mean_the_same(tmp_path):
    run = trainer(tmp_path)
    for _ in range(SETTINGS.steps - 1):
        run.step()
    assert torch.equal(run.teacher.gain, torch.ones(36))
    run.step()
    parts = [of.frames.features.astype(np.float32) for of in TRAIN.values()]
    features = torch.from_numpy(np.concatenate(parts))[None]
    plain = run.teacher.encode_latents(features)[1]
    _, found = run.teacher.encode(features)
    torch.testing.assert_close(found, plain * run.teacher.gain)
    assert 0.3 < float(found.square().mean().sqrt()) < 0.5


def test_an_acoustic_latent_that_tells_nothing_stays_small(tmp_path):
    run = trainer(tmp_path)
    last = run.teacher.encoder[-1]
    with torch.no_grad():
        last.weight[CONFIG.semantic_dim] = 0
        last.bias[CONFIG.semantic_dim] = 1e-6
    run._use_levels()
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


def test_it_learns_what_it_distills(tmp_path):
    run = trainer(tmp_path, replace(SETTINGS, steps=200, batch=2, quantized_from=40, learning_rate=5e-3))
    rows = [run.step() for _ in range(80)]
    for name in ("words", "sounds", "mel"):
        first, last = (np.mean([row[name] for row in part]) for part in (rows[:5], rows[-5:]))
        assert last < 0.9 * first, name
