"""The same folder under vllm-omni: its deploy file, its command, a compose file, matching versions.

Everything here is for one release, `VERSION`, whose own parser reads the deploy file in the tests. The facts
come from the wheel of vllm-omni 0.30.0: vllm_omni/deploy/voxtral_tts.yaml (the stages),
vllm_omni/config/stage_config.py (the schema) and vllm_omni/entrypoints/cli/serve.py (the flags).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import unicodedata
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from revox.checkpoint.runtimes import VLLM_OMNI
from revox.deploy.errors import DeployError
from revox.speech.files import replace_file

if TYPE_CHECKING:
    from revox.checkpoint.inspect import Report

VERSION = VLLM_OMNI.version
IMAGE = f"vllm/vllm-omni:v{VERSION}"
"""The release's image (vllm-omni's documentation, getting_started/installation/gpu)."""

MATCHING = {
    "vllm": "==0.30.0",
    "vllm-omni": f"=={VERSION}",
    "torch": "==2.13.0",
    "transformers": ">=5.13.0,<5.15",
}
"""Versions that work together: vllm-omni follows vllm's minor (vllm_omni/version.py warns otherwise), vllm
0.30.0 requires this torch and vllm-omni 0.30.0 these transformers (both wheels' metadata)."""

SPLIT = (8, 1)
"""How the two stages share the GPU: 0.8 and 0.1 in vllm-omni's own file."""

MARK = "# Written by `revox deploy vllm-omni`, which may replace it."
OLD_MARK = "# Written by `revox deploy vllm-omni`; it may be replaced by it."
"""The first line of files that revox 0.1 wrote."""

DEPLOY_NAME = "voxtral_tts.yaml"
COMPOSE_NAME = "compose.yaml"
SCRIPT_NAME = "serve.sh"
REQUIREMENTS_NAME = "requirements.txt"


@dataclass(frozen=True)
class Deployment:
    """The options of a deployment. `gpu_memory` is the share of one GPU for both stages together.

    `quantization`: None, or "fp8" for the language model (vllm-omni keeps the acoustic transformer and the
    codec in BF16: wheel 0.30.0, voxtral_tts_audio_generation.py and voxtral_tts.py).

    `gpu` is the GPU's number (None: the first visible one). The deploy file names device 0 in any case: it is
    an index into CUDA_VISIBLE_DEVICES (vllm_omni/entrypoints/stage_utils.py), and a container sees only the
    GPU that it was given.
    """

    folder: Path
    out: Path
    gpu_memory: float = 0.9
    host: str = "127.0.0.1"
    port: int = 8000
    gpu: int | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gpu_memory) and 0.01 <= self.gpu_memory <= 1):
            raise DeployError(
                f"--gpu-memory is {self.gpu_memory:g}, expected 0.01 to 1: the share of the GPU for both "
                "stages together (vllm-omni's own file uses 0.9)."
            )
        if self.quantization not in (None, "fp8"):
            raise DeployError(
                f"--quantization is {self.quantization!r}, expected fp8, the one way in which vllm-omni "
                "quantizes this checkpoint's language model."
            )
        if not 1 <= self.port <= 65535:
            raise DeployError(f"--port is {self.port}, expected 1 to 65535.")
        if self.gpu is not None and self.gpu < 0:
            raise DeployError(f"--gpu is {self.gpu}, expected 0 or more: GPUs are counted from 0.")
        if not self.host or not all(c.isalnum() or c in ".:-_" for c in self.host) or not self.host.isascii():
            raise DeployError(f"--host is {self.host!r}, expected an address such as 127.0.0.1 or 0.0.0.0.")
        for path in (self.folder, self.out):
            name = str(path.resolve())
            # Python has bytes that are not UTF-8 as surrogates.
            if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
                raise DeployError(
                    f"the name {name!a} has control characters or is not UTF-8, which a compose file cannot "
                    "hold; rename the folder."
                )

    @property
    def shares(self) -> tuple[float, float]:
        """The shares of stage 0 and stage 1, rounded down so that they never sum to more than requested."""
        whole = math.floor(self.gpu_memory * 1e4 + 1e-6)
        codec = max(1, whole * SPLIT[1] // sum(SPLIT))
        return (whole - codec) / 1e4, codec / 1e4

    @property
    def model_name(self) -> str:
        """The model's id in requests: the folder's name, without the path to it."""
        return self.folder.resolve().name or "voxtral"

    def deploy_yaml(self) -> str:
        """The deploy file, in the schema of `VERSION`."""
        generation, codec = self.shares
        quantization = "" if self.quantization is None else f"quantization: {self.quantization}\n"
        return _template(
            DEPLOY_NAME, version=VERSION, generation=generation, codec=codec, quantization=quantization
        )

    def command(self) -> list[str]:
        """The words of the command that serves the folder on this machine."""
        deploy = str(self.out.resolve() / DEPLOY_NAME)
        return self._command(str(self.folder.resolve()), deploy, self.host, self.port)

    def _command(self, model: str, deploy: str, host: str, port: int) -> list[str]:
        return [
            "vllm-omni", "serve", model, "--omni", "--deploy-config", deploy, "--tokenizer-mode", "mistral",
            f"--served-model-name={self.model_name}", "--host", host, "--port", str(port),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """The variables that the command needs."""
        return {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": str(self.gpu)}

    def shell_command(self) -> str:
        """The command on one line, quoted for a shell."""
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        return " ".join((*variables, shlex.join(self.command())))

    def script(self) -> str:
        """The command as a shell script."""
        exports = "".join(f"export {name}={value}\n" for name, value in self.environment().items())
        return f"#!/bin/sh\n{MARK}\n{exports}exec {shlex.join(self.command())}\n"

    def requirements(self) -> str:
        """The matching versions, for pip, in an environment of their own."""
        return "\n".join((MARK, *(f"{name}{version}" for name, version in MATCHING.items()))) + "\n"

    def compose_yaml(self) -> str:
        """A compose file that serves the folder from the release's image.

        Raises DeployError if the folder has links that one mount cannot cover.
        """
        mounted, inside = mount_of(self.folder)
        model = "/model" + "".join(f"/{part}" for part in inside.parts)
        words = self._command(model, f"/deploy/{DEPLOY_NAME}", "0.0.0.0", 8000)
        address = f"[{self.host}]" if ":" in self.host else self.host
        health = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
        return _template(
            COMPOSE_NAME,
            image=IMAGE,
            command=json.dumps([_escaped(word) for word in words[1:]]),
            ports=json.dumps(f"{address}:{self.port}:8000"),
            folder=json.dumps(_escaped(str(mounted))),
            deploy=json.dumps(_escaped(str(self.out.resolve() / DEPLOY_NAME))),
            deploy_name=DEPLOY_NAME,
            device=json.dumps(str(self.gpu or 0)),
            health=json.dumps(health),
        )

    def write(self) -> list[Path]:
        """Write the files; returns their paths. Files that revox did not write are left alone.

        Raises DeployError if such a file is in the way, or as `compose_yaml` does; OSError if the folder
        cannot be written.
        """
        contents = {
            DEPLOY_NAME: self.deploy_yaml(),
            COMPOSE_NAME: self.compose_yaml(),
            SCRIPT_NAME: self.script(),
            REQUIREMENTS_NAME: self.requirements(),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        paths = [self.out / name for name in contents]
        for path in paths:
            if os.path.lexists(path) and not _is_ours(path):
                raise DeployError(
                    f"{path} exists and was not written by `revox deploy vllm-omni`; move it, or choose "
                    "another --out."
                )
        for path, text in zip(paths, contents.values(), strict=True):
            replace_file(path, text)
        os.chmod(self.out / SCRIPT_NAME, 0o755)
        return paths


def servable(folder: Path) -> Report:
    """The folder's report, if vllm-omni can serve it.

    Raises CheckpointError if the folder is not a checkpoint or needs a repair first, DeployError if vllm-omni
    does not read its format.
    """
    from revox.checkpoint.inspect import check_checkpoint

    if not folder.is_dir():
        raise DeployError(
            f"{folder} is not a folder here; vllm-omni lists added voices from a local folder only, so "
            "download the hub's checkpoint first (`hf download OWNER/NAME --local-dir FOLDER`)."
        )
    report = check_checkpoint(folder)
    runtime = next(one for one in report.runtimes if one.name == VLLM_OMNI.title)
    if not runtime.preset_speech.startswith("speaks"):
        raise DeployError(f"vllm-omni {runtime.preset_speech} ({folder}); serve the released format.")
    return report


def mount_of(folder: Path) -> tuple[Path, Path]:
    """The folder to mount so that it covers all files, and the checkpoint's path in it.

    A hub cache's snapshot holds links to ../../blobs, which are outside the snapshot: the repository's folder
    is mounted then. Raises DeployError if the links lead anywhere else.
    """
    folder = folder.resolve()
    homes = {folder, *(path.resolve().parent for path in folder.rglob("*") if path.is_symlink())}
    if all(home.is_relative_to(folder) for home in homes):
        return folder, Path()
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and all(home.is_relative_to(repository) for home in homes):
        return repository, folder.relative_to(repository)
    outside = next(home for home in sorted(homes) if not home.is_relative_to(folder))
    raise DeployError(
        f"{folder} holds links to {outside}, which a container would not see; copy the checkpoint with "
        "`cp -rL` and name the copy."
    )


def _template(name: str, **values: object) -> str:
    text = (files("revox.deploy") / "templates" / name).read_text(encoding="utf-8")
    return Template(text).substitute(values, mark=MARK)


def _escaped(word: str) -> str:
    """For compose, which substitutes variables for $NAME; $$ is a dollar."""
    return word.replace("$", "$$")


def _is_ours(path: Path) -> bool:
    if not path.is_file():  # opening a pipe would block
        return False
    try:
        with open(path, encoding="utf-8") as file:
            head = file.read(400)
    except (OSError, UnicodeDecodeError):
        return False
    return MARK in head or OLD_MARK in head
