"""How good does the lab's language model become with time and with size? States of its runs, side by side.

    python benchmarks/lab_language.py RUN --out DIR "5,000 of first=STATE" ... wider=OTHER/language-state.pt
    python benchmarks/lab_language.py RUN --out DIR --plot

RUN is a build with a finished codec; a STATE is any `language-state.pt` that learnt from its codes, at
whatever width. Judged on the *validation* sentences and speakers: the held-out ones are `lab_quality.py`'s.
Rows are added to DIR/rows.jsonl; the plot beside them shows all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from lab.build import BuildRun, assemble, write_params
from lab.data import RATE, SpeechSet
from lab.sentences import jsgf
from lab.settings import read_settings
from lab_quality import cloning_table, long_clips, preset_sentences
from revox import load
from revox.evaluation.reference_encoder import original_codec
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_error_rate
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio

CODEC = "the codec"


def folder_of(run: Path, state: Path, width: int, made: Path) -> Path:
    """A checkpoint folder in `made` with the codec of `run` and the language model of `state`."""
    settings = replace(read_settings(run / "settings.json"), language_width=width)
    for part in ("data", "encoder", "decoder"):
        (made / part).symlink_to((run / part).resolve())
    (made / "language").mkdir()
    (made / "language" / "language-state.pt").symlink_to(state.resolve())
    build = BuildRun(made, settings)
    write_params(build)
    assemble(build, made / "out", made / "reference" / "encoder.safetensors")
    return made / "out"


def scores(folder: Path, encoder: Path, data: Path, sentences: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the language model of `folder` scores, and the codec's own rate, on validation speech."""
    speech = SpeechSet(data, "validation", "synthetic")
    chosen = preset_sentences(speech, sentences)
    texts = [speech.utterances[i].text for i in chosen]
    codec, recognizer, judge = (
        original_codec(folder, encoder),
        PocketsphinxRecognizer(jsgf()),
        SpeakerVerifier(),
    )
    tts = load(folder, device="cpu", dtype=torch.float32)
    spoken = [
        tts.speak(speech.utterances[i].text, speech.utterances[i].preset, seed=0, max_seconds=10.0)
        for i in chosen
    ]
    clones = cloning_table(long_clips(speech), codec, tts, judge, texts[:3])
    with torch.no_grad():
        waves = [codec.decode(codec.encode(torch.from_numpy(speech.waveform(i))[None]))[0] for i in chosen]
    through = word_error_rate(texts, [recognizer.transcribe(Audio(wave.numpy(), RATE)) for wave in waves])
    return {
        "sentences": len(texts),
        "words_wrong": round(word_error_rate(texts, [recognizer.transcribe(a) for a in spoken]), 4),
        "ended_by_itself": sum(not a.truncated for a in spoken),
        "clones": clones["speakers"],
        "clones_first": clones["first_of_all"],
        "clones_similarity": round(clones["similarity"], 4),
        "clones_words_wrong": round(clones["word_errors"], 4),
    }, {
        "words_wrong": round(through, 4),
        "clones_similarity": round(clones["decoded_reference_similarity"], 4),
    }  # fmt: skip


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Words wrong and clones first over minutes of one core; "STEP of RUN" is a point on RUN's line."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for label, row in rows.items():
        if label != CODEC:
            lines.setdefault(label.rpartition(" of ")[2], []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, score, name, aim in (
        (axes[0], "words_wrong", "words wrong, presets", 0.2),
        (axes[1], "clones_first", "clones that rank first of 20", 14),
    ):
        for label, points in lines.items():
            points.sort(key=lambda row: row["cpu_minutes"])
            shown = f"{label} (width {points[0]['width']})"
            axis.plot([r["cpu_minutes"] for r in points], [r[score] for r in points], "o-", label=shown)
        axis.axhline(aim, ls="--", color="gray", label="aim")
        if score == "words_wrong" and CODEC in rows:
            axis.axhline(rows[CODEC][score], ls=":", color="gray", label="true speech through the codec")
        axis.set_ylim(0, None if score == "words_wrong" else 20.5)
        axis.set_xlim(0, None)
        axis.set_xlabel("minutes of one core")
        axis.set_ylabel(name)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("states", nargs="*", metavar="LABEL=STATE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--plot", action="store_true", help="only draw what DIR/rows.jsonl holds")
    asked = parser.parse_intermixed_args()
    if not asked.states and not asked.plot:
        parser.error("name a state, as LABEL=STATE, or ask for --plot")
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "rows.jsonl"
    rows = {r["label"]: r for r in map(json.loads, path.read_text().splitlines())} if path.is_file() else {}
    for label, _, name in (one.partition("=") for one in asked.states):
        state = Path(name)
        kept = torch.load(state, map_location="cpu", weights_only=True)
        width = kept["model"]["mm_audio_embeddings.tok_embeddings.weight"].shape[1]
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary)
            folder = folder_of(asked.run, state, width, made)
            found, codec = scores(
                folder, made / "reference" / "encoder.safetensors", asked.run / "data", asked.sentences
            )
        rows[CODEC] = {"label": CODEC, **codec}
        rows[label] = {
            "label": label,
            "step": kept["step"],
            "cpu_minutes": round(kept["cpu_seconds"] / 60, 1),
            "width": width,
            "million_parameters": round(sum(v.numel() for v in kept["model"].values()) / 1e6, 2),
            **found,
        }
        print(rows[label], rows[CODEC], flush=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    draw(rows, asked.out / "curves.png")
    print(asked.out / "curves.png")


if __name__ == "__main__":
    main()
