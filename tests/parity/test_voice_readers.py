"""A voice added by revox, read by other people's code: mistral-common's tokenizer, vllm-omni's loader."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import oracle as oracle_module
import pytest
import torch
from mistral_common.protocol.speech.request import SpeechRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from oracle import Oracle

from revox.checkpoint.voice_codes import embedding_of_codes, read_table
from revox.checkpoint.voices import add_voice, remove_voice

RECORD = {"method": "test", "consent": {"statement": "a synthetic voice"}}


@pytest.fixture
def with_ada(tiny_checkpoint_copy, tiny_config, tiny_preset_codes):
    """The tiny checkpoint with a voice `ada` of 17 frames, and its rows."""
    codes = tiny_preset_codes["hi_female"][:, :17]
    rows = embedding_of_codes(codes, read_table(tiny_checkpoint_copy), tiny_config)
    add_voice(tiny_checkpoint_copy, "ada", rows, codes, RECORD)
    return tiny_checkpoint_copy, rows


def prompt(folder, voice: str) -> list[int]:
    tokenizer = MistralTokenizer.from_file(str(folder / "tekken.json"))
    return tokenizer.encode_speech_request(SpeechRequest(input="hello", voice=voice)).tokens


def vllm_embeddings(oracle: Oracle, folder) -> dict[str, torch.Tensor]:
    """`voice_to_embedding` of vllm-omni's own model class, as its start-up fills it from the folder."""
    config = oracle.parse_params(json.loads((folder / "params.json").read_text()))
    tokenizer = MistralTokenizer.from_file(str(folder / "tekken.json")).instruct_tokenizer
    model_config = SimpleNamespace(hf_config=config, model=str(folder), model_stage="audio_generation")
    with oracle_module._imports_stubbed():
        # What the loader imports beside its own code; none of it touches voices.
        for name in ("model_executor.models.output_templates", "transformers_utils.repo_utils"):
            sys.modules[f"vllm_omni.{name}"] = oracle_module._StubModule(f"vllm_omni.{name}")
        module: Any = importlib.import_module(f"{oracle_module._MODELS}.voxtral_tts")
        module.cached_tokenizer_from_config = lambda _: SimpleNamespace(instruct=tokenizer)
        module.init_vllm_registered_model = lambda **_: torch.nn.Identity()
        module.VoxtralTTSForConditionalGeneration.set_custom_preprocess = lambda *_: None
        module.VoxtralTTSForConditionalGeneration.set_custom_postprocess = lambda *_: None
        model = module.VoxtralTTSForConditionalGeneration(
            vllm_config=SimpleNamespace(model_config=model_config)
        )
    return model.voice_to_embedding


def test_mistral_common_lays_out_a_prompt_with_one_audio_token_for_each_row(with_ada):
    folder, rows = with_ada
    tokenizer = MistralTokenizer.from_file(str(folder / "tekken.json"))
    audio = tokenizer.instruct_tokenizer.audio_encoder.special_ids.audio
    assert prompt(folder, "ada").count(audio) == len(rows) == 18
    for voice, count in json.loads((folder / "tekken.json").read_text())["audio"][
        "voice_num_audio_tokens"
    ].items():
        assert prompt(folder, voice).count(audio) == count


def test_vllm_omni_lists_and_loads_the_voice_beside_the_presets(with_ada, oracle):
    folder, rows = with_ada
    embeddings = vllm_embeddings(oracle, folder)
    assert len(embeddings) == 21
    assert embeddings["ada"].dtype == torch.bfloat16
    assert torch.equal(embeddings["ada"], rows)


def test_both_forget_a_removed_voice(with_ada, oracle):
    folder, _ = with_ada
    remove_voice(folder, "ada")
    assert "ada" not in vllm_embeddings(oracle, folder)
    with pytest.raises(Exception, match="Unknown voice 'ada'"):
        prompt(folder, "ada")
