from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from revox.metrics.errors import MetricError
from revox.metrics.whisper import WhisperRecognizer
from revox.speech import Audio

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Whisper of two thin layers with random weights, saved as the real ones are."""
    folder = tmp_path_factory.mktemp("whisper")
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    vocabulary = {token: i for i, token in enumerate([*letters, *specials])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "normalizer.json").write_text("{}")
    tokenizer = transformers.WhisperTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    end, start = vocabulary["<|endoftext|>"], vocabulary["<|startoftranscript|>"]
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=12,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config.update(
        max_length=10, decoder_start_token_id=start, eos_token_id=end, pad_token_id=end, suppress_tokens=None,
        begin_suppress_tokens=None, forced_decoder_ids=None,
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def test_a_local_whisper_hears_what_transformers_itself_hears(folder):
    heard = WhisperRecognizer(str(folder)).transcribe(tone(2.0))
    processor = transformers.WhisperProcessor.from_pretrained(folder)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    features = processor(tone(2.0).samples, sampling_rate=16000, return_tensors="pt").input_features
    expected = processor.batch_decode(model.generate(features), skip_special_tokens=True)[0].strip()
    assert heard == expected
    assert heard  # random weights babble letters


def test_long_audio_is_heard_in_pieces_of_30_s(folder):
    recognizer = WhisperRecognizer(str(folder))
    first, second = tone(30.0), tone(1.0, 600)
    both = Audio(np.concatenate((first.samples, second.samples)), 16000)
    assert (
        recognizer.transcribe(both)
        == f"{recognizer.transcribe(first)} {recognizer.transcribe(second)}".strip()
    )


def test_silence_holds_no_words(folder):
    assert WhisperRecognizer(str(folder)).transcribe(Audio(np.zeros(16000), 16000)) == ""


def test_pickled_weights_are_refused(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
                 "vocab.json", "merges.txt", "processor_config.json"):  # fmt: skip
        if (folder / name).is_file():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MetricError, match="cannot be loaded as a Whisper"):
        WhisperRecognizer(str(tmp_path))


def test_a_folder_without_a_whisper_is_a_sentence(tmp_path):
    with pytest.raises(MetricError, match=r"name the folder of a Whisper"):
        WhisperRecognizer(str(tmp_path))


def tone(seconds, hertz=300):
    t = np.arange(round(16000 * seconds)) / 16000
    return Audio(0.3 * np.sin(2 * np.pi * hertz * t) * (1 + np.sin(2 * np.pi * 3 * t)), 16000)
