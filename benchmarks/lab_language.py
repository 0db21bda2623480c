"""How good does the lab become with time, size, hours of speech or speakers? States of its runs compared.

    python benchmarks/lab_language.py train RUN --config CONFIG --out OUT --steps 1500 \
        [--width 192] [--layers 4] [--speakers 0.5] [--speech 0.5]
    python benchmarks/lab_language.py assemble RUN STATE --out FOLDER --encoder FILE
    python benchmarks/lab_language.py plot --out curves.png --axis "core hours" \
        "narrow 2=A/results.json" "narrow 4=B/results.json" "wide 5=C/results.json"

`train` teaches a language model from nothing, of another size or with less of the speech, and writes the
checkpoint OUT/out and its encoder OUT/encoder.safetensors; everything else is RUN's. It resumes. `assemble`
writes a checkpoint folder with the codec of RUN and the language model of any
`language-state.pt` that learned from its codes, at whatever width and depth; `lab_quality.py --quick` scores
it on validation speakers. `plot` draws those results: "LINE X=FILE" is a point of LINE at X.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

# Title, path in results.json, goal, and whether it is a share of the voices.
PANELS = (
    ("words wrong, grammar (base)", "preset.grammar.words_wrong.base", 0.05, False),
    ("words wrong, free (base)", "preset.free.words_wrong.base", 0.12, False),
    ("human voices: share first", "voices.human.encoder.first", 12 / 20, True),
    ("human voices: similarity", "voices.human.encoder.similarity", 0.70, False),
)


def linked(run: Path, folder: Path) -> None:
    """Everything of a build but its language model, in another folder."""
    for part in ("data", "teacher", "encoder", "finish", "tune", "language"):
        for path in (run / part).glob("codes-*.cache") if part == "language" else (run / part,):
            place = folder / path.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not place.exists():
                place.symlink_to(path.resolve())


def train(asked: argparse.Namespace) -> None:
    """One run of the language model from nothing."""
    import torch

    from lab import build
    from lab.settings import read_settings

    torch.set_num_threads(1)
    linked(asked.run, asked.out)
    settings = read_settings(asked.config)
    settings = replace(
        settings,
        language_width=asked.width or settings.language_width,
        language_layers=asked.layers or settings.language_layers,
        language=replace(
            settings.language, steps=asked.steps, decay_steps=asked.steps // 3, own_from=asked.steps,
            speakers=asked.speakers, speech=asked.speech,
        ),
    )  # fmt: skip
    run = build.BuildRun(asked.out, settings, report=lambda stage, figures: print(stage, figures, flush=True))
    build.write_params(run)
    build.train_language(run)
    build.assemble(run, asked.out / "out", asked.out / "encoder.safetensors")


def assemble(asked: argparse.Namespace) -> None:
    """The checkpoint folder of a state, and its encoder's file."""
    import torch

    from lab import build
    from lab.settings import read_settings

    kept = torch.load(asked.state, map_location="cpu", weights_only=True, mmap=True)
    width = kept["model"]["mm_audio_embeddings.tok_embeddings.weight"].shape[1]
    layers = {name.split(".")[2] for name in kept["model"] if name.startswith("backbone.layers.")}
    settings = replace(
        read_settings(asked.run / "settings.json"), language_width=width, language_layers=len(layers)
    )
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        linked(asked.run, made)
        (made / "language").mkdir(exist_ok=True)
        (made / "language" / "language-state.pt").symlink_to(asked.state.resolve())
        run = build.BuildRun(made, settings)
        build.write_params(run)
        build.assemble(run, asked.out, asked.encoder)
    print(asked.out)


def value_at(results: dict[str, Any], path: str, share: bool) -> float | None:
    """A number in results.json's "results" by its dotted path; of a count, the share of voices."""
    *parents, name = path.split(".")
    for parent in parents:
        results = results.get(parent) or {}
    value = results.get(name)
    return value / results["voices"] if share and value is not None else value


def plot(asked: argparse.Namespace) -> None:
    """A panel for each score, a line for each label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for point in asked.points:
        label, _, file = point.partition("=")
        line, _, x = label.rpartition(" ")
        lines.setdefault(line, []).append((float(x), json.loads(Path(file).read_text())["results"]))
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    for axis, (title, path, goal, share) in zip(axes.flat, PANELS, strict=True):
        for line, points in lines.items():
            points.sort(key=lambda point: point[0])
            axis.plot([x for x, _ in points], [value_at(r, path, share) for _, r in points], "o-", label=line)
        axis.axhline(goal, ls="--", color="gray", label="goal")
        axis.set(xlabel=asked.axis, ylabel=title)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(asked.out, dpi=80)
    plt.close(figure)
    print(asked.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train")
    training.add_argument("run", type=Path)
    training.add_argument("--config", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=1500)
    for name, kind, usual in (("width", int, None), ("layers", int, None), ("speakers", float, 1.0),
                              ("speech", float, 1.0)):  # fmt: skip
        training.add_argument(f"--{name}", type=kind, default=usual)
    assembling = parts.add_parser("assemble")
    assembling.add_argument("run", type=Path)
    assembling.add_argument("state", type=Path)
    assembling.add_argument("--out", type=Path, required=True)
    assembling.add_argument("--encoder", type=Path, required=True)
    plotting = parts.add_parser("plot")
    plotting.add_argument("points", nargs="+", metavar="LINE X=RESULTS")
    plotting.add_argument("--axis", default="core hours")
    plotting.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    {"train": train, "assemble": assemble, "plot": plot}[asked.part](asked)


if __name__ == "__main__":
    main()
