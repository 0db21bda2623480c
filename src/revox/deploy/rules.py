"""Known problems of serving Voxtral TTS with vllm-omni: how each shows, why it happens, how to fix it.

A rule looks at `Facts` (what `revox.deploy.gather` learned about a command, an environment, a folder and a
machine) and yields findings. Rules do no I/O, and a rule does not judge what was not observed. "Wheel" in a
source is the published vllm-omni wheel of that version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from revox.deploy.facts import OLDEST, Facts, Gpu, minor, stages_of


@dataclass(frozen=True)
class RuleFinding:
    """What a rule's check yields: `stops` if the server will not start or will die, else a surprise.

    rule, why: the name of the rule, and the cause with its sources, which `find_problems` sets.
    """

    stops: bool
    message: str
    fix: str
    rule: str = ""
    why: str = ""


Check = Callable[[Facts], Iterator[RuleFinding]]

RULES: dict[str, Check] = {}
"""Every rule by its name, in the order of a deployment."""


def rule(check: Check) -> Check:
    """Register a check as a rule of its name; its docstring is the cause, which users are told."""
    RULES[check.__name__.strip("_").replace("_", "-")] = check
    return check


def find_problems(facts: Facts) -> list[RuleFinding]:
    """All findings, those that stop the server first; of a version that is too old, that alone."""
    found = [
        replace(one, rule=name, why=" ".join((check.__doc__ or "").split()))
        for name, check in RULES.items()
        for one in check(facts)
    ]
    too_old = [finding for finding in found if finding.rule == "old-version"]
    return too_old or sorted(found, key=lambda finding: not finding.stops)


def _stops(message: str, fix: str) -> RuleFinding:
    return RuleFinding(True, message, fix)


def _warns(message: str, fix: str) -> RuleFinding:
    return RuleFinding(False, message, fix)


# ----------------------------------------------------------------------------------------- command and files


@rule
def _old_version(facts: Facts) -> Iterator[RuleFinding]:
    """Older versions have other flags and files, and one request with ref_audio stops their engine if the
    folder has no encoder. A build from source without git's tags calls itself dev or 0.1.dev1.

    Sources: https://github.com/vllm-project/vllm-omni/pull/7012,
    https://github.com/gpustack/gpustack/issues/5427,
    https://github.com/vllm-project/vllm-omni/pull/1224, setup.py (get_vllm_omni_version).
    """
    installed = facts.package("vllm-omni")
    if installed is not None:
        found, release = installed.version, minor(installed.version) or (0, 0)
    else:
        release = facts.omni or OLDEST
        found = _dotted(release)
    if release < OLDEST:
        yield _stops(
            f"found vllm-omni {found}, at least {_dotted(OLDEST)} is needed",
            "upgrade vllm and vllm-omni together (`revox deploy vllm-omni` writes matching requirements); "
            "build from source with git's tags or SETUPTOOLS_SCM_PRETEND_VERSION",
        )


@rule
def _no_omni(facts: Facts) -> Iterator[RuleFinding]:
    """Without --omni the command line is plain vllm's, which has no Voxtral TTS.

    Sources: wheel 0.30.0, vllm_omni/entrypoints/cli/main.py,
    https://github.com/vllm-project/vllm/issues/34545.
    """
    serve = facts.serve
    if serve is not None and "omni" not in serve.flags and not serve.by_entrypoint:
        yield _stops("the command has no --omni", "add --omni")


@rule
def _tokenizer_mode(facts: Facts) -> Iterator[RuleFinding]:
    """Only mistral's tokenizer reads tekken.json; without it the server exits with `This model requires
    --tokenizer-mode mistral`.

    Sources: wheel 0.30.0, vllm_omni/model_executor/models/voxtral_tts/voxtral_tts_audio_generation.py.
    """
    serve = facts.serve
    if serve is None:
        return
    if "tokenizer-mode" in serve.flags:
        mode = serve.flags["tokenizer-mode"]
        if mode != "mistral":
            yield _stops(f"--tokenizer-mode is {mode or 'empty'}", "pass --tokenizer-mode mistral")
        return
    # Without a file vllm-omni takes its own, which sets the mode for both stages.
    if facts.deploy is not None and "base_config" not in facts.deploy:
        stages = stages_of(facts.deploy)
        missing = [str(s.get("stage_id")) for s in stages if s.get("tokenizer_mode") != "mistral"]
        if missing:
            where = f"neither the command nor stage {', '.join(missing)} of the file"
            yield _stops(f"{where} sets tokenizer_mode: mistral", "add --tokenizer-mode mistral")


@rule
def _stage_config(facts: Facts) -> Iterator[RuleFinding]:
    """Without a file for its two stages vllm-omni loads a plain Mistral: `no module or parameter named
    acoustic_transformer`; the flag and the format of versions before 0.28 are gone.

    Sources: https://github.com/vllm-project/vllm-omni/issues/3571,
    https://github.com/vllm-project/vllm-omni/issues/2388, wheel 0.30.0, vllm_omni/entrypoints/cli/serve.py
    and config/stage_config.py.
    """
    serve = facts.serve
    if serve is None:
        return
    write = "`revox deploy vllm-omni` writes one"
    if facts.deploy_problem is not None:
        yield _stops(facts.deploy_problem, f"name an existing YAML file; {write}")
    if "stage-configs-path" in serve.flags:
        yield _stops("vllm-omni no longer has --stage-configs-path", f"pass --deploy-config; {write}")
    elif "deploy-config" not in serve.flags and facts.other_model_type is not None:
        yield _stops(
            f"config.json in the folder has model_type {facts.other_model_type!r}, and vllm-omni picks its "
            "deploy file by that",
            f"pass a --deploy-config with `pipeline: voxtral_tts`; {write}",
        )
    if facts.deploy is not None and "base_config" not in facts.deploy:
        ids = sorted(str(stage.get("stage_id")) for stage in stages_of(facts.deploy))
        if ids != ["0", "1"]:
            yield _stops(f"the file has {', '.join(ids) or 'no'} stages, expected `stages` 0 and 1", write)


@rule
def _model_path(facts: Facts) -> Iterator[RuleFinding]:
    """vllm takes a path that is not there for the name of a repository on the hub, and finds none.

    Sources: vllm/transformers_utils/config.py (get_config).
    """
    if facts.missing_model is not None:
        message = f"the model {facts.missing_model} is not here"
        yield _stops(message, "name the checkpoint's folder; a path counts from the current folder")


# ---------------------------------------------------------------------------------------------------- memory


@rule
def _memory_flag(facts: Facts) -> Iterator[RuleFinding]:
    """--gpu-memory-utilization is one number, and vllm-omni applies it to both stages, which share one
    GPU.

    Sources: https://github.com/vllm-project/vllm-omni/pull/2516, wheel 0.30.0,
    vllm_omni/config/stage_config.py (build_stage_runtime_overrides).
    """
    serve = facts.serve
    if serve is None or "gpu-memory-utilization" not in serve.flags:
        return
    value = serve.number("gpu-memory-utilization")
    yield RuleFinding(
        value is not None and 2 * value > 1,
        f"--gpu-memory-utilization {serve.flags['gpu-memory-utilization']} applies to both stages",
        "drop it and set gpu_memory_utilization for each stage in the file (or with --stage-overrides)",
    )


@rule
def _memory_sum(facts: Facts) -> Iterator[RuleFinding]:
    """Each stage is an engine of its own that reserves its share of the whole GPU at start.

    Sources: wheel 0.30.0, vllm_omni/worker/base.py (determine_available_memory).
    """
    sums: dict[str, float] = {}
    for stage in stages_of(facts.deploy or {}):
        share = _share(stage)
        if share is not None and not 0 < share <= 1:
            message = f"stage {stage.get('stage_id')} has the share {share:g} of a GPU"
            yield _stops(message, "set 0 < share <= 1")
        for device in _devices(stage):
            sums[device] = sums.get(device, 0.0) + (share or 0.0)
    for device, total in sums.items():
        if total > 1 + 1e-9:
            message = f"the shares of the stages on GPU {device} sum to {total:g}"
            yield _stops(message, "lower them until they sum to 0.95 or less")


# ----------------------------------------------------------------------------------------------- environment


@rule
def _version_pair(facts: Facts) -> Iterator[RuleFinding]:
    """vllm-omni imports vllm's internal modules, which change with every minor: ImportError of
    OpenAIServingPooling and the like.

    Sources: https://github.com/vllm-project/vllm-omni/issues/4840,
    https://github.com/vllm-project/vllm-omni/issues/2859, wheels 0.18.0 and 0.30.0,
    vllm_omni/entrypoints/openai/api_server.py (OpenAIServingPooling became ServingPooling).
    """
    omni, vllm = facts.package("vllm-omni"), facts.package("vllm")
    if omni is None:
        return
    release = minor(omni.version)
    series = f"{_dotted(release)}.*" if release else "the version that it asks for"
    if vllm is None:
        yield _stops("vllm-omni is installed without vllm", f"install vllm=={series}")
    elif release and minor(vllm.version) and release != minor(vllm.version):
        yield _stops(
            f"vllm {vllm.version} is installed with vllm-omni {omni.version}",
            f"install vllm=={series}, or the vllm-omni of vllm's minor (even minors only)",
        )


_ARM = ("aarch64", "arm64")
_AMD = ("x86_64", "amd64")


@rule
def _architecture(facts: Facts) -> Iterator[RuleFinding]:
    """A wheel or image for x86-64 does not run on aarch64 (DGX Spark), nor the other way round; before
    torch 2.11 the default index had builds without CUDA for aarch64.

    Sources: https://github.com/vllm-project/vllm-omni/issues/1121,
    https://github.com/vllm-project/vllm/issues/29472.
    """
    if facts.machine not in (*_ARM, *_AMD):
        return
    mine, other = ("aarch64", _AMD) if facts.machine in _ARM else ("x86_64", _ARM)
    named = [facts.environment.get("DOCKER_DEFAULT_PLATFORM", "")]
    for i, word in enumerate(facts.words):
        platform = word.startswith("--platform") or facts.words[i - 1] == "--platform"
        if platform or word.endswith(".whl") or (facts.serve is not None and word == facts.serve.image):
            named.append(word)
    for word in named:
        if any(one in word.lower() for one in other):
            fix = f"use the {mine} wheel or image, or drop the platform"
            yield _stops(f"{word} does not fit this machine, which is {mine}", fix)
    torch = facts.package("torch")
    if torch is not None and "+cpu" in torch.version and facts.package("vllm-omni") and facts.gpus:
        yield _stops(
            f"torch {torch.version} is a build without CUDA, and the machine has {facts.gpus[0].name}",
            "install torch 2.11 or later from the default index, which has CUDA builds for aarch64 too",
        )


@rule
def _shared_environment(facts: Facts) -> Iterator[RuleFinding]:
    """vllm-omni patches the vllm that it imports; with two of them the wrong one may be patched or
    imported.

    Sources: https://github.com/vllm-project/vllm/issues/34545,
    https://github.com/vllm-project/vllm-omni/issues/2859.
    """
    if facts.package("vllm-omni") is None:
        return
    packages, names = facts.packages or {}, ("vllm", "vllm-omni")
    fix = "make an environment for vllm-omni alone: python -m venv, then install both there"
    for name in names:
        folders = [copy.where for copy in packages.get(name, ())]
        if len(folders) > 1:
            yield _stops(f"{name} is installed {len(folders)} times: {', '.join(folders)}", fix)
    homes = {copies[0].where for name in names if (copies := packages.get(name, ()))}
    if len(homes) > 1 and all(len(packages.get(name, ())) == 1 for name in names):
        yield _stops(f"vllm and vllm-omni are in different folders: {', '.join(sorted(homes))}", fix)


# ---------------------------------------------------------------------------------------- machine and folder


@rule
def _room(facts: Facts) -> Iterator[RuleFinding]:
    """vllm reserves its share of the whole GPU at start and exits if less than that is free or the
    weights do not fit in it.

    Sources: vllm/v1/worker (`Free memory on device ... is less than desired GPU memory utilization`), wheel
    0.30.0, vllm_omni/worker/base.py.
    """
    gb, serve = 1e9, facts.serve
    if facts.report is None or facts.omni is None:
        return
    weights, gpus = facts.report.bytes, _visible_gpus(facts)
    stages = {str(stage.get("stage_id")): stage for stage in stages_of(facts.deploy or {})}
    flag = serve.number("gpu-memory-utilization") if serve is not None else None
    reserved: dict[str, float] = {}
    # The defaults are those of vllm_omni/deploy/voxtral_tts.yaml, which applies if no file is named.
    for number, usual in (("0", 0.8), ("1", 0.1)):
        stage = stages.get(number, {})
        share = flag if flag is not None else _share(stage) or usual
        devices = _devices(stage)
        for device in devices:
            reserved[device] = reserved.get(device, 0.0) + share
        used = [gpus[device] for device in devices if device in gpus]
        usable = share * sum(gpu.total for gpu in used)
        if number == "0" and used and len(used) == len(devices) and usable < weights:
            stage_0 = f"stage 0 may use {usable / gb:.1f} GB of {used[0].name}"
            message = f"{stage_0}, and the weights alone are {weights / gb:.1f} GB"
            yield _stops(message, "raise its share, or use a larger GPU")
            return
    for device, share in reserved.items():
        gpu = gpus.get(device)
        if gpu is not None and share * gpu.total > gpu.free:
            wanted, fits = share * gpu.total, gpu.free / gpu.total * 0.97
            yield _stops(
                f"the stages reserve {wanted / gb:.1f} GB of {gpu.name}, and {gpu.free / gb:.1f} GB are free",
                f"stop what else runs there, or `revox deploy vllm-omni --gpu-memory {fits:.2f}`",
            )


@rule
def _voices(facts: Facts) -> Iterator[RuleFinding]:
    """A voice is three things that must agree: its .pt, its length in tekken.json, its name in
    params.json; requests are lower-cased, names are not.

    Sources: wheel 0.30.0, vllm_omni/entrypoints/openai/tts_adapters/voxtral.py (validate), wheel 0.30.0,
    vllm_omni/model_executor/models/voxtral_tts/voxtral_tts.py.
    """
    for voice in facts.report.voices if facts.report is not None else []:
        name = voice.name
        if name != name.lower():
            fix = "add it again under a lower-case name: `revox voice export`, `revox voice add`"
            yield _warns(f"the voice {name} is not lower case", fix)
        if voice.rows is None and (voice.in_params or voice.tekken_rows is not None):
            message = f"the voice {name} is listed, and voice_embedding/{name}.pt is missing"
            yield _stops(message, f"`revox voice remove {name}`, or copy the file")
        elif not voice.file.endswith(".pt"):
            message = f"the voice {name} is listed, and voice_embedding/{name}.pt is missing"
            yield _stops(message, f"`revox voice export {name} -o FOLDER/voice_embedding/{name}.pt`")
        elif voice.rows is not None and not voice.in_params:
            yield _warns(f"params.json does not list the voice {name}", "add it with `revox voice add`")
        elif voice.rows is not None and voice.tekken_rows != voice.rows:
            yield _stops(
                f"{name}.pt has {voice.rows} rows, and tekken.json says {voice.tekken_rows}",
                "copy all three files from one checkpoint, or add the voice again with `revox voice add`",
            )


@rule
def _ref_audio(facts: Facts) -> Iterator[RuleFinding]:
    """vllm-omni takes a single tensor of the encoder for all of it, and clones from uninitialized
    weights.

    Sources: wheel 0.30.0, tts_adapters/voxtral.py.
    """
    if facts.report is not None and facts.report.encoder == "partial":
        fix = "remove the encoder, or inject a complete one: `revox inject`"
        yield _warns("the folder has only a part of the codec encoder", fix)


def _share(stage: Mapping[str, Any]) -> float | None:
    value = stage.get("gpu_memory_utilization")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _devices(stage: Mapping[str, Any]) -> list[str]:
    """The numbers of a stage's GPUs, counted among those that are visible."""
    return [device.strip() for device in str(stage.get("devices", "0")).split(",")]


def _visible_gpus(facts: Facts) -> dict[str, Gpu]:
    """The GPUs by the numbers that a stage names them with; those that are told by other names are left out.

    A container does not get the variable of the shell around it.
    """
    visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
    machine = {str(number): gpu for number, gpu in enumerate(facts.gpus)}
    if visible is None or (facts.serve is not None and facts.serve.image is not None):
        return machine
    named = enumerate(name.strip() for name in visible.split(","))
    return {str(number): machine[name] for number, name in named if name in machine}


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
