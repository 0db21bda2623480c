from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import revox
from revox.api import SpeechWarning, find_device
from revox.checkpoint import load
from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.load import default_dtype, fastest_weights
from revox.checkpoint.voices import Voice
from revox.speech import Audio
from revox.synthesis.engine import Engine, Request
from revox.synthesis.errors import SpeakError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tts(tiny_checkpoint):
    return revox.load(tiny_checkpoint, device="cpu")


def test_speaking_is_the_prompt_the_engines_frames_and_the_codecs_decoder(tts):
    voice = tts.voice("pt_male")
    tokens = [1, 25, *[24] * len(voice.embedding), 36, *[1000 + byte for byte in b"ten to five"], 35, 25]
    prompt = tts.model.embed_prompt(torch.tensor(tokens), 24, voice.embedding)
    [one] = Engine(tts.model).generate_batch([Request(prompt, 0, 25)])
    expected = tts.model.audio_tokenizer.decode_whole(one.codes()[None])[0].numpy()
    speech = tts.synthesize("ten to five", "pt_male", seed=0, max_seconds=2.0)
    assert torch.equal(speech.codes, one.codes())
    assert speech.audio.rate == tts.sampling_rate == 24000
    np.testing.assert_allclose(speech.audio.samples, expected, atol=1e-5)
    # One take of a text that is one piece has the same frames; where it is cut off, its last 10 ms fade.
    audio = tts.speak("ten to five", "pt_male", seed=0, takes=1, max_seconds=2.0)
    np.testing.assert_allclose(audio.samples[:-240], expected[:-240], atol=1e-5)


def test_a_stream_laid_end_to_end_is_what_speak_gives(tts):
    chunks = list(tts.stream("ten to five", "pt_male", seed=0, takes=1, max_seconds=3.0))
    whole = tts.speak("ten to five", "pt_male", seed=0, takes=1, max_seconds=3.0)
    np.testing.assert_allclose(np.concatenate([c.samples for c in chunks]), whole.samples, atol=1e-5)
    assert chunks[-1].truncated == whole.truncated
    assert chunks[0].seconds == pytest.approx(0.4)


def test_a_long_text_is_spoken_in_pieces_and_what_goes_wrong_is_reported(tts):
    text, told = "ten to five. " * 8, []
    options = {"seed": 0, "max_chars": 40, "takes": 1, "max_seconds": 4.0}
    whole = tts.speak(text, "pt_male", report=told.append, **options)
    parts = list(tts.speak_parts(text, "pt_male", report=told.append, **options))
    streamed = list(tts.stream(text, "pt_male", report=told.append, **options))
    assert whole.seconds > 1
    for others in (parts, streamed):
        samples = np.concatenate([part.samples for part in others])
        np.testing.assert_allclose(samples, whole.samples, atol=1e-5)
    assert {warning.piece for warning in told} <= {1, 2, 3}
    with pytest.warns(SpeechWarning, match="its text takes about"):
        tts.speak("ten to five " * 20, "pt_male", max_seconds=8.0, takes=1)


def test_a_voice_in_memory_speaks_as_the_same_rows_in_the_folder_do(tts):
    listed = tts.voice("neutral_female")
    unlisted = Voice("somebody", None, listed.embedding)
    said = [tts.synthesize("Hello.", v, seed=2, max_seconds=1.0).codes for v in (listed, unlisted)]
    assert torch.equal(*said)


def test_meeting_the_limit_is_said_in_the_audio(tts):
    full = tts.synthesize("Hello.", "de_male", seed=5, max_seconds=12.0)
    frames = full.codes.shape[1]
    assert 2 < frames < 150, "the fixture should end by itself here"
    assert not full.audio.truncated
    assert tts.speak("Hello.", "de_male", seed=5, takes=1, max_seconds=0.08 * (frames - 1)).truncated


def test_progress_counts_frames_and_seconds(tts):
    told = []
    tts.speak("ten to five", "pt_male", seed=0, max_seconds=0.4, progress=told.append)
    assert [at.done for at in told] == [1, 2, 3, 4, 5]
    assert [at.facts["seconds"] for at in told] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])


def test_the_old_name_of_synthesize_works_for_one_version(tts):
    with pytest.warns(DeprecationWarning, match=r"now Revox\.synthesize"):
        old = tts.synthesise("Hello.", "pt_male", seed=1, max_seconds=0.16)
    assert torch.equal(old.codes, tts.synthesize("Hello.", "pt_male", seed=1, max_seconds=0.16).codes)


def test_a_request_that_cannot_be_spoken_is_refused_before_a_stream_is_read(tts):
    with pytest.raises(SpeakError, match="text is empty"):
        tts.stream(" ", "pt_male")
    with pytest.raises(SpeakError, match="cfg 99 is out of range"):
        tts.stream("Hello.", "pt_male", cfg=99)
    with pytest.raises(SpeakError, match="below one frame"):
        tts.stream("Hello.", "pt_male", max_seconds=0.05)
    with pytest.raises(SpeakError, match="not a number"):
        tts.stream("Hello.", "pt_male", max_seconds=float("nan"))
    with pytest.raises(VoiceError, match="neutral_male"):
        tts.stream("Hello.", "neutral_mail")


def test_all_sound_voices_are_listed(tts):
    assert len(tts.voices()) == 20
    assert {"casual_female", "hi_female"} <= set(tts.voices())


def test_cloning_gives_a_voice_that_can_be_spoken_with(tts, tiny_preset_codes, monkeypatch):
    monkeypatch.setattr(
        "revox.coding.presets.preset_codes", lambda *_, **__: list(tiny_preset_codes.values())
    )
    t = np.arange(4 * 16000) / 16000
    phase = 2 * np.pi * np.cumsum(140 + 30 * np.sin(2 * np.pi * 1.3 * t)) / 16000
    buzz = sum(np.sin(k * phase) / k for k in range(1, 20)) * np.clip(np.sin(2 * np.pi * 2 * t) + 0.5, 0, 1)
    voice = tts.clone(
        Audio(0.2 * buzz, 16000), consent="a made-up voice", name="made_up", transcript="hm", budget=1.0
    )
    assert voice.name == "made_up"
    assert voice.codes.shape == (37, len(voice.embedding) - 1)
    assert torch.equal(voice.embedding, tts.model.mm_audio_embeddings.voice_embedding(voice.codes).bfloat16())
    assert voice.provenance["transcript"] == "hm"
    assert "a made-up voice" in str(voice.provenance)
    assert tts.speak("Hello.", voice, seed=2, max_seconds=0.4).seconds > 0


def test_a_small_model_is_float32_on_a_cpu_and_bf16_on_cuda(tts, tiny_checkpoint):
    assert tts.model.dtype == torch.float32
    assert default_dtype(tiny_checkpoint, torch.device("cuda")) == torch.bfloat16


def test_a_full_size_model_is_bf16_everywhere(tmp_path):
    with open(tmp_path / "consolidated.safetensors", "wb") as file:
        file.truncate(8_000_000_000)  # a hole, not 8 GB
    for device in ("cpu", "mps", "cuda"):
        assert default_dtype(tmp_path, torch.device(device)) == torch.bfloat16


def test_in_bf16_it_speaks_too(tiny_checkpoint):
    tts = revox.load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    audio = tts.speak("Hello.", "pt_male", seed=5, max_seconds=0.8)
    assert audio.samples.dtype == np.float32
    assert np.isfinite(audio.samples).all()
    assert audio.samples.std() > 0.01


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SpeakError, match="device 'no such thing' is not available"):
        find_device("no such thing")
    if not torch.cuda.is_available():
        with pytest.raises(SpeakError, match="device 'cuda' is not available"):
            find_device("cuda")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        revox.load(tmp_path)


def test_importing_revox_does_not_import_torch():
    command = (
        "import sys, revox; assert 'torch' not in sys.modules; revox.load; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


def test_weights_of_8_bits_speak_and_are_named(tiny_checkpoint):
    tts = revox.load(tiny_checkpoint, device="cpu", weights="int8")
    assert tts.weights == "int8"
    assert 0 < tts.speak("Hello.", "de_male", max_seconds=0.4).seconds < 0.41
    layers = tts.model.backbone.layers
    assert not any(parameter.ndim == 2 for parameter in layers.parameters()), "a matrix was left as it was"
    # The search that a transcript guides needs gradients.
    assert next(tts._model_with_gradients.backbone.parameters()).dtype == torch.float32
    assert isinstance(tts._model_with_gradients.backbone.layers[0].attention.wq, torch.nn.Linear)


def test_the_fastest_weights_depend_on_size_device_and_memory(tiny_checkpoint, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    assert fastest_weights(tiny_checkpoint, cpu) == "float32"
    with open(tmp_path / "consolidated.safetensors", "wb") as file:
        file.truncate(8_000_000_000)
    monkeypatch.setattr(load, "_stored_in", lambda folder: {})  # a file without a header
    monkeypatch.setattr(load, "has_fbgemm", lambda: True)
    monkeypatch.setattr(load.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 16_000_000_000))
    assert fastest_weights(tmp_path, cpu) == "int8"
    for memory, wanted in ((24, "bf16"), (8, "int8"), (4, "int4")):
        card = type("Card", (), {"total_memory": memory * 10**9})
        monkeypatch.setattr(load.torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert fastest_weights(tmp_path, torch.device("cuda")) == wanted
    assert fastest_weights(tmp_path, torch.device("mps")) == "bf16"
    monkeypatch.setattr(load.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 4_900_000_000))
    assert fastest_weights(tmp_path, cpu) == "int4"
    monkeypatch.setattr(load, "has_fbgemm", lambda: False)
    assert fastest_weights(tmp_path, cpu) == "bf16"


def test_weights_that_are_unknown_or_not_for_the_device_are_refused(tiny_checkpoint):
    with pytest.raises(SpeakError, match="weights 'int2' are not known; take auto, bf16"):
        revox.load(tiny_checkpoint, device="cpu", weights="int2")
    with pytest.raises(
        SpeakError, match="int8 weights run on the CPU or a CUDA card only, and the device is meta"
    ):
        revox.load(tiny_checkpoint, device="meta", weights="int8")


def test_codes_of_a_recording_at_another_rate_are_of_all_of_it(tiny_checkpoint_with_encoder):
    tts = revox.load(tiny_checkpoint_with_encoder, device="cpu")
    sound = 0.1 * np.sin(2 * np.pi * 220 * np.arange(16000) / 16000)
    found = tts.find_codes(Audio(sound, 16000)).codes
    assert found.shape == (37, 13)  # 1 s
    assert torch.equal(found, tts.find_codes(Audio(sound, 16000).at(24000)).codes)
