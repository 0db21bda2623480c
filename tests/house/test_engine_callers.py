"""Rule 2 of the house: only `synthesis.engine` runs frames, and only `model` decodes.

Functions that need the network for a loss or a teacher-forced score are named here, with what they call.
"""

from __future__ import annotations

import ast
from collections import defaultdict

from sources import modules

FRAMES = {"prefill", "feed_frames", "frame", "next_frame"}
"""What a frame loop calls."""
NETWORK = {"backbone", "teacher_forced", "flow", "decode_latents", "decode_whole"}
"""Forward passes without a cache, and decoding in one piece; `Engine` and `Codec.decode` are free."""
PARTS = {"backbone", "flow", "frame"}
"""Names that other things have too: only calls count."""
EXEMPT = {
    # Losses: gradients through the network.
    "revox.coding.invert._Search._decode": {"decode_latents"},
    "revox.training.encoder.EncoderTrainer.__init__": {"decode_latents"},
    "lab.codec_training.DecoderTrainer.take_step": {"decode_latents"},
    "lab.language_training.language_losses": {"teacher_forced"},
    "lab.language_training.predicted_ids": {"teacher_forced", "flow"},
    # Teacher-forced likelihood.
    "revox.metrics.likelihood._hidden": {"teacher_forced"},
    "revox.metrics.likelihood.Continuations._read": {"backbone"},
    # Teacher-forced choices of two models.
    "revox.metrics.agreement.next_codes": {"teacher_forced", "flow"},
    # Hidden states beside the untouched model's.
    "revox.training.adapt.AdaptTrainer._outputs": {"teacher_forced"},
}


def uses(tree: ast.AST, names: set[str], where: str) -> dict[str, set[str]]:
    """Methods of `names` that are used, by function."""
    found: dict[str, set[str]] = defaultdict(set)
    for node in ast.iter_child_nodes(tree):
        inside = where
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inside = f"{where}.{node.name}"
        called = isinstance(node, ast.Call)
        method = node.func if called else node
        wanted = names & PARTS if called else names - PARTS
        if isinstance(method, ast.Attribute) and method.attr in wanted:
            found[inside].add(method.attr)
        for function, methods in uses(node, names, inside).items():
            found[function] |= methods
    return found


def callers(names: set[str]) -> dict[str, set[str]]:
    found = {}
    for module, tree in modules().items():
        if not module.startswith("revox.model."):
            found |= uses(tree, names, module)
    return found


def test_only_the_engine_runs_frames():
    modules_of = {function.split(".Engine.")[0] for function in callers(FRAMES)}
    assert modules_of == {"revox.synthesis.engine", "revox.synthesis.frame_graphs.FrameGraphs._run"}


def test_only_the_model_decodes_in_one_piece_and_only_named_functions_run_the_network():
    assert callers(NETWORK) == EXEMPT


def test_a_frame_loop_and_an_unbounded_decode_are_found_wherever_they_are():
    tree = ast.parse(
        "class A:\n def b(self):\n  ids = self.model.acoustic_transformer.frame(x)\n"
        "def c(codec):\n decode = codec.decode_latents\n return self.flow + codec.config.backbone.dim"
    )
    assert uses(tree, FRAMES | NETWORK, "m") == {"m.A.b": {"frame"}, "m.c": {"decode_latents"}}
