from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from revox.demo import grammar_file

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "synthesis.py"


def test_the_script_that_waits_for_a_card_runs(tmp_path):
    options = ["--parts", "streams", "--streams", "2", "--text-chars", "15", "--reference-seconds", "3"]
    command = [sys.executable, SCRIPT, *options, "--budget", "20", "--out", tmp_path / "found"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    [row] = json.loads((tmp_path / "found.json").read_text())["streams"]
    assert row["streams"] == 2
    assert 0 < row["first_audio_p50"] <= row["first_audio_p95"]


def accepted(sentence: str) -> bool:
    """Whether the lab's JSGF grammar has it."""
    rules = dict(re.findall(r"<(\w+)> = ([^;]*);", grammar_file().read_text(encoding="utf-8")))

    def pattern(name: str) -> str:
        words = re.sub(r"(?<![<\w'])[a-z']+(?![\w'>])", r"\g<0>_", rules[name])
        whole = re.sub(r"<(\w+)>", lambda found: pattern(found[1]), words)
        return f"({whole.replace('[', '(').replace(']', ')?').replace(' ', '')})"

    return re.fullmatch(pattern("sentence"), "".join(f"{word}_" for word in sentence.split())) is not None


def test_words_are_counted_in_sentences_that_the_recognizer_can_hear(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        for name in (
            "streaming",
            "training",
            "weights",
        ):  # scripts there; `training` is a room of the tests too
            patch.delitem(sys.modules, name, raising=False)
        texts = runpy.run_path(str(SCRIPT))["grammar_texts"](12)
        for name in ("streaming", "training", "weights"):
            sys.modules.pop(name, None)
    assert len(set(texts)) == 12
    assert accepted("the train leaves at ten fifteen")
    assert not accepted("the train leaves at ten past seven")
    assert [text for text in texts if not accepted(text)] == []
