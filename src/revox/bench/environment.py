"""Where a benchmark ran: versions, commit, machine, disk; nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import revox


def environment(out: Path) -> dict[str, str]:
    """The stamp of this machine and moment. `out`: the folder whose disk counts; it need not exist yet."""
    from revox.deploy.gather import gpus

    disk = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists()))
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "revox": revox.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} threads",
        "memory": _memory(),
        "load": f"{os.getloadavg()[0]:.1f} (running processes, mean of a minute)",
        "GPU": ", ".join(f"{g.name}, {g.total / 1e9:.0f} GB" for g in gpus(os.environ.get("PATH"))) or "none",
        "disk": f"{disk.free / 1e9:.0f} of {disk.total / 1e9:.0f} GB free",
    }
    return {name: value for name, value in found.items() if value}


def _commit() -> str:
    """The commit of revox's clone, with + where files are changed; nothing outside a clone."""
    folder = Path(revox.__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", "__init__.py"):  # installed inside somebody else's repository
            return ""
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    lines = _lines("/proc/cpuinfo")
    return lines.get("model name") or platform.processor() or platform.machine()


def _memory() -> str:
    total = _lines("/proc/meminfo").get("MemTotal", "").split()
    return f"{int(total[0]) * 1024 / 1e9:.0f} GB" if total and total[0].isdigit() else ""


def _lines(path: str) -> Mapping[str, str]:
    """`name: value` lines of a file of the system; of equal names the last one. {} where there is none."""
    try:
        pairs = (line.partition(":") for line in Path(path).read_text().splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    except OSError:
        return {}
