"""flite, the lab's synthesizer: finding it, running it, copying it for a machine without it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from revox.speech.files import replacing

_SYSTEM = ("libc.", "libm.", "libpthread.", "libdl.", "librt.", "ld-linux")
"""Libraries of the C library, which are not copied: they must be the target system's own."""


@dataclass(frozen=True)
class Flite:
    """The synthesizer's `program`, and the folder of its `libraries` if it was copied with them."""

    program: str
    libraries: Path | None = None

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
        """Run it with `arguments`; the result has its output. Raises LabError if it cannot start."""
        environment = dict(os.environ)
        if self.libraries is not None:
            before = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(
                [str(self.libraries), *([before] if before else [])]
            )
        try:
            return subprocess.run([self.program, *arguments], capture_output=True, env=environment)
        except OSError as error:
            raise LabError(f"{self.program} cannot be run here: {error.strerror}") from None


def find_flite(folder: Path | None = None) -> Flite:
    """The installed flite, or the one that `copy_flite` wrote to `folder`. Raises LabError if missing."""
    if folder is not None:
        program = folder.absolute() / "flite"
        if not program.is_file():
            raise LabError(f"{folder} holds no flite: make it with `python -m lab pack RUN --flite`")
        return Flite(str(program), program.parent)
    found = shutil.which("flite")
    if found is None:
        raise LabError(
            "flite is not installed: install it with your system's packages (Debian and Ubuntu: apt install "
            "flite; macOS: brew install flite), or copy it from a machine that has it (`python -m lab pack "
            "RUN --flite`, then `python -m lab build RUN --flite RUN/shards/flite`)"
        )
    return Flite(found)


def copy_flite(folder: Path) -> int:
    """Copy the installed synthesizer and its libraries into `folder`; returns their bytes.

    They run on other Linux machines with the same processor architecture and a C library that is new enough.
    Raises LabError if there is no flite or no `ldd`.
    """
    program = Path(find_flite().program).resolve()
    if shutil.which("ldd") is None:
        raise LabError(
            "`ldd`, which lists flite's libraries, is missing: flite can be copied from Linux to Linux only"
        )
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True)
    files = {"flite": program}
    for line in listed.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if arrow and not name.startswith(_SYSTEM):
            found = Path(rest.split(" (")[0])
            if not found.is_file():
                raise LabError(f"flite's library {name} is missing: check flite's installation")
            files[name] = found
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        with replacing(folder / name) as temporary:
            shutil.copyfile(source, temporary)
            temporary.chmod(0o755)
    return sum((folder / name).stat().st_size for name in files)
