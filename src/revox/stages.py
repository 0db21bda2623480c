"""A long job in stages: what came of each is written down when it ends, and the same job goes on later."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revox.speech.files import replace_file, stamp_of

Facts = dict[str, Any]
"""What came of a stage, as JSON values. `done` says whether it was done, `error` why not; `seconds` and
`cpu_seconds` (of this process and those it waited for) are those of all sittings."""

_RECORDED = ("done", "error", "seconds", "cpu_seconds")


@dataclass(frozen=True)
class Stage:
    """A stage: `do` gives its facts. It waits for the stages that it `needs`."""

    name: str
    do: Callable[[], Facts]
    needs: tuple[str, ...] = ()


class StageLog:
    """What came of a job's stages, by name, in the JSON file `path`.

    `begun` is what the job depends on; only hashes of it are stored. `other` names the entries in which the
    job that is in the file differs. `redact` gets the file's text before it is written. A file that cannot
    be read is begun anew: stages keep what is long in files of their own.
    """

    def __init__(self, path: Path, begun: Mapping[str, Any], redact: Callable[[str], str] = str) -> None:
        self.path, self.redact = path, redact
        self.begun = {name: stamp_of(value)[:16] for name, value in begun.items()}
        self.stages: dict[str, Facts] = {}
        self.other: list[str] = []
        try:
            stored = json.loads(path.read_bytes())
            self.stages, before = dict(stored["stages"]), dict(stored["begun"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return
        self.other = [name for name, stamp in self.begun.items() if before.get(name) != stamp]

    def done(self, name: str) -> bool:
        """Whether the stage of that name was done."""
        return bool(self.stages.get(name, {}).get("done"))

    def run(self, stages: Iterable[Stage], report: Callable[[str], None]) -> list[str]:
        """Do the stages that are not done, in order; gives the names of those that still are not.

        An error of the project's own, of torch or of the system ends its stage, and the next ones go on but
        for those that need it. KeyboardInterrupt is recorded and raised. `report` gets a line for each.
        """
        missing = []
        for stage in stages:
            if self.done(stage.name):
                report(f"{stage.name}: done before")
                continue
            report(stage.name)
            needed = next((name for name in stage.needs if not self.done(name)), None)
            if needed is None:
                self._do(stage)
            else:
                self._record(stage.name, {"done": False, "error": f"waits for: {needed}"})
            if not self.done(stage.name):
                missing.append(stage.name)
                report(f"{stage.name}: {self.stages[stage.name]['error']}")
        return missing

    def _do(self, stage: Stage) -> None:
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        found: Facts = {"done": False, "error": "stopped"}
        try:
            found = {"done": True, **stage.do()}
        except (ValueError, RuntimeError, OSError) as error:
            found["error"] = (str(error) or type(error).__name__).splitlines()[0]
        finally:
            before = self.stages.get(stage.name, {})
            found["seconds"] = round(before.get("seconds", 0) + time.perf_counter() - began, 1)
            found["cpu_seconds"] = round(before.get("cpu_seconds", 0) + _cpu_seconds() - cpu_began, 1)
            self._record(stage.name, found)

    def _record(self, name: str, facts: Facts) -> None:
        self.stages[name] = facts
        text = json.dumps({"begun": self.begun, "stages": self.stages}, indent=1, ensure_ascii=False)
        replace_file(self.path, self.redact(text) + "\n")

    def rows(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """A line of a table for each of the stages `names`."""
        return [self._row(name, self.stages.get(name)) for name in names]

    def _row(self, name: str, facts: Facts | None) -> dict[str, Any]:
        if facts is None:
            return {"stage": name, "done": "left", "seconds": None, "what came of it": None}
        return {
            "stage": name, "done": "yes" if facts["done"] else "**no**", "seconds": facts.get("seconds"),
            "what came of it": facts.get("error") or _summary(facts),
        }  # fmt: skip


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _summary(facts: Facts) -> str:
    shown = {
        key: value
        for key, value in facts.items()
        if key not in _RECORDED and isinstance(value, str | int | float)
    }
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
