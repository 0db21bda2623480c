"""The project's source files, parsed, for the tests of its rules."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of src/revox and lab by its dotted name."""
    found = {}
    for base, folder in ((ROOT / "src", ROOT / "src" / "revox"), (ROOT, ROOT / "lab")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found
