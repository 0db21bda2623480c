"""Sound to codes: encoder, inversion of the frozen decoder, refinement, the student encoder.

`find_codes` is the one entry; nobody else calls what is behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revox.coding.find import Coder, CodingResult, CodingSettings, find_codes

__all__ = ["Coder", "CodingResult", "CodingSettings", "find_codes"]


def __getattr__(name: str) -> Any:
    # torch is imported only when codes are looked for: the errors of this package serve the quick commands.
    if name in __all__:
        from revox.coding import find

        return getattr(find, name)
    raise AttributeError(f"module 'revox.coding' has no attribute {name!r}")
