"""What `revox deploy vllm-omni` writes, read by vllm-omni's own code (its wheel, with vllm stubbed)."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import revox.demo
from revox.checkpoint.errors import CheckpointError
from revox.deploy.errors import DeployError
from revox.deploy.facts import Facts
from revox.deploy.rules import find_problems
from revox.deploy.vllm_omni import (
    COMPOSE_NAME,
    DEPLOY_NAME,
    IMAGE,
    MARK,
    MATCHING,
    REQUIREMENTS_NAME,
    SCRIPT_NAME,
    VERSION,
    Deployment,
    mount_of,
    servable,
)

ODD_NAMES = (
    "plain",
    "with space",
    'quote\'s "here"',
    "$HOME ${PATH} $(touch owned) `touch owned`",
    "semi;colon & more | #hash",
    "-rf",
    "colon: [yaml] {x}: - ,",
    "ünï—文",
    "back\\slash",
)

# Of vllm-omni itself only what is asked about is real; these need vllm, or a GPU's libraries.
_REAL = (
    "vllm_omni.config.stage_config",
    "vllm_omni.config.yaml_util",
    "vllm_omni.config.endpoint_policy",
    "vllm_omni.model_executor.models.voxtral_tts.pipeline",
    "vllm_omni.entrypoints.cli.serve",
    "vllm_omni.utils.tracking_parser",
)
_NOT_NEEDED = ("vllm", "vllm_omni", "uvloop", "transformers")
_PACKAGES = {".".join(name.split(".")[:n]) for name in _REAL for n in range(1, name.count(".") + 1)}


class _Anything:
    """Stands for any class of a stubbed module."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        given = {
            "init_logger": lambda _: SimpleNamespace(warning=lambda *a, **k: None, info=lambda *a, **k: None),
            "FlexibleArgumentParser": argparse.ArgumentParser,
            "make_arg_parser": _vllm_flags,
            "VLLM_SUBCMD_PARSER_EPILOG": "",
            "is_diffusion_model": lambda _: False,
            "LoadBalancingPolicy": str,
            "resolve_native_single_file": lambda _: None,
            "validate_parsed_serve_args": lambda _: None,
            "platforms": SimpleNamespace(current_platform=SimpleNamespace(is_unspecified=lambda: False)),
            "internal_blacklist_keys": frozenset,
            "SHARED_FIELDS": frozenset({"model", "log_stats", "stage_id"}),
        }
        return given[name] if name in given else type(name, (_Anything,), {})


def _vllm_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of vllm's own that the command uses (docs.vllm.ai, cli/serve)."""
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tokenizer-mode", default="auto")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--headless", action="store_true")
    return parser


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name in _REAL or name.split(".")[0] not in _NOT_NEEDED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name) if spec.name in _PACKAGES else _Stub(spec.name)
        module.__path__ = [str(self.root.joinpath(*spec.name.split(".")))] if spec.name in _PACKAGES else []
        return module

    def exec_module(self, module: ModuleType) -> None: ...


@contextlib.contextmanager
def _wheel() -> Iterator[None]:
    root = Path(str(importlib.metadata.distribution("vllm-omni").locate_file("")))
    ours = [name for name in sys.modules if name.split(".")[0] in _NOT_NEEDED]
    before = {name: sys.modules.pop(name) for name in ours}
    finder = _Finder(root)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] in _NOT_NEEDED]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(scope="module")
def omni() -> Iterator[SimpleNamespace]:
    """vllm-omni's own modules: `config`, `pipeline`, `serve`, and the path of its own deploy file."""
    with _wheel():
        config = importlib.import_module("vllm_omni.config.stage_config")
        serve = importlib.import_module("vllm_omni.entrypoints.cli.serve")
        yield SimpleNamespace(
            config=config,
            pipeline=importlib.import_module(_REAL[3]).VOXTRAL_TTS_PIPELINE,
            serve=serve,
            own=Path(config.__file__).parent.parent / "deploy" / "voxtral_tts.yaml",
        )


def deployment(tmp_path: Path, **options: Any) -> Deployment:
    return Deployment(revox.demo.checkpoint_folder(), tmp_path / "out", **options)


def parse_command(omni: SimpleNamespace, words: list[str]) -> Any:
    """The words as vllm-omni's own command line takes them, validated by it."""
    parser = importlib.import_module("vllm_omni.utils.tracking_parser").TrackingArgumentParser()
    command = omni.serve.OmniServeCommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    found = parser.parse_args(words)
    command.validate(found)
    return found


def test_the_oracle_is_the_release_that_is_written_for():
    assert importlib.metadata.version("vllm-omni") == VERSION
    assert IMAGE.endswith(f":v{VERSION}")


def test_the_deploy_file_is_vllm_omnis_own_but_for_the_memory(omni, tmp_path):
    plan = deployment(tmp_path, gpu_memory=0.45)
    path, _ = plan.write()[:2]
    ours, theirs = omni.config.load_deploy_config(path), omni.config.load_deploy_config(omni.own)
    assert [stage.gpu_memory_utilization for stage in theirs.stages] == [0.8, 0.1]
    assert [stage.gpu_memory_utilization for stage in ours.stages] == [0.4, 0.05]
    for stage, their_stage in zip(ours.stages, theirs.stages, strict=True):
        stage.gpu_memory_utilization = their_stage.gpu_memory_utilization
    assert ours.stages == theirs.stages
    assert ours.connectors == theirs.connectors
    assert (ours.async_chunk, ours.model_runner, ours.session_mode) == (True, "v1", "turn")
    assert ours.pipeline == omni.pipeline.model_type


def test_vllm_omni_builds_two_stages_of_it_with_the_shares_that_were_asked_for(omni, tmp_path, monkeypatch):
    monkeypatch.setattr(omni.config, "_apply_platform_overrides", lambda deploy: deploy)
    path = deployment(tmp_path, gpu_memory=0.5).write()[0]
    stages = omni.config.merge_pipeline_deploy(omni.pipeline, omni.config.load_deploy_config(path))
    assert [stage.model_stage for stage in stages] == ["audio_generation", "audio_tokenizer"]
    shares = [stage.yaml_engine_args["gpu_memory_utilization"] for stage in stages]
    assert sum(shares) == pytest.approx(0.5)
    assert all(stage.yaml_engine_args["tokenizer_mode"] == "mistral" for stage in stages)
    assert all(stage.yaml_runtime["devices"] == "0" for stage in stages)


def test_fp8_reaches_the_stage_of_the_language_model_and_is_left_out_otherwise(omni, tmp_path, monkeypatch):
    monkeypatch.setattr(omni.config, "_apply_platform_overrides", lambda deploy: deploy)
    found = []
    for quantization in (None, "fp8"):
        path = deployment(tmp_path, quantization=quantization).write()[0]
        config = omni.config.load_deploy_config(path)
        stages = omni.config.merge_pipeline_deploy(omni.pipeline, config)
        found.append((config.quantization, stages[0].yaml_engine_args.get("quantization")))
    assert found == [(None, None), ("fp8", "fp8")]
    # The wheel's model gives the language model alone a quantized form, and none to the codec's stage.
    model = omni.own.parents[1] / "model_executor" / "models" / "voxtral_tts"
    assert (
        "language_model=fp8, acoustic_transformer=bf16, audio_tokenizer=bf16"
        in (model / "voxtral_tts_audio_generation.py").read_text()
    )
    assert "replace(vllm_config, quant_config=None)" in (model / "voxtral_tts.py").read_text()


def test_a_memory_flag_would_go_to_both_stages_as_the_trap_says(omni):
    for stage in (0, 1):
        passed = omni.config.build_stage_runtime_overrides(stage, {"gpu_memory_utilization": 0.8})
        assert passed == {"gpu_memory_utilization": 0.8}


def test_the_removed_format_is_refused_as_the_trap_says(omni, tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text("stage_args:\n  - stage_id: 0\n")
    with pytest.raises(ValueError, match="stage_args"):
        omni.config.load_deploy_config(old)


@pytest.mark.parametrize("gpu_memory", [0.01, 0.0123, 0.3, 1 / 3, 0.33337, 0.55, 0.9, 0.95, 1.0])
def test_the_two_shares_never_sum_to_more_than_was_given(tmp_path, gpu_memory):
    first, second = deployment(tmp_path, gpu_memory=gpu_memory).shares
    assert 0 < second < first <= 1
    assert gpu_memory - 1e-4 < first + second <= gpu_memory + 1e-9


def test_the_command_is_taken_by_vllm_omnis_own_command_line(omni, tmp_path):
    plan = deployment(tmp_path, port=9123, host="0.0.0.0")
    program, *words = plan.command()
    parsed = parse_command(omni, words)
    assert program == "vllm-omni"
    assert parsed.model_tag == str(revox.demo.checkpoint_folder().resolve())
    assert (parsed.omni, parsed.tokenizer_mode, parsed.port, parsed.host) == (
        True,
        "mistral",
        9123,
        "0.0.0.0",
    )
    assert parsed.deploy_config == str((tmp_path / "out" / DEPLOY_NAME).resolve())
    assert "gpu_memory_utilization" not in parsed.explicit_keys


def test_vllm_omnis_command_line_has_no_stage_configs_path_any_more(omni, capsys):
    with pytest.raises(SystemExit):
        parse_command(omni, ["serve", "x", "--omni", "--stage-configs-path", "y"])
    assert "--stage-configs-path" in capsys.readouterr().err


def test_the_compose_files_command_is_taken_too(omni, tmp_path):
    service = compose_service(deployment(tmp_path, gpu=3, port=9001))
    parsed = parse_command(omni, service["command"])
    assert (parsed.model_tag, parsed.deploy_config) == ("/model", f"/deploy/{DEPLOY_NAME}")
    assert (parsed.host, parsed.port) == ("0.0.0.0", 8000)
    assert service["entrypoint"] == ["vllm-omni"]
    asked = service["healthcheck"]["test"]
    assert asked[:3] == ["CMD", "python3", "-c"]
    assert f"http://127.0.0.1:{parsed.port}/health" in asked[3]
    compile(asked[3], "healthcheck", "exec")
    assert service["ports"] == ["127.0.0.1:9001:8000"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["3"]
    assert all(volume["read_only"] for volume in service["volumes"])


def compose_service(plan: Deployment) -> dict[str, Any]:
    return yaml.safe_load(plan.compose_yaml())["services"]["voxtral"]


def test_none_of_the_traps_is_in_what_is_written(tmp_path):
    plan = deployment(tmp_path)
    scene = Facts(
        words=tuple(plan.command()), deploy=yaml.safe_load(plan.deploy_yaml()), report=servable(plan.folder)
    )
    assert find_problems(scene) == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_folder_names_reach_the_shell_and_compose_as_they_are(omni, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    plan = Deployment(folder, tmp_path / f"{name} out")
    environment = {"PATH": f"{fake_program(tmp_path / 'bin')}:/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "-c", plan.shell_command()],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.split("\0")[1:-1] == plan.command()[1:]
    parsed = parse_command(omni, plan.command()[1:])
    assert (parsed.model_tag, parsed.served_model_name) == (str(folder), [name])
    assert plan.command()[2] == str(folder)
    assert not (tmp_path / "owned").exists()
    service = compose_service(plan)
    assert service["volumes"][0]["source"].replace("$$", "$") == str(folder)
    assert service["volumes"][1]["source"].replace("$$", "$") == str(tmp_path / f"{name} out" / DEPLOY_NAME)
    # Compose takes $NAME and ${NAME} for variables; only doubled dollars stay.
    everything = [volume["source"] for volume in service["volumes"]] + service["command"]
    assert all("$" not in text.replace("$$", "") for text in everything)


def fake_program(folder: Path) -> Path:
    """A folder with a `vllm-omni` that prints its GPU and its words."""
    folder.mkdir()
    program = folder / "vllm-omni"
    program.write_text('#!/bin/sh\nprintf \'%s\\0\' "$CUDA_VISIBLE_DEVICES" "$@"\n')
    program.chmod(0o755)
    return folder


def test_the_script_runs_the_command_on_the_gpu_that_was_named(tmp_path):
    plan = Deployment(revox.demo.checkpoint_folder(), tmp_path / "it's out", gpu=2)
    plan.write()
    environment = {"PATH": f"{fake_program(tmp_path / 'bin')}:/usr/bin:/bin"}
    script = plan.out / SCRIPT_NAME
    done = subprocess.run([script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split("\0")[:-1] == ["2", *plan.command()[1:]]


def test_names_that_no_compose_file_can_hold_are_refused(tmp_path):
    for name in ("line\nbreak", "escape\x1b[2J", "not-utf8-\udcff"):
        with pytest.raises(DeployError, match="rename the folder"):
            Deployment(tmp_path / name, tmp_path / "out")


def test_a_hub_caches_snapshot_is_mounted_with_the_blobs_that_it_links_to(tmp_path):
    repository = tmp_path / "models--mistralai--Voxtral"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(revox.demo.checkpoint_folder(), snapshot)
    (repository / "blobs").mkdir()
    (snapshot / "params.json").rename(repository / "blobs" / "123")
    (snapshot / "params.json").symlink_to("../../blobs/123")
    assert mount_of(snapshot) == (repository, Path("snapshots/abc"))
    service = compose_service(Deployment(snapshot, tmp_path / "out"))
    assert service["volumes"][0]["source"] == str(repository)
    assert service["command"][1] == "/model/snapshots/abc"


def test_links_that_a_container_would_not_see_are_said(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(revox.demo.checkpoint_folder(), folder)
    (folder / "params.json").rename(tmp_path / "elsewhere.json")
    (folder / "params.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DeployError, match="cp -rL"):
        Deployment(folder, tmp_path / "out").write()
    assert not (tmp_path / "out").exists()


def test_links_of_a_snapshot_to_outside_of_its_repository_are_said(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "params.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeployError, match="cp -rL"):
        mount_of(snapshot)


def test_a_link_or_a_pipe_of_somebody_else_is_not_written_through_nor_waited_for(tmp_path, monkeypatch):
    opened = "revox.deploy.vllm_omni.open"
    monkeypatch.setattr(opened, lambda *_, **__: pytest.fail("a pipe would wait"), raising=False)
    plan = deployment(tmp_path)
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "nowhere"), Path.mkdir):
        plan.out.mkdir()
        make(plan.out / SCRIPT_NAME)
        with pytest.raises(DeployError, match="not written by `revox deploy vllm-omni`"):
            plan.write()
        assert [path.name for path in plan.out.iterdir()] == [SCRIPT_NAME]
        subprocess.run(["rm", "-r", plan.out], check=True)
    assert not (tmp_path / "nowhere").exists()


def test_files_of_somebody_else_are_left_alone_and_own_ones_replaced(tmp_path):
    plan = deployment(tmp_path)
    plan.write()
    before = (plan.out / DEPLOY_NAME).read_text()
    deployment(tmp_path, gpu_memory=0.3).write()
    assert (plan.out / DEPLOY_NAME).read_text() != before
    (plan.out / COMPOSE_NAME).write_text("services: {}\n")
    with pytest.raises(DeployError, match="not written by `revox deploy vllm-omni`"):
        plan.write()
    assert (plan.out / COMPOSE_NAME).read_text() == "services: {}\n"
    assert (plan.out / DEPLOY_NAME).read_text() != before


def test_every_file_says_whose_it_is(tmp_path):
    for path in deployment(tmp_path).write():
        assert MARK in path.read_text()


def test_the_versions_written_are_those_that_the_wheels_ask_for(tmp_path):
    wanted = {Requirement(line).name: Requirement(line) for line in importlib.metadata.requires("vllm-omni")}
    assert (
        wanted["transformers"].specifier == Requirement(f"transformers{MATCHING['transformers']}").specifier
    )
    path = next(p for p in deployment(tmp_path).write() if p.name == REQUIREMENTS_NAME)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert {Requirement(line).name for line in lines} == set(MATCHING)
    versions = {Requirement(line).name: str(Requirement(line).specifier) for line in lines}
    assert versions["vllm"].split(".")[:2] == versions["vllm-omni"].split(".")[:2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu_memory": 0.0}, "--gpu-memory"),
        ({"gpu_memory": 1.01}, "--gpu-memory"),
        ({"gpu_memory": float("nan")}, "--gpu-memory"),
        ({"port": 0}, "--port"),
        ({"port": 65536}, "--port"),
        ({"gpu": -1}, "--gpu"),
        ({"host": "0.0.0.0 --trust-remote-code"}, "--host"),
        ({"host": ""}, "--host"),
        ({"quantization": "int8"}, "--quantization is 'int8', expected fp8"),
    ],
)
def test_options_that_cannot_be_are_sentences(tmp_path, options, said):
    with pytest.raises(DeployError, match=said):
        deployment(tmp_path, **options)


def test_an_address_of_version_6_stays_apart_from_the_port(tmp_path):
    assert compose_service(deployment(tmp_path, host="::1"))["ports"] == ["[::1]:8000:8000"]


def test_a_hub_id_and_a_folder_that_is_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(DeployError, match="local folder only"):
        servable(Path("mistralai/Voxtral-4B-TTS-2603"))
    with pytest.raises(CheckpointError):
        servable(tmp_path)


def test_the_shell_command_splits_into_its_words(tmp_path):
    plan = deployment(tmp_path)
    assert shlex.split(plan.shell_command()) == plan.command()
