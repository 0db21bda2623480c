"""Each known problem: facts that have it, and the same facts with the fix, which do not."""

from __future__ import annotations

import shlex
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from revox.deploy.facts import Facts, Gpu, Package, parse_serve, stages_of
from revox.deploy.rules import RULES, find_problems

DEPLOY = {
    "stages": [
        {"stage_id": 0, "gpu_memory_utilization": 0.8, "devices": "0", "tokenizer_mode": "mistral"},
        {"stage_id": 1, "gpu_memory_utilization": 0.1, "devices": "0", "tokenizer_mode": "mistral"},
    ]
}
NESTED = {"stages": [{"stage_id": s["stage_id"], "engine_args": s} for s in DEPLOY["stages"]]}
SERVE = "vllm-omni serve /model --omni --deploy-config d.yaml --tokenizer-mode mistral"
H200 = Gpu("NVIDIA H200", 150 * 10**9, 149 * 10**9)
BUSY = Gpu("busy", 24 * 10**9, 5 * 10**9)


def packages(
    omni: str = "0.30.0", vllm: str = "0.30.0", **others: str | None
) -> dict[str, tuple[Package, ...]]:
    """An environment in which all is well, with other versions; None takes a package out."""
    versions: dict[str, str | None] = {
        "torch": "2.13.0",
        "vllm": vllm,
        **{name.replace("_", "-"): version for name, version in others.items()},
    }
    found = {name: (Package(version, "/venv"),) for name, version in versions.items() if version}
    return found | {"vllm-omni": (Package(omni, "/venv"),)}


def voice(name: str = "ada", **changes: Any) -> SimpleNamespace:
    given = {"name": name, "file": f"{name}.pt", "rows": 12, "tekken_rows": 12, "in_params": True}
    return SimpleNamespace(**{**given, **changes})


def report(encoder: str = "absent", *voices: SimpleNamespace) -> Any:
    return SimpleNamespace(encoder=encoder, bytes=8_000_000_000, voices=list(voices or (voice(),)))


def facts(command: str = SERVE, **changes: Any) -> Facts:
    """Facts without a problem, changed."""
    given: dict[str, Any] = {
        "words": tuple(shlex.split(command)),
        "packages": packages(),
        "python": "3.12",
        "deploy": DEPLOY,
        "machine": "x86_64",
        "report": report(),
        "gpus": (H200,),
    }
    return Facts(**{**given, **changes})


def at(version: str, command: str = SERVE, **changes: Any) -> Facts:
    return facts(command, packages=packages(version, version), **changes)


def deploy(first: Any, second: Any = 0.1, **fields: Any) -> dict[str, Any]:
    shares = (first, second)
    return {
        "stages": [
            {**s, "gpu_memory_utilization": v, **fields}
            for s, v in zip(DEPLOY["stages"], shares, strict=True)
        ]
    }


def apart(first: Any, second: Any) -> dict[str, Any]:
    """The stages on GPUs 0 and 1."""
    stages = deploy(first, second)["stages"]
    return {"stages": [{**stage, "devices": str(number)} for number, stage in enumerate(stages)]}


BARE = "vllm serve /model --omni"
OLD_COMMAND = "vllm serve /model --omni --tokenizer-mode mistral --stage-configs-path s.yaml"
IMAGE = "docker run --gpus all vllm/vllm-omni"
CASES: list[tuple[str, str, Facts, Facts]] = [
    ("old-version", "found vllm-omni 0.28.0, at least 0.30 is needed", at("0.28.0"), at("0.30.0")),
    ("old-version", "found vllm-omni 0.18", at("0.18.0", OLD_COMMAND), at("0.32.1")),
    (
        "old-version",
        "found vllm-omni 0.24",
        facts(f"{IMAGE}:v0.24.0 --model /m", packages=None, deploy=None),
        facts(f"{IMAGE}:v0.30.0 --model /m", packages=None, deploy=None),
    ),
    ("no-omni", "--omni", facts("vllm serve /model --tokenizer-mode mistral"), facts()),
    ("no-omni", "--omni", facts("docker run vllm/vllm-omni:v0.30.0 vllm serve /m"), facts()),
    (
        "no-omni",
        "--omni",
        facts("python -m vllm.entrypoints.openai.api_server --model /m"),
        facts(f"{IMAGE}:v0.30.0 --model /m --port 8091", packages=None, deploy=None),
    ),
    (
        "tokenizer-mode",
        "is auto",
        facts(f"{BARE} --tokenizer-mode auto"),
        facts(f"{BARE} --tokenizer_mode=mistral"),
    ),
    ("tokenizer-mode", "stage 0, 1", facts(BARE, deploy=deploy(0.8, tokenizer_mode="auto")), facts(BARE)),
    (
        "tokenizer-mode",
        "stage 0, 1",
        facts(BARE, deploy=deploy(0.8, tokenizer_mode="")),
        facts(BARE, deploy=NESTED),
    ),
    ("stage-config", "no longer has", facts(OLD_COMMAND, deploy=None), facts(SERVE)),
    ("stage-config", "no stages", facts(deploy={"stage_args": DEPLOY["stages"]}), facts(deploy=NESTED)),
    ("stage-config", "has 0 stages, expected", facts(deploy={"stages": DEPLOY["stages"][:1]}), facts()),
    (
        "stage-config",
        "no stages",
        facts(deploy={"stages": "both"}),
        facts(deploy={"base_config": "x.yaml"}),
    ),
    ("stage-config", "gone", facts(deploy=None, deploy_problem="d.yaml is gone"), facts()),
    (
        "stage-config",
        "model_type 'mistral'",
        facts(BARE, deploy=None, other_model_type="mistral"),
        facts(SERVE, other_model_type="mistral"),
    ),
    ("memory-flag", "applies to both", facts(f"{SERVE} --gpu_memory_utilization=0.8"), facts()),
    (
        "memory-flag",
        "applies to both",
        facts(f"{SERVE} --gpu-memory-utilization 0.3", packages=None),
        facts(f"{SERVE} --stage-overrides '{{}}'", packages=None),
    ),
    ("memory-sum", "sum to 1.1", facts(deploy=deploy(1.0)), facts(deploy=deploy(0.85))),
    ("memory-sum", "share 80", facts(deploy=deploy(80)), facts(deploy=deploy(0.8))),
    (
        "memory-sum",
        "GPU 3",
        facts(deploy=deploy(0.8, 0.3, devices="3")),
        facts(deploy=deploy(0.8, 0.2, devices="3")),
    ),
    (
        "version-pair",
        "vllm 0.28.0 is installed with",
        facts(packages=packages(vllm="0.28.0")),
        facts(packages=packages(vllm="0.30.2")),
    ),
    ("version-pair", "without vllm", facts(packages=packages(vllm="")), facts()),
    ("old-version", "found vllm-omni dev, at least", facts(packages=packages(omni="dev")), facts()),
    (
        "old-version",
        "0.1.dev1",
        facts(packages=packages(omni="0.1.dev1+g1")),
        facts(packages=packages(omni="0.30.0rc1")),
    ),
    (
        "architecture",
        "linux/amd64",
        facts("docker run --platform linux/amd64 vllm/vllm-omni:v0.30.0", machine="aarch64"),
        facts("docker run --platform linux/arm64 vllm/vllm-omni:v0.30.0", machine="aarch64"),
    ),
    (
        "architecture",
        "x86_64.whl",
        facts("pip install v-cp38-abi3-manylinux_2_28_x86_64.whl", machine="arm64"),
        facts("pip install v-cp38-abi3-manylinux_2_28_x86_64.whl"),
    ),
    (
        "architecture",
        "linux/amd64",
        facts(machine="aarch64", environment={"DOCKER_DEFAULT_PLATFORM": "linux/amd64"}),
        facts(SERVE.replace("/model", "/data/amd64/model"), machine="aarch64"),
    ),
    (
        "architecture",
        "without CUDA",
        facts(packages=packages(torch="2.9.0+cpu")),
        facts(packages=packages(torch="2.9.0+cu130")),
    ),
    (
        "shared-environment",
        "installed 2 times",
        facts(packages=packages() | {"vllm": (Package("0.30.0", "/venv"), Package("0.9.0", "/usr"))}),
        facts(),
    ),
    (
        "shared-environment",
        "different folders",
        facts(packages=packages() | {"vllm": (Package("0.30.0", "/usr"),)}),
        facts(),
    ),
    (
        "room",
        "weights alone",
        facts(gpus=(Gpu("small", 9 * 10**9, 9 * 10**9),)),
        facts(gpus=(Gpu("g", 24 * 10**9, 23 * 10**9),)),
    ),
    ("room", "5.0 GB are free", facts(gpus=(Gpu("busy", 24 * 10**9, 5 * 10**9),)), facts()),
    (
        "room",
        "are free",
        facts(gpus=(Gpu("shared", 80 * 10**9, 30 * 10**9),)),
        facts(gpus=(Gpu("shared", 80 * 10**9, 30 * 10**9),), deploy=deploy(0.3, 0.03)),
    ),
    (
        "room",
        "5.0 GB are free",
        facts(gpus=(H200, BUSY), environment={"CUDA_VISIBLE_DEVICES": "1"}),
        facts(gpus=(BUSY, H200), environment={"CUDA_VISIBLE_DEVICES": "1"}),
    ),
    (
        "room",
        "5.0 GB are free",
        facts(gpus=(H200, BUSY), deploy=deploy(0.8, devices="1")),
        facts(gpus=(BUSY, H200), deploy=deploy(0.8, devices="1")),
    ),
    (
        "room",
        "of busy, and 5.0 GB are free",
        facts(gpus=(H200, BUSY), deploy=apart(0.8, 0.9)),
        facts(gpus=(H200, BUSY), deploy=apart(0.8, 0.2)),
    ),
    (
        "room",
        "5.0 GB are free",
        facts(gpus=(BUSY, H200), deploy=apart(0.9, 0.3), environment={"CUDA_VISIBLE_DEVICES": "1,0"}),
        facts(gpus=(BUSY, H200), deploy=apart(0.9, 0.2), environment={"CUDA_VISIBLE_DEVICES": "1,0"}),
    ),
    ("model-path", "./m is not here", facts(missing_model="./m"), facts()),
    ("voices", "not lower case", facts(report=report("absent", voice("Ada"))), facts()),
    ("voices", "is missing", facts(report=report("absent", voice(rows=None))), facts()),
    ("voices", "params.json does not list", facts(report=report("absent", voice(in_params=False))), facts()),
    ("voices", "ada.pt is missing", facts(report=report("absent", voice(file="ada.safetensors"))), facts()),
    ("voices", "tekken.json says 11", facts(report=report("absent", voice(tekken_rows=11))), facts()),
    ("voices", "tekken.json says None", facts(report=report("absent", voice(tekken_rows=None))), facts()),
    (
        "ref-audio",
        "a part of the codec encoder",
        facts(report=report("partial")),
        facts(report=report("complete")),
    ),
]


@pytest.mark.parametrize(
    ("name", "message", "broken", "fixed"), CASES, ids=[f"{c[0]}-{c[1][:20]}" for c in CASES]
)
def test_a_rule_finds_its_problem_and_nothing_after_the_fix(name, message, broken, fixed):
    found = [finding for finding in find_problems(broken) if finding.rule == name]
    assert any(message in finding.message for finding in found), find_problems(broken)
    assert [finding for finding in find_problems(fixed) if finding.rule == name] == []


def test_every_rule_has_a_case_a_reason_a_fix_and_a_source():
    assert {case[0] for case in CASES} == set(RULES)
    for _, _, broken, _ in CASES:
        for finding in find_problems(broken):
            assert finding.message
            assert finding.fix
            why, _, sources = finding.why.partition(" Sources: ")
            assert why.endswith(".")
            assert sources.endswith(".")


@pytest.mark.parametrize("visible", ["GPU-1234", "-1", "7", "MIG-1", "", "0,x"])
def test_gpus_that_cannot_be_told_are_not_judged(visible):
    given = facts(
        gpus=(BUSY,), environment={"CUDA_VISIBLE_DEVICES": visible}, deploy=deploy(0.8, devices="1")
    )
    assert find_problems(given) == []


def test_facts_without_a_problem_have_no_findings():
    assert find_problems(facts()) == []
    assert find_problems(Facts()) == []


def test_a_version_that_is_too_old_is_one_sentence_and_nothing_else():
    found = find_problems(at("0.28.0", "vllm serve /model", report=report("partial")))
    assert [(finding.rule, finding.stops) for finding in found] == [("old-version", True)]
    assert "upgrade" in found[0].fix


def test_what_stops_the_server_comes_first():
    gone = report("absent", voice("Ada", rows=None))
    found = find_problems(facts("vllm serve /model --gpu-memory-utilization 0.3", report=gone))
    # The memory flag surprises, and is looked at before the voice without its file, which stops.
    assert [(finding.rule, finding.stops) for finding in found] == [
        ("no-omni", True),
        ("voices", True),
        ("memory-flag", False),
        ("voices", False),
    ]


def test_a_flag_for_both_stages_is_counted_twice_where_room_is_counted():
    busy = (Gpu("busy", 24 * 10**9, 20 * 10**9),)
    with_flag = find_problems(
        facts(f"{SERVE} --gpu-memory-utilization 0.45", gpus=busy, deploy=deploy(0.45, 0.05))
    )
    without = find_problems(facts(gpus=busy, deploy=deploy(0.45, 0.05)))
    assert "room" in {finding.rule for finding in with_flag}
    assert "room" not in {finding.rule for finding in without}


def test_memory_for_both_stages_stops_only_where_it_cannot_fit():
    def stops(value: str) -> bool:
        found = find_problems(facts(f"{SERVE} --gpu-memory-utilization {value}", gpus=()))
        return next(finding.stops for finding in found if finding.rule == "memory-flag")

    assert stops("0.51")
    assert not stops("0.5")
    assert not stops("nan")


@pytest.mark.parametrize(
    "command",
    [
        "vllm serve /m --omni",
        "vllm serve --omni /m",
        "/venv/bin/vllm serve /m --omni --port 1",
        "vllm-omni serve /m --omni=",
        "python3 -m vllm_omni.entrypoints.cli.main serve --enforce-eager /m --omni",
        "docker run --gpus all -v /a:/m vllm/vllm-omni:v0.28.0 vllm serve /m --omni",
        "sudo docker run vllm/vllm-omni:v0.28.0 vllm serve /m --omni",
        "nohup vllm serve --trust_remote_code /m --omni",
    ],
)
def test_commands_that_serve_are_understood(command):
    serve = parse_serve(shlex.split(command))
    assert serve is not None
    assert serve.model == "/m"
    assert "omni" in serve.flags
    assert serve.image_version == ("0.28.0" if "docker" in command else None)


def test_a_folder_that_is_mounted_is_not_taken_for_the_image():
    words = shlex.split("docker run -v /srv/vllm -v ./vllm:/x vllm/vllm-omni:v0.28.0 --model /m --omni")
    assert parse_serve(words).image == "vllm/vllm-omni:v0.28.0"


@pytest.mark.parametrize(
    "command", ["", "ls -l", "vllm bench", "pip install vllm", "docker run redis:7", "vllm"]
)
def test_commands_that_do_not_serve_are_left_alone(command):
    assert parse_serve(shlex.split(command)) is None


def test_an_images_version_stands_for_the_installed_one():
    inside = facts("docker run vllm/vllm-omni:v0.28.0 vllm serve /m --omni", packages=None)
    assert inside.omni == (0, 28)
    assert replace(inside, packages=packages("0.30.1")).omni == (0, 30)
    assert facts("docker run vllm/vllm-omni:latest vllm serve /m --omni", packages=None).omni is None


@pytest.mark.parametrize(
    "odd", [{}, {"stages": None}, {"stages": [1, None, []]}, {"stages": [{"engine_args": 3}]}]
)
def test_deploy_files_of_any_shape_are_checked_without_failing(odd):
    assert isinstance(stages_of(odd), list)
    assert find_problems(facts(deploy=odd))
