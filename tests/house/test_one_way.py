"""One way to replace a file, show progress, name a checkpoint and an output; one direction of imports."""

from __future__ import annotations

import ast
import re

import click
import pytest
import typer
from known_ways import OTHER_CHECKPOINTS, RENAMES
from sources import ROOT, modules

from revox.cli.main import build_app


def _calls(tree: ast.Module) -> set[str]:
    """Dotted names of what a module calls, as written."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def _renames(tree: ast.Module) -> bool:
    """Whether a module renames files: os.replace and its like, Path.replace, Path.rename (one argument)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        if owner in ("os", "shutil") and name in ("replace", "rename", "renames", "move"):
            return True
        if (
            owner != "dataclasses"
            and name in ("replace", "rename")
            and len(node.args) == 1
            and not node.keywords
        ):
            return True
    return False


def test_only_speech_files_renames_a_file_into_place():
    found = {name for name, tree in modules().items() if _renames(tree)} - {"revox.speech.files"}
    assert found - RENAMES == set()


def test_renaming_is_found_in_every_form():
    for text in ("os.replace(a, b)", "path.replace(other)", "a.b.rename(c)", "shutil.move(a, b)"):
        assert _renames(ast.parse(text)), text
    for text in ("text.replace('a', 'b')", "dataclasses.replace(x, y=1)", "when.replace(tzinfo=utc)"):
        assert not _renames(ast.parse(text)), text


def test_progress_bars_are_drawn_in_one_place():
    for name, tree in modules().items():
        if name == "revox.cli.progress":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                assert "rich.progress" not in ast.unparse(node), name


def test_the_layers_contract_has_one_direction_and_one_exception():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = text[text.index("[[tool.importlinter.contracts]]") :]
    layers = re.search(r"^layers = \[\n(.*?)^\]", contract, re.M | re.S)
    assert layers
    assert ":" not in layers[1]
    assert re.findall(r'^    "(.+ -> .+)",$', contract, re.M) == ["revox -> revox.api"]


def _commands() -> dict[str, click.Command]:
    root = typer.main.get_command(build_app())
    found = {}
    for name, command in root.commands.items():
        for sub, inner in getattr(command, "commands", {None: command}).items():
            found[" ".join(part for part in (name, sub) if part)] = inner
    return {name: command for name, command in found.items() if not name.startswith("lab")}


@pytest.mark.parametrize("name", _commands())
def test_a_checkpoint_is_named_the_same_way_everywhere(name):
    options = [p for p in _commands()[name].params if "checkpoint" in p.name]
    if not options:
        assert name in OTHER_CHECKPOINTS, f"{name} takes no checkpoint: add it to known_ways.py"
        return
    named = [p for p in options if "--checkpoint" in p.opts]
    assert named, f"{name} has no --checkpoint"
    assert "-c" in named[0].opts
    assert named[0].envvar == "REVOX_CHECKPOINT"


@pytest.mark.parametrize("name", _commands())
def test_files_go_to_output_and_folders_to_out(name):
    for option in _commands()[name].params:
        if "-o" in option.opts:
            assert "--output" in option.opts, f"{name}: -o is short for --output, a file"
        if "--out" in option.opts:
            assert option.opts == ["--out"], f"{name}: --out is a folder and has no short form"
