"""faster-whisper is not installed here: a stand-in notes how it is called and answers as it does."""

from __future__ import annotations

import os
import sys
import types

import numpy as np
import pytest

from revox.metrics.errors import MetricError
from revox.metrics.intelligibility import load_recognizer
from revox.metrics.whisper import WhisperRecognizer
from revox.speech import Audio


class StandIn:
    """`faster_whisper.WhisperModel`: one segment of words for each second of sound."""

    error: Exception | None = None

    def __init__(self, path, **settings):
        if self.error is not None:
            raise self.error
        self.path, self.settings, self.calls = path, settings, []

    def transcribe(self, samples, **options):
        self.calls.append((samples, options))
        word = types.SimpleNamespace(word=" word", start=0.0, end=0.4, probability=0.9)
        texts = [" One, two.", " Three", ""]
        segments = [types.SimpleNamespace(text=t, start=0.0, end=1.0, words=[word]) for t in texts]
        return iter(segments), types.SimpleNamespace(language="en")


@pytest.fixture
def library(monkeypatch):
    class Model(StandIn):
        pass

    monkeypatch.setitem(sys.modules, "faster_whisper", types.SimpleNamespace(WhisperModel=Model))
    return Model


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt"):
        (tmp_path / name).write_bytes(b"{}")
    return tmp_path


def tone(seconds, rate=24000):
    return Audio(0.3 * np.sin(np.arange(round(rate * seconds)) * 0.1), rate)


def test_the_transcript_is_the_text_of_all_segments(library, folder):
    assert WhisperRecognizer(str(folder)).transcribe(tone(2.0)) == "One, two. Three"


def test_the_model_gets_16_khz_and_decodes_without_chance_or_context(library, folder):
    recognizer = WhisperRecognizer(str(folder))
    recognizer.transcribe(tone(2.0))
    ((samples, options),) = recognizer._model.calls
    assert samples.dtype == np.float32
    assert len(samples) == 32000
    assert options["language"] == "en"
    assert options["temperature"] == 0.0  # one number: no second try at a higher one
    assert options["condition_on_previous_text"] is False


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", {"device": "cpu", "compute_type": "int8", "cpu_threads": 1}),
        ("mps", {"device": "cpu", "compute_type": "int8", "cpu_threads": 1}),
        ("cuda", {"device": "cuda", "compute_type": "float16", "device_index": 0}),
        ("cuda:1", {"device": "cuda", "compute_type": "float16", "device_index": 1}),
    ],
)
def test_a_cpu_computes_in_int8_and_cuda_in_float16(library, folder, one_thread, device, expected):
    assert WhisperRecognizer(str(folder), device)._model.settings == expected


def test_the_language_can_be_another_or_left_to_the_model(library, folder):
    for language in ("de", None):
        recognizer = WhisperRecognizer(str(folder), language=language)
        recognizer.transcribe(tone(1.0))
        assert recognizer._model.calls[0][1]["language"] == language


def test_silence_has_no_words_and_is_not_given_to_the_model(library, folder):
    recognizer = WhisperRecognizer(str(folder))
    assert recognizer.transcribe(Audio(np.zeros(16000), 16000)) == ""
    assert recognizer.transcribe(Audio(np.zeros(0), 16000)) == ""
    assert recognizer._model.calls == []


def test_a_folder_is_named_with_or_without_the_word_whisper(library, folder, monkeypatch):
    assert load_recognizer(str(folder))._model.path == str(folder)
    assert load_recognizer(f"whisper:{folder}")._model.path == str(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_recognizer(f"whisper:~/{folder.name}")._model.path == str(folder)


def test_a_hub_id_is_fetched_once_and_only_the_models_own_files(library, folder, monkeypatch):
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return os.fspath(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_recognizer("whisper:Systran/faster-whisper-base")._model.path == str(folder)
    ((name, _, files),) = asked
    assert name == "Systran/faster-whisper-base"
    assert "model.bin" in files
    assert "*" not in files


def test_a_hub_id_without_a_connection_is_a_sentence(library, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(MetricError, match=r"Systran/faster-whisper-base.*connect, or name a folder"):
        WhisperRecognizer("Systran/faster-whisper-base")


def test_a_missing_extra_is_a_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    for source in (str(folder), "Systran/faster-whisper-base"):
        with pytest.raises(MetricError, match=r"revox\[whisper\]"):
            WhisperRecognizer(source)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "ears", ""])
def test_what_is_neither_a_folder_nor_a_hub_id_is_a_sentence(source):
    with pytest.raises(MetricError, match=r"there is no recognizer .*none, pocketsphinx"):
        WhisperRecognizer(source)


def test_a_whisper_of_transformers_names_its_successor(library, tmp_path):
    with pytest.raises(MetricError, match=r"give a faster-whisper model.*Systran/faster-whisper-small"):
        WhisperRecognizer("openai/whisper-small")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(MetricError, match=r"no model\.bin; .*ct2-transformers-converter"):
        WhisperRecognizer(str(tmp_path))


def test_without_its_tokenizer_a_model_is_refused_for_it_would_be_downloaded(library, folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MetricError, match=r"no tokenizer\.json"):
        WhisperRecognizer(str(folder))


def test_a_model_that_cannot_be_loaded_is_a_sentence(library, folder):
    library.error = RuntimeError("CUDA driver is missing\nand more")
    with pytest.raises(MetricError, match=r"on cuda \(CUDA driver is missing\)"):
        WhisperRecognizer(str(folder), "cuda")
