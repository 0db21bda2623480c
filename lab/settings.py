"""Build settings from a JSON file, validated once."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lab.build import BuildSettings
from lab.errors import LabError

OLD_NAMES = dict((("guide", "teacher"),))
"""Old names of settings and stages."""


def read_settings(path: Path) -> BuildSettings:
    """Settings of a build; what the file leaves out keeps its default.

    Raises LabError naming an entry that is wrong, renamed or unknown.
    """
    try:
        return TypeAdapter(BuildSettings).validate_json(path.read_bytes())
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        wrong = first["msg"]
        if first["type"] == "unexpected_keyword_argument":
            wrong = (
                f"it is now {OLD_NAMES[place]}" if place in OLD_NAMES else "there is no setting of this name"
            )
        raise LabError(f"{path}: {place}: {wrong}") from error
