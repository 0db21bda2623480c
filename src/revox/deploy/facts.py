"""What is known of a deployment: a command, an environment, a folder, a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

if TYPE_CHECKING:
    from revox.checkpoint.inspect import Report


OLDEST = (0, 30)
"""The oldest vllm-omni that revox supports: the first that refuses a request that it cannot serve."""


@dataclass(frozen=True)
class Package:
    """An installed distribution: its version and its folder."""

    version: str
    where: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory in bytes; on unified memory the machine's."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Facts:
    """What was gathered. None, or an empty value, means that it is not known.

    words: the command without the assignments before it. environment: the variables it would run under.
    packages: canonical name -> every copy that its Python would find. deploy: the deploy file that it names,
    parsed; deploy_problem: why it could not be. missing_model: the path of the model that the command names,
    if there is nothing.
    """

    words: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, tuple[Package, ...]] | None = None
    python: str | None = None
    deploy: Mapping[str, Any] | None = None
    deploy_problem: str | None = None
    machine: str | None = None
    folder: Path | None = None
    report: Report | None = None
    other_model_type: str | None = None
    gpus: tuple[Gpu, ...] = ()
    missing_model: str | None = None

    @property
    def serve(self) -> ServeCommand | None:
        """The command, parsed, if it starts a server."""
        return parse_serve(self.words)

    def package(self, name: str) -> Package | None:
        """The copy of a package that would be imported."""
        return next(iter((self.packages or {}).get(name, ())), None)

    @property
    def omni(self) -> tuple[int, int] | None:
        """(major, minor) of vllm-omni: of the installed one, or of the image that the command names."""
        installed, serve = self.package("vllm-omni"), self.serve
        if installed is not None:
            return minor(installed.version)
        return minor(serve.image_version) if serve and serve.image_version else None


@dataclass(frozen=True)
class ServeCommand:
    """A command that starts vllm's or vllm-omni's server. `flags`: name without dashes -> value, or None."""

    model: str | None
    flags: Mapping[str, str | None]
    image: str | None = None
    image_version: str | None = None
    by_entrypoint: bool = False

    def number(self, name: str) -> float | None:
        """A flag's value as a finite number, or None."""
        try:
            value = float(self.flags.get(name) or "")
        except ValueError:
            return None
        return value if math.isfinite(value) else None


def minor(version: str) -> tuple[int, int] | None:
    """(major, minor) of a version; None if it is not a version (vllm-omni falls back to `dev`)."""
    try:
        found = Version(version)
    except InvalidVersion:
        return None
    return found.major, found.minor


# fmt: off
_SWITCHES = frozenset((
    "omni", "trust-remote-code", "enforce-eager", "log-stats", "headless", "async-chunk", "skip-mm-profiling",
))
# fmt: on
_CONTAINER_ENGINES = frozenset(("docker", "podman", "nerdctl"))
_PROGRAMS = ("vllm", "vllm-omni", "vllm_omni.entrypoints.cli.main", "vllm.entrypoints.cli.main")


def parse_serve(words: Sequence[str]) -> ServeCommand | None:
    """The server's command in `words`, after whatever starts it (sudo, docker run, python -m), or None."""
    names = [word.rsplit("/", 1)[-1] for word in words]
    at = next((i for i, word in enumerate(words) if i and _is_image(word)), None)
    if at is not None and not _CONTAINER_ENGINES & set(names[:at]):
        at = None
    image = None if at is None else words[at]
    start = None
    for i, name in enumerate(names):
        if name in _PROGRAMS and names[i + 1 : i + 2] == ["serve"]:
            start = i + 2
        elif name == "vllm.entrypoints.openai.api_server":
            start = i + 1
        if start is not None:
            break
    by_entrypoint = start is None and at is not None
    if by_entrypoint:
        start = int(at or 0) + 1
    if start is None:
        return None
    model, flags = _parse_flags(words[start:])
    is_omni = image is not None and "vllm-omni" in image
    tag = image.rsplit(":", 1)[-1].lstrip("v").split("-")[0] if image and ":" in image else None
    return ServeCommand(
        model or flags.get("model"), flags, image, tag if is_omni else None, by_entrypoint and is_omni
    )


def _parse_flags(words: Sequence[str]) -> tuple[str | None, dict[str, str | None]]:
    """The positional argument and the flags; vllm accepts `--a_flag` for `--a-flag` and `--flag=value`."""
    flags: dict[str, str | None] = {}
    model = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            model = model or word
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        switch = name in _SWITCHES or name.startswith(("no-", "enable-", "disable-"))
        if equals:
            flags[name] = value
        else:
            flags[name] = rest.pop(0) if rest and not switch and not rest[0].startswith("--") else None
    return model, flags


def _is_image(word: str) -> bool:
    """`vllm/vllm-omni:v0.30.0` and the like: a repository or a tag, with vllm in the image's own name."""
    own = word.rsplit("/", 1)[-1].split(":")[0]
    named = "vllm" in own and ("/" in word or ":" in word)
    return named and word[0] not in "-/.~" and "=" not in word


def stages_of(deploy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of a deploy file, their fields on one level."""
    listed = deploy.get("stages")
    found = []
    for stage in listed if isinstance(listed, list) else []:
        if isinstance(stage, Mapping):
            merged = dict(stage)
            for key in ("engine_args", "runtime", "engine_extras"):
                part = stage.get(key)
                merged |= part if isinstance(part, Mapping) else {}
            found.append(merged)
    return found
