"""flite, the lab's synthesiser: where it is, how it is run, how it is carried to a machine without it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError

_SYSTEM = ("libc.", "libm.", "libpthread.", "libdl.", "librt.", "ld-linux")
"""What every Linux brings, and what must be its own."""


@dataclass(frozen=True)
class Flite:
    """The synthesiser's `program`, and the folder of the `libraries` that came with it, if any did."""

    program: str
    libraries: Path | None = None

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
        """Run it with these arguments; its output is in `stdout` and `stderr`."""
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
    """The installed one, or the one that `carry_flite` put into `folder`.

    Raises LabError if there is none, with what to do about it.
    """
    if folder is not None:
        program = folder.absolute() / "flite"
        if not program.is_file():
            raise LabError(f"{folder} holds no flite: make it with `python -m lab pack RUN --flite`")
        return Flite(str(program), program.parent)
    found = shutil.which("flite")
    if found is None:
        raise LabError(
            "flite is not installed: install it with your system's packages (Debian and Ubuntu: apt install "
            "flite; macOS: brew install flite), or carry it from a machine that has it (`python -m lab pack "
            "RUN --flite`, then `python -m lab build --flite RUN/shards/flite`)"
        )
    return Flite(found)


def carry_flite(folder: Path) -> int:
    """Copy the installed synthesiser and its libraries into `folder`; returns their bytes.

    For another Linux machine of the same processor, with a C library no older than this one's build asks for.
    Raises LabError where there is no flite or no `ldd`.
    """
    program = Path(find_flite().program).resolve()
    if shutil.which("ldd") is None:
        raise LabError(
            "a synthesiser is carried from Linux to Linux only: `ldd`, which lists its libraries, is missing"
        )
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True)
    files = {"flite": program}
    for line in listed.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if arrow and not name.startswith(_SYSTEM):
            found = Path(rest.split(" (")[0])
            if not found.is_file():
                raise LabError(f"flite's library {name} is missing here: check that it is installed whole")
            files[name] = found
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        beside = folder / f"{name}.part"
        shutil.copyfile(source, beside)
        beside.chmod(0o755)
        beside.replace(folder / name)
    return sum((folder / name).stat().st_size for name in files)
