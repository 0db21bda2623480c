"""The same folder under vllm-omni: its deploy file, its command, a compose file, the versions that fit.

Everything here is for one release, `VERSION`, whose own parser reads the deploy file in the tests. The
facts are from the wheel of vllm-omni 0.30.0: vllm_omni/deploy/voxtral_tts.yaml (the stages),
vllm_omni/config/stage_config.py (the schema) and vllm_omni/entrypoints/cli/serve.py (the flags).
"""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from revox.deploy.errors import DeployError

if TYPE_CHECKING:
    from revox.checkpoint.inspect import Report

VERSION = "0.30.0"
IMAGE = f"vllm/vllm-omni:v{VERSION}"
"""The release's image (vllm-omni's documentation, getting_started/installation/gpu)."""

TOGETHER = {
    "vllm": "==0.30.0",
    "vllm-omni": f"=={VERSION}",
    "torch": "==2.13.0",
    "transformers": ">=5.13.0,<5.15",
}
"""What belongs together: vllm-omni follows vllm's minor (vllm_omni/version.py warns otherwise), vllm 0.30.0
asks for this torch and vllm-omni 0.30.0 for these transformers (both wheels' metadata)."""

SPLIT = (8, 1)
"""How the two stages share the GPU: 0.8 and 0.1 in vllm-omni's own file."""

MARK = "# Written by `revox deploy vllm-omni`; it may be replaced by it."

DEPLOY_NAME = "voxtral_tts.yaml"
COMPOSE_NAME = "compose.yaml"
SCRIPT_NAME = "serve.sh"
REQUIREMENTS_NAME = "requirements.txt"

_DEPLOY = """\
{mark}
# vllm-omni {version}, voxtral_tts: its own file, with other shares of the GPU's memory. They are set here and
# nowhere else: --gpu-memory-utilization on the command line would go to both stages.
pipeline: voxtral_tts
async_chunk: true

connectors:
  connector_of_shared_memory:
    name: SharedMemoryConnector
    extra:
      codec_streaming: true
      connector_get_sleep_s: 0.01
      connector_get_max_wait_first_chunk: 3000
      connector_get_max_wait: 300
      codec_chunk_frames: 25
      codec_chunk_frames_at_begin: 5
      codec_left_context_frames: 25

stages:
  # The language model and the acoustic transformer: text and a voice become codes.
  - stage_id: 0
    gpu_memory_utilization: {generation}
    devices: "0"
    max_num_seqs: 32
    max_num_batched_tokens: 32768
    max_model_len: 4096
    enforce_eager: false
    async_scheduling: true
    enable_chunked_prefill: false
    enable_prefix_caching: false
    trust_remote_code: true
    tokenizer_mode: mistral
    config_format: mistral
    load_format: mistral
    skip_mm_profiling: true
    output_connectors:
      to_stage_1: connector_of_shared_memory
    default_sampling_params:
      temperature: 0.0
      top_p: 1.0
      top_k: -1
      max_tokens: 2048
      seed: 42
      repetition_penalty: 1.1
      extra_args:
        cfg_alpha: 1.2

  # The codec: codes become sound.
  - stage_id: 1
    gpu_memory_utilization: {codec}
    devices: "0"
    max_num_seqs: 32
    max_num_batched_tokens: 65536
    max_model_len: 65536
    enforce_eager: true
    async_scheduling: false
    enable_prefix_caching: false
    trust_remote_code: true
    tokenizer_mode: mistral
    config_format: mistral
    load_format: mistral
    skip_mm_profiling: true
    input_connectors:
      from_stage_0: connector_of_shared_memory
    default_sampling_params:
      temperature: 0.9
      top_p: 0.8
      top_k: 40
      max_tokens: 2048
      seed: 42
      repetition_penalty: 1.05
"""

_COMPOSE = """\
{mark}
# docker compose up -d; the folder and the deploy file are mounted read only.
services:
  voxtral:
    image: {image}
    entrypoint: ["vllm-omni"]
    command: {command}
    ports:
      - {ports}
    volumes:
      - type: bind
        source: {folder}
        target: /model
        read_only: true
      - type: bind
        source: {deploy}
        target: /deploy/{deploy_name}
        read_only: true
    environment:
      HF_HUB_OFFLINE: "1"
      # Taken over if it is set: the key that requests must bring.
      VLLM_API_KEY:
    # The two stages hand the codes over in shared memory.
    ipc: host
    security_opt:
      - no-new-privileges:true
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              device_ids: [{device}]
              capabilities: [gpu]
    healthcheck:
      test:
        - CMD
        - python3
        - -c
        - {health}
      interval: 30s
      timeout: 10s
      retries: 3
      start_period: 10m
    restart: unless-stopped
"""


@dataclass(frozen=True)
class Deployment:
    """What was asked for. `gpu_memory` is the share of one GPU for both stages together.

    `gpu` is the GPU's number (None: the first that is visible). The deploy file names device 0 all the same:
    there it is an index into CUDA_VISIBLE_DEVICES (vllm_omni/entrypoints/stage_utils.py), and a container
    sees the one GPU that it is given.
    """

    folder: Path
    out: Path
    gpu_memory: float = 0.9
    host: str = "127.0.0.1"
    port: int = 8000
    gpu: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gpu_memory) and 0.01 <= self.gpu_memory <= 1):
            raise DeployError(
                f"--gpu-memory {self.gpu_memory:g} cannot be: give the share of the GPU that both stages may "
                "take together, between 0.01 and 1 (0.9 is vllm-omni's own)."
            )
        if not 1 <= self.port <= 65535:
            raise DeployError(f"--port {self.port} cannot be; ports go from 1 to 65535.")
        if self.gpu is not None and self.gpu < 0:
            raise DeployError(f"--gpu {self.gpu} cannot be; GPUs are counted from 0.")
        if not self.host or not all(c.isalnum() or c in ".:-_" for c in self.host) or not self.host.isascii():
            raise DeployError(
                f"--host {self.host!r} cannot be; give an address such as 127.0.0.1 or 0.0.0.0."
            )
        for path in (self.folder, self.out):
            _writable_name(path)

    @property
    def fractions(self) -> tuple[float, float]:
        """The shares of stage 0 and stage 1, rounded down so that they never sum to more than was given."""
        whole = math.floor(self.gpu_memory * 1e4 + 1e-6)
        codec = max(1, whole * SPLIT[1] // sum(SPLIT))
        return (whole - codec) / 1e4, codec / 1e4

    @property
    def model_name(self) -> str:
        """The model's id in requests: the folder's name, and nothing of the path to it."""
        return self.folder.resolve().name or "voxtral"

    def deploy_yaml(self) -> str:
        """The deploy file, in the schema of `VERSION`."""
        generation, codec = self.fractions
        return _DEPLOY.format(mark=MARK, version=VERSION, generation=generation, codec=codec)

    def command(self) -> list[str]:
        """The words of the command that serves the folder on this machine."""
        return self._words(
            str(self.folder.resolve()), str(self.out.resolve() / DEPLOY_NAME), self.host, self.port
        )

    def environment(self) -> dict[str, str]:
        """What the command needs in its environment."""
        return {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": str(self.gpu)}

    def shell_command(self) -> str:
        """The command on one line, quoted for a shell."""
        set_first = [f"{name}={value}" for name, value in self.environment().items()]
        return " ".join((*set_first, shlex.join(self.command())))

    def script(self) -> str:
        """The command as a shell script."""
        exports = "".join(f"export {name}={value}\n" for name, value in self.environment().items())
        return f"#!/bin/sh\n{MARK}\n{exports}exec {shlex.join(self.command())}\n"

    def requirements(self) -> str:
        """The versions that belong together, for pip, in an environment of their own."""
        lines = [f"{name}{version}" for name, version in TOGETHER.items()]
        return "\n".join((MARK, *lines)) + "\n"

    def compose_yaml(self) -> str:
        """A compose file that serves the folder from the release's image.

        Raises:
            DeployError: the folder's files are links to somewhere that one mount cannot hold.
        """
        mounted, inside = mount_of(self.folder)
        model = "/model" + "".join(f"/{part}" for part in inside.parts)
        words = self._words(model, f"/deploy/{DEPLOY_NAME}", "0.0.0.0", 8000)
        address = f"[{self.host}]" if ":" in self.host else self.host
        ask = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
        return _COMPOSE.format(
            mark=MARK,
            image=IMAGE,
            command=json.dumps([_plain(word) for word in words[1:]]),
            ports=json.dumps(f"{address}:{self.port}:8000"),
            folder=json.dumps(_plain(str(mounted))),
            deploy=json.dumps(_plain(str(self.out.resolve() / DEPLOY_NAME))),
            deploy_name=DEPLOY_NAME,
            device=json.dumps(str(self.gpu or 0)),
            health=json.dumps(ask),
        )

    def _words(self, model: str, deploy: str, host: str, port: int) -> list[str]:
        return [
            "vllm-omni", "serve", model, "--omni", "--deploy-config", deploy, "--tokenizer-mode", "mistral",
            f"--served-model-name={self.model_name}", "--host", host, "--port", str(port),
        ]  # fmt: skip

    def files(self) -> dict[str, str]:
        """name -> text of everything that is written.

        Raises:
            DeployError: see `compose_yaml`.
        """
        return {
            DEPLOY_NAME: self.deploy_yaml(),
            COMPOSE_NAME: self.compose_yaml(),
            SCRIPT_NAME: self.script(),
            REQUIREMENTS_NAME: self.requirements(),
        }

    def write(self) -> list[Path]:
        """Write the files; what somebody else wrote there is left alone.

        Raises:
            DeployError: a file of that name is there and revox did not write it.
            OSError: the folder cannot be written.
        """
        from revox.speech.files import replace_file

        files = self.files()
        self.out.mkdir(parents=True, exist_ok=True)
        for name in files:
            path = self.out / name
            if os.path.lexists(path) and not _is_ours(path):
                raise DeployError(
                    f"{path} is there already and is not of `revox deploy vllm-omni`; move it, or give "
                    "another --out."
                )
        for name, text in files.items():
            replace_file(self.out / name, text)
        os.chmod(self.out / SCRIPT_NAME, 0o755)
        return [self.out / name for name in files]


def servable(folder: Path) -> Report:
    """The folder's report, if vllm-omni can serve it.

    Raises:
        CheckpointError: the folder is no checkpoint, or must be mended first.
        DeployError: it is one, but not of the kind that vllm-omni reads.
    """
    from revox.checkpoint.inspect import check_checkpoint

    if not folder.is_dir():
        raise DeployError(
            f"{folder} is not a folder here; vllm-omni lists added voices from a local folder only, so "
            "download a hub's checkpoint first (`hf download OWNER/NAME --local-dir FOLDER`)."
        )
    report = check_checkpoint(folder)
    runtime = next(one for one in report.runtimes if one.name.startswith(f"vllm-omni {VERSION[:4]}"))
    if not runtime.preset_speech.startswith("speaks"):
        raise DeployError(
            f"vllm-omni {runtime.preset_speech} ({folder}); serve the release's own format with it."
        )
    return report


def mount_of(folder: Path) -> tuple[Path, Path]:
    """The folder to mount so that all files are inside, and the checkpoint's path in it.

    A hub cache's snapshot holds links to ../../blobs, which are not in the snapshot: then the repository's
    folder is mounted. Raises DeployError where the links lead anywhere else.
    """
    folder = folder.resolve()
    homes = {folder, *(path.resolve().parent for path in folder.rglob("*") if path.is_symlink())}
    if all(home.is_relative_to(folder) for home in homes):
        return folder, Path()
    whole = folder.parent.parent
    if folder.parent.name == "snapshots" and all(home.is_relative_to(whole) for home in homes):
        return whole, folder.relative_to(whole)
    stray = next(home for home in sorted(homes) if not home.is_relative_to(folder))
    raise DeployError(
        f"{folder} holds links to {stray}, which a container would not see; copy the checkpoint with "
        "`cp -rL` and name the copy."
    )


def _writable_name(path: Path) -> None:
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise DeployError(
            f"the name of {path!a} is not UTF-8, which a compose file must be; rename the folder."
        ) from None
    if any(ord(c) < 32 or ord(c) == 127 for c in str(path.resolve())):
        raise DeployError(f"{path!r} has control characters in its name; rename the folder.")


def _plain(word: str) -> str:
    """Compose puts variables in place of $NAME; $$ is a dollar."""
    return word.replace("$", "$$")


def _is_ours(path: Path) -> bool:
    # Opening a pipe would wait for whoever writes to it.
    if not path.is_file():
        return False
    try:
        with open(path, encoding="utf-8") as file:
            return MARK in file.read(400)
    except (OSError, UnicodeDecodeError):
        return False
