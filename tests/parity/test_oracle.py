"""The oracle is the published package, imported without its vllm and without leaving anything behind."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import oracle as oracle_module
import pytest
from oracle import Oracle, OracleMissingError, load_oracle, release_params


def test_the_modules_are_those_of_the_installed_package(oracle: Oracle):
    root = Path(str(importlib.metadata.distribution("vllm-omni").locate_file("vllm_omni")))
    for module in (oracle.tokenizer, oracle.generation, oracle.parser):
        assert Path(module.__file__).is_relative_to(root)


def test_no_stand_in_stays_behind(oracle: Oracle):
    oracle.parse_params(release_params())
    assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "vllm_omni")]
    assert not [finder for finder in sys.meta_path if isinstance(finder, oracle_module._StubFinder)]


def test_vllm_omnis_own_parser_reads_the_releases_params(oracle: Oracle):
    config = oracle.parse_params(release_params())
    assert config.text_config.hidden_size == 3072
    assert config.audio_config["audio_model_args"]["acoustic_transformer_args"]["n_decoding_steps"] == 7
    assert len(config.audio_config["speaker_id"]) == 20


@pytest.mark.parametrize(
    ("found", "says"), [(None, "it is not installed"), ("0.28.0", "0.28.0 is installed")]
)
def test_without_the_package_the_comparisons_fail_with_the_command_that_installs_it(monkeypatch, found, says):
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(OracleMissingError, match=f"{says}: run `pip install --no-deps vllm-omni==0.30.0"):
        load_oracle.__wrapped__()
