"""The speaker loss: ECAPA against SpeechBrain itself, the own verifier."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import math
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from revox.training.ecapa import EcapaSizes, EcapaTdnn, Frames, fbank
from revox.training.errors import TrainingError
from revox.training.speaker import SpeakerLoss
from revox.training.verifier import SpeakerNet, VerifierTraining, train_verifier

RATE = 16000
SMALL = dict(channels=16, aggregated=48, attention=8, squeezed=8, scale=4, dim=12)


def voices(count, seconds, speaker, seed):
    """`count` utterances `[samples]` of a made-up speaker: a pitch, a length of vocal tract, a breathiness.

    Vowels of four formants (Peterson and Barney's range), a new one every 120 ms, by adding harmonics.
    """
    who, rng = np.random.default_rng(1000 + speaker), np.random.default_rng(seed)
    pitch, tract, breath, tilt = (
        who.uniform(85, 250),
        who.uniform(0.8, 1.25),
        who.uniform(0.001, 0.02),
        who.uniform(6, 14),
    )
    piece = round(0.12 * RATE)
    t = np.arange(piece) / RATE
    out = []
    for _ in range(count):
        parts = []
        for _ in range(round(seconds / 0.12)):
            f0 = pitch * rng.uniform(0.85, 1.15)
            formants = np.array([rng.uniform(270, 730), rng.uniform(840, 2290), 2700.0, 3600.0]) * tract
            hertz = f0 * np.arange(1, int(7500 / f0))
            gain = (1 / (1 + ((hertz[:, None] - formants) / 90) ** 2)).sum(1) * 10 ** (
                -tilt * np.log2(hertz / 100) / 20
            )
            phase = rng.uniform(0, 2 * np.pi, size=len(hertz))
            sound = (gain[:, None] * np.sin(2 * np.pi * hertz[:, None] * t + phase[:, None])).sum(0)
            parts.append(sound / np.abs(sound).max() * rng.uniform(0.2, 0.5))
        speech = np.concatenate(parts)
        out.append((speech + breath * rng.normal(size=len(speech))).astype(np.float32))
    return out


def padded(clips, fill=0.0):
    lengths = torch.tensor([len(c) for c in clips])
    batch = torch.full((len(clips), int(lengths.max())), fill)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = torch.as_tensor(clip)
    return batch, lengths


# --- ECAPA-TDNN, with SpeechBrain as the oracle


@pytest.fixture(scope="module")
def speechbrain():
    """SpeechBrain's own network and front end; what else it imports (torchaudio) is not needed for them."""
    found = importlib.util.find_spec("speechbrain")
    if found is None:
        pytest.skip("SpeechBrain is not installed: pip install --no-deps speechbrain")
    before = dict(sys.modules)
    package, torchaudio = ModuleType("speechbrain"), ModuleType("torchaudio")
    package.__path__ = list(found.submodule_search_locations)  # its __init__ imports a training framework
    torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    torchaudio.__version__, torchaudio.list_audio_backends = "2.0.0", lambda: ["none"]
    sys.modules.update(speechbrain=package, torchaudio=torchaudio)
    try:
        features = importlib.import_module("speechbrain.processing.features")
        network = importlib.import_module("speechbrain.lobes.models.ECAPA_TDNN").ECAPA_TDNN
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in ("speechbrain", "torchaudio")]:
            del sys.modules[name]
        sys.modules.update(
            {n: m for n, m in before.items() if n.split(".")[0] in ("speechbrain", "torchaudio")}
        )
    return SimpleNamespace(features=features, network=network)


def front_end(speechbrain, clip):
    """The features `[1, frames, 80]` of one clip, as hyperparams.yaml of spkrec-ecapa-voxceleb has them."""
    f = speechbrain.features
    spectrum = f.spectral_magnitude(f.STFT(sample_rate=RATE)(torch.as_tensor(clip)[None]))
    return f.Filterbank(n_mels=80, n_fft=400, sample_rate=RATE)(spectrum)


def theirs(speechbrain, network, clip):
    normalise = speechbrain.features.InputNormalization(norm_type="sentence", std_norm=False)
    with torch.no_grad():
        return network(normalise(front_end(speechbrain, clip), torch.ones(1)), torch.ones(1))[0, 0]


@pytest.fixture(scope="module")
def small(speechbrain):
    """SpeechBrain's network with random weights and statistics that hide nothing."""
    torch.manual_seed(0)
    network = speechbrain.network(
        80,
        channels=[16, 16, 16, 16, 48],
        lin_neurons=12,
        attention_channels=8,
        se_channels=8,
        res2net_scale=4,
    )
    for name, buffer in network.named_buffers():
        if name.endswith("mean"):
            buffer.normal_()
        elif name.endswith("var"):
            buffer.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture(scope="module")
def clips():
    sizes = (16000, 9000, 12345)
    return [voices(1, 1.1, i, i)[0][:n] * 10.0**-i for i, n in enumerate(sizes)]


def test_the_front_end_is_speechbrains(speechbrain, clips):
    fading = clips[0] * np.repeat([1.0, 1e-4, 0.0, 1e-6], 4000).astype(np.float32)  # below its floor of 80 dB
    for clip in (*clips, fading):
        count = len(clip) // 160 + 1
        ours = fbank(torch.as_tensor(clip)[None], 80, Frames(torch.tensor([count]), count))
        torch.testing.assert_close(ours.mT, front_end(speechbrain, clip), atol=1e-4, rtol=1e-5)


def test_embeddings_are_speechbrains_alone_and_in_a_padded_batch(speechbrain, small, clips):
    network = EcapaTdnn.from_state(small.state_dict()).eval()
    batch, lengths = padded(clips)
    with torch.no_grad():
        together = network(batch, lengths)
    for i, clip in enumerate(clips):
        torch.testing.assert_close(together[i], theirs(speechbrain, small, clip), atol=1e-5, rtol=1e-4)


def test_at_full_size_every_tensor_has_the_published_name_and_shape(speechbrain):
    with torch.device("meta"):
        ours = EcapaTdnn()
    published = speechbrain.network(80, channels=[1024, 1024, 1024, 1024, 3072], lin_neurons=192)
    shapes = {name: tensor.shape for name, tensor in published.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes


def test_the_published_folder_is_recognised_by_its_file(speechbrain, small, clips, tmp_path):
    torch.save(small.state_dict(), tmp_path / "embedding_model.ckpt")
    (tmp_path / "config.json").write_text('{"speechbrain_interface": "SpeakerRecognition"}')
    loss = SpeakerLoss.load(str(tmp_path), rate=RATE)
    n = len(clips[1])
    pair = torch.as_tensor(np.stack([clips[0][:n], clips[1]]))
    a, b = (theirs(speechbrain, small, clip) for clip in pair)
    expected = 1 - float(torch.cosine_similarity(a, b, dim=0))
    assert math.isclose(float(loss(pair[:1], pair[1:])), expected, abs_tol=1e-5)


# --- the loss itself


class Corner(nn.Module):
    """Embeds a clip as its first two samples, so that cosines can be worked out by hand."""

    rate = RATE

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, waveforms, lengths):
        return self.scale * waveforms[:, :2]


def test_the_loss_is_one_minus_the_mean_cosine_worked_out_by_hand():
    loss = SpeakerLoss(Corner(), RATE)
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-1.0, 1.0]])
    torch.testing.assert_close(loss.similarity(a, b), torch.tensor([0.96, -1 / math.sqrt(2)]))
    assert math.isclose(float(loss(a, b)), 1 - (0.96 - 1 / math.sqrt(2)) / 2, rel_tol=1e-6)


def test_gradient_reaches_the_reconstruction_and_neither_the_original_nor_the_network():
    loss = SpeakerLoss(Corner(), RATE)
    a, b = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss(a, b).backward()
    # d cos / d a = (b/|b| - cos a/|a|) / |a|, with cos 0.6 and |a| 5
    torch.testing.assert_close(a.grad, -torch.tensor([[(1 - 0.36) / 5, -0.48 / 5]]))
    assert b.grad is None
    assert loss.network.scale.grad is None


def test_the_network_stays_in_eval_mode_whatever_its_owner_does():
    owner = nn.ModuleList([SpeakerLoss(SpeakerNet(), RATE)]).train()
    assert not any(module.training for module in owner[0].modules())


def random_ecapa():
    torch.manual_seed(1)
    return EcapaTdnn(EcapaSizes(**SMALL))


def test_a_clips_value_depends_on_no_padding_and_on_no_other_clip(clips):
    loss = SpeakerLoss(random_ecapa(), 24000)
    originals, lengths = padded(clips, fill=3.0)
    reconstructions, _ = padded([clip[::-1].copy() for clip in clips], fill=-2.0)
    together = loss.similarity(reconstructions, originals, lengths)
    alone = [
        loss.similarity(torch.as_tensor(c[::-1].copy())[None], torch.as_tensor(c)[None])[0] for c in clips
    ]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_a_clip_of_a_few_samples_is_heard_with_silence_after_it():
    loss = SpeakerLoss(random_ecapa(), RATE)
    clip = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    longer = torch.cat([clip, torch.zeros(1, 1300)], dim=1)  # 0.1 s
    torch.testing.assert_close(loss._embed(clip, None), loss._embed(longer, None))


def test_a_waveform_moved_along_the_gradient_gets_the_targets_voice(clips):
    loss = SpeakerLoss(random_ecapa(), 24000)
    n = 9000
    target, moved = torch.as_tensor(clips[0][:n])[None], torch.as_tensor(voices(1, 1.1, 7, 7)[0][:n])[None]
    before = float(loss(moved, target))
    for _ in range(15):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(moved, target), moved)
        moved = (moved - 0.02 * moved.detach().std() * gradient / gradient.std()).detach()
    assert float(loss(moved, target)) < 0.5 * before


# --- the verifier


@pytest.fixture(scope="module")
def verifier():
    people = [(f"speaker {i}", clip) for i in range(24) for clip in voices(3, 1.2, i, i)]
    return train_verifier(people, RATE, VerifierTraining(80, batch=24, shortest=0.6, longest=0.9))


def test_it_tells_speakers_apart_whom_it_never_heard(verifier):
    def score(network):
        said = [voices(3, 2.4, i, 500 + i) for i in range(40, 52)]
        batch, lengths = padded([clip for speaker in said for clip in speaker])
        with torch.no_grad():
            embeddings = nn.functional.normalize(network(batch, lengths), dim=1)
        who = torch.arange(len(said)).repeat_interleave(3)
        similar = embeddings @ embeddings.T
        same = (who[:, None] == who) & ~torch.eye(len(who), dtype=torch.bool)
        alike, unlike = similar[same], similar[who[:, None] != who]
        # The chance that a pair of one speaker is more alike than a pair of two; 0.5 is guessing.
        return float((alike[:, None] > unlike).float().mean())

    assert score(verifier) > 0.9


def test_the_same_seed_gives_the_same_network_and_another_another():
    people = [(str(i), voices(1, 0.7, i, i)[0]) for i in range(3)]
    nets = [train_verifier(people, RATE, VerifierTraining(2, batch=4, seed=seed)) for seed in (5, 5, 6)]
    first, again, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_saved_verifier_is_recognised_and_gives_the_same(verifier, clips, tmp_path):
    verifier.save(tmp_path / "verifier.safetensors")
    loss = SpeakerLoss.load(str(tmp_path / "verifier.safetensors"), rate=24000)
    assert loss.network.mels == verifier.mels
    batch, lengths = padded(clips)
    with torch.no_grad():
        torch.testing.assert_close(loss.network(batch, lengths), verifier(batch, lengths))


def test_a_verifier_needs_two_speakers():
    with pytest.raises(TrainingError, match="there are 1; give recordings of two speakers"):
        train_verifier([("a", np.ones(16000)), ("a", np.zeros(16000))], RATE)


# --- what is refused


class Judge(nn.Module):
    """GE2E as Resemblyzer builds it (hparams.py: 40 mels, 256, 3 layers, 256)."""

    rate = RATE

    def __init__(self):
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)


@pytest.mark.parametrize("name", ["resemblyzer", "someone/Resemblyzer-GE2E", "models/ge2e.pt"])
def test_the_judge_is_refused_by_name(name):
    with pytest.raises(TrainingError, match="may not be in a loss"):
        SpeakerLoss.load(name)


def test_the_judge_is_refused_by_its_tensors_under_any_name(tmp_path):
    judge = Judge()
    torch.save({"step": 1, "model_state": judge.state_dict()}, tmp_path / "embedding_model.ckpt")
    save_file({f"encoder.{k}": v for k, v in judge.state_dict().items()}, tmp_path / "voice.safetensors")
    for name in (".", "embedding_model.ckpt", "voice.safetensors"):
        with pytest.raises(TrainingError, match="may not be in a loss"):
            SpeakerLoss.load(str(tmp_path / name))
    with pytest.raises(TrainingError, match="may not be in a loss"):
        SpeakerLoss(nn.Sequential(judge))


def test_resemblyzers_own_file_is_refused(tmp_path):
    found = importlib.util.find_spec("resemblyzer")
    if found is None:
        pytest.skip("Resemblyzer is not installed")
    (tmp_path / "voice.pt").symlink_to(f"{found.submodule_search_locations[0]}/pretrained.pt")
    with pytest.raises(TrainingError, match="may not be in a loss"):
        SpeakerLoss.load(str(tmp_path / "voice.pt"))


def test_an_lstm_of_another_size_is_not_the_judge():
    class Other(Corner):
        def __init__(self):
            super().__init__()
            self.lstm, self.linear = nn.LSTM(40, 128, 3), nn.Linear(256, 256)

    SpeakerLoss(Other(), RATE)


def test_files_that_are_no_speaker_network_are_sentences(tmp_path):
    (tmp_path / "text.ckpt").write_text("no weights")
    (tmp_path / "objects.pt").write_bytes(pickle.dumps(SimpleNamespace(a=1), protocol=2))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("text.ckpt", "objects.pt", "cut.safetensors"):
        with pytest.raises(TrainingError, match="is not a file of plain tensors"):
            SpeakerLoss.load(str(tmp_path / name))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(TrainingError, match="does not hold a known speaker network"):
        SpeakerLoss.load(str(tmp_path / "other.ckpt"))
    with pytest.raises(TrainingError, match=r"needs SpeechBrain's embedding_model\.ckpt"):
        SpeakerLoss.load(str(tmp_path))
    with pytest.raises(TrainingError, match="is not a file, a folder or a hub id"):
        SpeakerLoss.load(str(tmp_path / "nowhere"))
