"""The table of costs, licenses and cloning abilities."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from revox.bench.errors import BenchError
from revox.speech.files import read_text


class ModelEntry(BaseModel):
    """One entry; `kind` (of an adapter) and `model` (a part of its name) say what it is about."""

    model_config = ConfigDict(extra="forbid")

    kind: str | None = None
    model: str | None = None
    usd_per_1000_characters: float | None
    license: str
    cloning: str | bool
    word_errors_percent: float | None = None
    word_errors_of: str = ""
    sources: list[str]

    def fits(self, facts: dict[str, Any]) -> bool:
        """Whether it is about the endpoint with these facts."""
        name = str(facts.get("model", "")).lower()
        return (self.kind is None or self.kind == facts.get("kind")) and (self.model or "").lower() in name


def read_models(path: Path | None = None) -> list[ModelEntry]:
    """The entries of a table, by default the one that ships. Raises BenchError when it cannot be read."""
    if path is None:
        text = files("revox.bench").joinpath("models.yaml").read_text(encoding="utf-8")
    else:
        text = read_text(path, BenchError)
    try:
        return TypeAdapter(list[ModelEntry]).validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError, RecursionError) as error:
        why = next(iter(str(error).splitlines()), "")
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise BenchError(f"{path} is not a table of models ({why}); see revox/bench/models.yaml.") from None


def model_entry(models: list[ModelEntry], facts: dict[str, Any]) -> ModelEntry | None:
    """The first entry that fits an endpoint's facts."""
    return next((entry for entry in models if entry.fits(facts)), None)
