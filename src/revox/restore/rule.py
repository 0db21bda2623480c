"""The rule that decides whether an adaptation is tried, fixed before anything is measured."""

from __future__ import annotations

from revox.evaluation.cloning_table import CLONED, DECODED, PRESET
from revox.evaluation.tables import Table
from revox.stages import Facts

SIMILARITY_GAP = 0.1
NLL_GAP = 0.1  # nats a frame
RULE = (
    "The model is adapted if speech in cloned voices is less similar to the recordings than what their codes "
    f"decode to by more than {SIMILARITY_GAP:g}, or has a semantic NLL above the presets' by more than "
    f"{NLL_GAP:g} nats a frame (medians of the cloning table)."
)


def wants_adaptation(cloning: Table) -> Facts:
    """What `RULE` says of a cloning table: `try`, `why`, and the figures that it compares.

    A voice in which no sentence ended has no NLL, and counts as one above the gap.
    """
    cells = {
        "similarity_decoded": cloning.cell(DECODED, "similarity"),
        "similarity_cloned": cloning.cell(CLONED, "similarity"),
        "nll_cloned": cloning.cell(CLONED, "nll"),
        "nll_presets": cloning.cell(PRESET, "nll"),
    }
    found = {name: None if cell is None else cell.value for name, cell in cells.items()}
    reasons = []
    decoded, cloned = found["similarity_decoded"], found["similarity_cloned"]
    if decoded is not None and cloned is not None and decoded - cloned > SIMILARITY_GAP:
        reasons.append(f"similarity falls from {decoded:.2f} (decoded codes) to {cloned:.2f} (cloned speech)")
    nll, presets = found["nll_cloned"], found["nll_presets"]
    if nll is None and presets is not None:
        reasons.append("no sentence in a cloned voice ended by itself")
    elif nll is not None and presets is not None and nll - presets > NLL_GAP:
        reasons.append(f"the semantic NLL is {nll:.2f} in cloned voices and {presets:.2f} in presets")
    why = "; ".join(reasons) or "cloned voices are near enough to their decoded codes and to the presets"
    return {"try": bool(reasons), "why": why, **found}
