"""Rule 2 of the house: only `coding` turns sound into codes, and everybody asks `find_codes`.

Functions that run an encoder for a loss, or to build the lab, are named here with what they call.
"""

from __future__ import annotations

import ast
from collections import defaultdict

from sources import modules

# `student` is the network and its file, which training makes; it gives codes through find_codes only.
BEHIND = ("beam", "encode", "invert", "likelihood", "objective", "prior", "refine", "regularizers")
"""Files of `coding` that are behind `find_codes`."""
ENCODERS = {"encode_latents", "encode_as_served"}
CODECS = {"codec", "audio_tokenizer", "quantizer", "original", "served", "restored"}
"""What has an `encode` that gives codes; text and audio streams have one too."""
EXEMPT = {
    # Losses: gradients through the encoder.
    "revox.training.encoder.EncoderTrainer.__init__": {"encode_latents"},
    # The scale of an encoder that is about to be trained.
    "revox.training.initial.scale_latents": {"encode_latents"},
    "revox.training.soft_labels.Ensemble.posterior": {"encode_latents"},
    "lab.codec_training.ReferenceEncoderTrainer.losses": {"encode_latents"},
    "lab.codec_training.ReferenceEncoderTrainer._level_latents": {"encode_latents"},
    # The teacher codec of the lab, which is another network, and the speech that the lab is built from.
    "lab.teacher_codec.TeacherCodec.encode": {"encode_latents"},
    "lab.teacher_codec.TeacherCodecTrainer.use_levels": {"encode_latents"},
    "lab.teacher_codec.TeacherCodecTrainer.losses": {"encode_latents"},
    "lab.build.encode_speech": {"encode"},
}


def imported(tree: ast.AST) -> set[str]:
    """Modules that are imported, and names from modules as if they were modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def encoders(tree: ast.AST, where: str) -> dict[str, set[str]]:
    """Uses of an encoder, by function."""
    found: dict[str, set[str]] = defaultdict(set)
    for node in ast.iter_child_nodes(tree):
        inside = where
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inside = f"{where}.{node.name}"
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else None
            owner = node.value.id if isinstance(node.value, ast.Name) else owner
            if node.attr in ENCODERS or (node.attr == "encode" and owner in CODECS):
                found[inside].add(node.attr)
        for function, methods in encoders(node, inside).items():
            found[function] |= methods
    return found


def test_nobody_but_coding_imports_what_is_behind_find_codes():
    hidden = {f"revox.coding.{name}" for name in BEHIND}
    callers = {
        module: imported(tree) & hidden
        for module, tree in modules().items()
        if not module.startswith("revox.coding")
    }
    assert {module: names for module, names in callers.items() if names} == {}


def test_nobody_but_coding_and_named_functions_runs_an_encoder():
    found: dict[str, set[str]] = {}
    for module, tree in modules().items():
        if not module.startswith(("revox.model", "revox.coding")):
            found |= encoders(tree, module)
    assert found == EXEMPT


def test_an_import_and_an_encoder_are_found_wherever_they_are():
    tree = ast.parse(
        "def a():\n from revox.coding import invert\n from revox.coding.encode import encode\n"
        "class B:\n def c(self):\n  text.encode()\n  return self.codec.encode(x), self.encode_latents"
    )
    assert {"revox.coding.invert", "revox.coding.encode"} <= imported(tree)
    assert encoders(tree, "m") == {"m.B.c": {"encode", "encode_latents"}}
