"""What the project promises about itself: its documents, its quick start, its dependencies."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from revox.cli.main import COMMANDS, build_app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "mistral_common")


def _in_a_fresh_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def _commands() -> dict[str, click.Command]:
    """`revox clone`, `revox voice list`, ... and what click knows of each."""
    root = typer.main.get_command(build_app())
    found = {}
    for name, command in root.commands.items():
        for sub, inner in getattr(command, "commands", {None: command}).items():
            found[" ".join(("revox", name, *([sub] if sub else [])))] = inner
    return found


def _commands_in(text: str) -> list[list[str]]:
    """The words of every `revox ...` command in a document's code blocks and tables."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(revox [a-z][^`]*)`", text)
    lines = [line for line in (*blocks, *inline) if line.startswith("revox ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_every_command_in_the_documents_exists_with_those_options():
    commands = _commands()
    for document in DOCUMENTS:
        for words in _commands_in(document.read_text()):
            key = " ".join(words[:3]) if " ".join(words[:3]) in commands else " ".join(words[:2])
            assert key in commands, f"{document.name}: {' '.join(words)}"
            options = {name for p in commands[key].params for name in (*p.opts, *p.secondary_opts)}
            used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= options | {"--help"}, f"{document.name}: {key} has no {used - options}"


def test_the_readme_shows_the_main_commands():
    shown = {" ".join(words[:2]) for words in _commands_in((ROOT / "README.md").read_text())}
    assert {"revox inspect", "revox clone", "revox speak", "revox voice"} <= shown


def test_make_knows_the_errands_of_the_documents():
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([a-z]+):", makefile, re.M))
    for document in DOCUMENTS:
        text = document.read_text()
        shown = re.findall(r"^(?:\w+=\S.* )?make ([a-z]+)", text, re.M) + re.findall(r"`make ([a-z]+)", text)
        assert set(shown) <= rules, document.name


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_python_in_the_documents_compiles():
    for document in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.S):
            compile(block, document.name, "exec")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_one_sentence_or_more(name):
    for key, command in _commands().items():
        if key.split()[1] == name:
            assert (command.help or "").strip().endswith((".", ".)")), key


def test_every_benchmark_tells_its_options():
    """Nothing else runs them in the tests, so what they import must at least be there."""
    folder = ROOT / "benchmarks"
    scripts = [path.name for path in sorted(folder.glob("*.py")) if "__main__" in path.read_text()]
    code = f"""
import contextlib, io, json, runpy, sys
sys.path.insert(0, {str(folder)!r})
said = {{}}
for name in {scripts!r}:
    sys.argv, out = [name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_path({str(folder)!r} + "/" + name, run_name="__main__")
    said[name] = out.getvalue()
print(json.dumps(said))
"""
    said = json.loads(_in_a_fresh_python(code))
    assert scripts
    assert [name for name in scripts if not said[name].startswith("usage:")] == []


def test_importing_revox_takes_under_a_second_and_nothing_heavy():
    code = "import sys, time, revox; print(time.process_time(), *sys.modules)"
    seconds, *loaded = _in_a_fresh_python(code).split()
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}
    assert float(seconds) < 1


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nsys.argv = ['revox', '--help']\nfrom revox.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*[name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    printed = _in_a_fresh_python(code)
    assert "clone" in printed
    assert printed.splitlines()[-1] == ""


def test_constraints_pin_every_dependency_once_for_each_python():
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = [Requirement(line) for line in lines]
    for line, pin in zip(lines, pins, strict=True):
        assert re.fullmatch(r"==[^=*,]+", str(pin.specifier)), line
    wanted = _dependencies((ROOT / "pyproject.toml").read_text())
    for python in ("3.10", "3.11", "3.12", "3.13"):
        for machine, system in (("x86_64", "linux"), ("aarch64", "linux"), ("arm64", "darwin")):
            here = {
                **default_environment(),
                "python_version": python,
                "python_full_version": f"{python}.1",
                "platform_machine": machine,
                "sys_platform": system,
            }
            pinned: dict[str, Requirement] = {}
            for pin in pins:
                if pin.marker is None or pin.marker.evaluate(here):
                    assert canonicalize_name(pin.name) not in pinned, f"{pin} is pinned twice for {python}"
                    pinned[canonicalize_name(pin.name)] = pin
            for need in map(Requirement, wanted):
                if need.name == "revox" or (need.marker and not need.marker.evaluate(here)):
                    continue
                pin = pinned[canonicalize_name(need.name)]
                version = str(pin.specifier).removeprefix("==")
                assert need.specifier.contains(version), f"{need} and {pin} on {python}"


def _dependencies(pyproject: str) -> list[str]:
    """All requirements of [project] and its extras (tomllib is not in Python 3.10)."""
    names = "dependencies|eval|find|mark|train|serve|test"
    tables = re.findall(rf"^(?:{names}) = \[\n(.*?)^\]", pyproject, re.M | re.S)
    assert len(tables) == 7
    return [match for table in tables for match in re.findall(r'^    "(.+)",$', table, re.M)]


def test_no_file_names_a_package_registry_or_one_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.fail("git cannot list the project's files; run the tests in a clone")
    # Pieced together, so that this file does not contain them.
    forbidden = re.compile(
        "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "download" + r"\.pytorch", "/wor" + "k/"))
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", "") and path.is_file():
            found = forbidden.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert found is None, f"{name} names {found.group() if found else ''}"
