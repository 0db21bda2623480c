"""What each adaptation gains on the lab, for encoders of several qualities: one table, and a rule for it.

    python benchmarks/adaptation_rows.py run --name NAME [--encoder FILE] --data RUN/data --speech KOKORO \
        --out OUT [--rows "nothing,,distill lora 4"] [--seeds 3]
    PYTHONPATH=src:.:benchmarks JUDGES/bin/python benchmarks/adaptation_rows.py judge OUT --models runs/models

`run` trains every row in turn as `revox train adapt` does, for one encoder (NAME in the table; without a
FILE the student of `revox train student`), merges it
at the largest scale that its guard allows, writes the folder with `revox inject`, clones held-out speakers
with it and speaks. `judge` needs the recognizers' environment (lab/speech/README.md): Resemblyzer and
Whisper tiny.en, none of which is in a loss. Both resume; a NAME that was
begun with another checkpoint, encoder or --steps is refused. KOKORO is what `lab.speech.kokoro --plan
benchmarks/adaptation-speech.tsv` makes: twelve held-out synthetic speakers, texts that the lab has not
learned from; the people are the build's held-out ones.

The published rows have as few steps as the others; those at ten times the rate stand for more of them and
were added when the first rows were known.

Every row has one seed, or those of --seeds; "nothing" speaks with three seeds of noise, whose mean the
others are compared with. **The rule**, fixed before any row was run: a row is worth having for an encoder
if, over all held-out speakers, it gains 0.01 of similarity and more than twice the standard error of the
speakers' differences, its words are at most 2 points more wrong, and the presets are unharmed (98 % of
the semantic codes, 0.02 nats); a row of several seeds only if each of them is. The published rows are
merged at full scale, whatever the guard says, since that is what was published; so is a row that the
guard refuses at every scale, to see what it would have done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from stamps import encoder_identity, stamp, weights_identity
from voice_tuning import RATE, REFERENCE, divided, merged_folder, preset_data, synthetic_and_human

TRAINING_SPEAKERS = 60  # of each kind, two clips each, for the objective "speech"
CLIPS = 4  # at most, of which two are learned and the others make the voice longer
SPEAKERS = 12  # held-out ones of each kind; all others' stretches are there to be mistaken for
NOISE = (0, 1, 2)  # seeds that "nothing" speaks with
LEAST_GAIN, MOST_WORDS = 0.01, 0.02
ROWS: Mapping[str, dict[str, Any]] = {
    "nothing": {},
    "replay lora 4": {"objective": "replay"},
    **{f"distill lora {rank}": {"rank": rank} for rank in (1, 2, 4, 8)},
    "distill embeddings": {"part": "embeddings"},
    "distill layers": {"part": "layers"},
    "speech lora 4": {"objective": "speech"},
    "speech embeddings": {"objective": "speech", "part": "embeddings"},
    "speech layers": {"objective": "speech", "part": "layers"},
    "speech map 4": {"objective": "speech", "part": "map", "learning_rate": 2e-3},
    "published, no fault": {"faults": ()},
    "published, adapter active in the teacher": {"faults": ("adapter",)},
    "published, other layout in the teacher": {"faults": ("layout",)},
    "published at 2e-4, no fault": {"faults": (), "learning_rate": 2e-4},
    "published at 2e-4, both faults": {"faults": ("adapter", "layout"), "learning_rate": 2e-4},
    "published at 2e-4, other layout in the teacher": {"faults": ("layout",), "learning_rate": 2e-4},
}
PUBLISHED = {
    "part": "attention", "rank": 8, "replay": 0, "learning_rate": 2e-5, "semantic": 0.0, "flow": 0.0
}  # fmt: skip


def _texts(n: int) -> list[str]:
    """What voice number n says: a sentence of the lab's grammar and a free one, of the held-out list."""
    import lab.speech

    held_out = json.loads((Path(lab.speech.__file__).parent / "heldout.json").read_text())
    return [held_out[kind][n % len(held_out[kind])] for kind in ("grammar", "free")]


class Experiment:
    """One encoder's folder, its voices and what it adapts to."""

    def __init__(self, asked: argparse.Namespace) -> None:
        import torch

        from revox import load
        from revox.checkpoint.inject import InjectionOptions, inject
        from revox.checkpoint.load import load_model
        from revox.training.speaker import SpeakerLoss

        torch.set_num_threads(1)
        self.asked, self.out = asked, asked.out / asked.name
        stamp(
            self.out,
            {
                "checkpoint": weights_identity(asked.checkpoint), "steps": asked.steps,
                "encoder": encoder_identity(asked.encoder) if asked.encoder else None,
            },
        )  # fmt: skip
        self.folder = self.out / "checkpoint" if asked.encoder else asked.checkpoint
        if not self.folder.exists():
            inject(asked.checkpoint, asked.encoder, InjectionOptions(out=self.folder))
        self.tts = load(self.folder, "cpu", torch.float32)
        self.model = load_model(self.folder, "cpu", torch.float32)
        self.voices = dict(self._voices())
        self.verifier = SpeakerLoss.load(asked.verifier, RATE) if asked.verifier else None
        self.data = {"distill": preset_data(self.folder, self.model, asked.data, self.out)}
        self.data["speech"] = self._clips(self.data["distill"])

    def codes(self, samples: np.ndarray) -> Any:
        from revox.speech import Audio

        return self.tts.find_codes(Audio(np.pad(samples, (0, -len(samples) % 1920)), RATE)).codes

    def _voices(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Codes of each held-out speaker's reference, and of the clips that judge with their texts."""
        for kind, speakers in synthetic_and_human(self.asked.data, self.asked.speech).items():
            spoken = 0
            for name, utterances in sorted(speakers.items()):
                learned, judged = divided(utterances, REFERENCE)
                stretch = np.concatenate([u.samples for u in judged])
                self._write(f"{kind}-{name}-judged", stretch)
                if not learned or spoken == SPEAKERS:
                    continue
                spoken += 1
                reference = np.concatenate([u.samples for u in learned])[: round(REFERENCE * RATE)]
                yield (
                    f"{kind}-{name}",
                    {
                        "reference": self.codes(reference),
                        "judged": [(u.text, self.codes(u.samples)) for u in judged],
                    },
                )

    def _write(self, name: str, samples: np.ndarray) -> None:
        from revox.speech import Audio, write_audio

        path = self.out / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        silence = np.zeros(RATE // 10, np.float32)  # of a sentence that ended before it began
        write_audio(path, Audio(samples if len(samples) else silence, RATE))

    def _clips(self, presets: Any) -> Any:
        from lab.data import SpeechSet
        from revox.training.adapt import AdaptItem
        from revox.training.adapt_data import REFERENCE_SECONDS, divided, reference_codes

        items = []
        for kind in ("synthetic", "human"):
            speech = SpeechSet(self.asked.data, "train", kind)
            known = {s: [i for i in speech.of(s) if speech.utterances[i].text] for s in speech.speakers}
            several = [s for s in speech.speakers if len(known[s]) > 1]
            for speaker in several[:: len(several) // TRAINING_SPEAKERS][:TRAINING_SPEAKERS]:
                mine = known[speaker][:CLIPS]
                codes = [self.codes(speech.waveform(i)) for i in mine]
                for number, i in enumerate(mine[:2]):
                    text, said = str(speech.utterances[i].text), codes[number]
                    voice = reference_codes(codes, number, round(REFERENCE_SECONDS * 12.5))
                    items.append((speaker, AdaptItem(text, said, voice)))
        found = divided([], items)
        return replace(found, replay=presets.replay, held_out_replay=presets.held_out_replay)

    def run(self, row: str, seed: int) -> None:
        """Train the row, merge it, speak, and write its figures last."""
        from adaptation import PublishedTrainer
        from revox.synthesis.prompt import Prompter
        from revox.training.adapt import AdaptTrainer, AdaptTraining

        path = self.out / f"{row}-{seed}.json"
        if path.is_file():
            return
        if row == "nothing":
            facts: dict[str, Any] = {"scale": 0.0, "guard": {"agreement": 1.0, "nats": 0.0}}
            self.speak(self.tts, row, seed, None, facts)
        else:
            given = dict(ROWS[row])
            faults = given.pop("faults", None)
            PublishedTrainer.faults = faults or ()
            given = given if faults is None else {**PUBLISHED, **given}
            settings = AdaptTraining(**given, steps=self.asked.steps, seed=seed)
            kind = PublishedTrainer if faults is not None else AdaptTrainer
            data = self.data["speech" if settings.objective == "speech" else "distill"]
            runs = self.out / "runs" / f"{row}-{seed}"
            trainer = kind(self.model, Prompter(self.folder), settings, data, runs, self.verifier)
            began = time.process_time()
            trainer.resume()
            trainer.run(lambda figures: None, report_every=50, validate_every=settings.steps)
            minutes = (time.process_time() - began) / 60
            scale, guard = (1.0, trainer.guard(1.0)) if faults is not None else trainer.largest_scale()
            facts = {
                "scale": scale, "guard": asdict(guard), "guard at full scale": asdict(trainer.guard(1.0)),
                "cost": [trainer.held_out_cost(0.0), trainer.held_out_cost(scale)], "minutes": minutes,
                "settings": asdict(settings),
            }  # fmt: skip
            if not scale:
                facts |= {"refused": facts["guard"], "scale": 1.0, "guard": facts["guard at full scale"]}
            self.speak_merged(trainer, row, seed, facts["scale"], facts)
            trainer.deltas.remove(self.model)
        path.write_text(json.dumps(facts, indent=1, default=str) + "\n")
        print(
            row,
            seed,
            json.dumps({k: v for k, v in facts.items() if k not in ("settings", "likelihood")}),
            flush=True,
        )

    def speak_merged(self, trainer: Any, row: str, seed: int, scale: float, facts: dict[str, Any]) -> None:
        """With the folder that `revox inject` makes of the change, or with mapped voices."""
        factors = trainer.deltas.voice_map(scale)
        if factors is not None:
            self.speak(self.tts, row, seed, factors, facts)
            return
        with merged_folder(self.asked, trainer.deltas.merged(self.model, scale), self.out) as tts:
            self.speak(tts, row, seed, None, facts)

    def speak(self, tts: Any, row: str, seed: int, factors: Any, facts: dict[str, Any]) -> None:
        """Two sentences in every voice, one take of each, and the likelihood of the clips that judge."""
        import torch

        from revox.checkpoint.voice_map import map_embedding
        from revox.checkpoint.voices import Voice
        from revox.metrics.likelihood import likelihood
        from revox.synthesis.longform import Line, SpeechSettings

        settings = SpeechSettings(seed=seed, takes=1, max_seconds=12.0)
        lines, names, costs = [], [], {}
        for n, (name, one) in enumerate(self.voices.items()):
            rows = tts.model.mm_audio_embeddings.voice_embedding(one["reference"])
            if factors is not None:
                rows = map_embedding(rows, *factors)
            voice = Voice(name, one["reference"], rows.detach().to(torch.bfloat16))
            found = []
            for text, codes in one["judged"]:
                tokens = torch.tensor(tts.prompter.tokens(text, len(rows)))
                prompt = tts.model.embed_prompt(tokens, tts.prompter.audio_token, voice.embedding.float())
                score = likelihood(tts.model, prompt, codes)
                found.append((float(score.semantic_nll), float(score.flow_error)))
            costs[name] = tuple(np.mean(found, axis=0))
            for i, text in enumerate(_texts(n)):
                lines.append(Line(text, voice, settings))
                names.append(f"{row}-{seed}/{name}-{i}")
        for spoken in tts.speak_batch(lines):
            self._write(names[spoken.number], spoken.audio.samples)
        facts["likelihood"] = costs


def run(asked: argparse.Namespace) -> None:
    """Every row asked for, the first seed of all of them first."""
    rows = asked.rows.split(",,") if asked.rows else list(ROWS)
    if unknown := set(rows) - set(ROWS):
        raise SystemExit(f"there is no row {', '.join(sorted(unknown))}: take some of {',, '.join(ROWS)}")
    experiment = Experiment(asked)
    for seed in range(asked.seeds):
        for row in rows:
            experiment.run(row, seed)
            for noise in NOISE if row == "nothing" else ():
                experiment.run(row, noise)


# ---------------------------------------------------------------------------------------------- judging


def judge(asked: argparse.Namespace) -> None:
    """Score what `run` made and write rows.json and rows.md into OUT."""
    from lab.quality.measures import Models
    from lab.quality.words import words_wrong
    from revox.speech import Audio, read_audio

    models = Models({"tiny.en": asked.models / "whisper-tiny.en-ct2"})
    cached = asked.out / "measures.json"
    known: dict[str, Any] = json.loads(cached.read_text()) if cached.is_file() else {}

    def measured(measure: str, *paths: Path) -> Any:
        # By contents: a row that is made again has the same names.
        key = " ".join((measure, *(hashlib.sha256(p.read_bytes()).hexdigest()[:32] for p in paths)))
        if key not in known:
            parts = [read_audio(p, rate=16_000).samples for p in paths]
            known[key] = models.score(measure, Audio(np.concatenate(parts), 16_000))
        return known[key]

    table = []
    for path in sorted(asked.out.glob("*/*.json"), key=lambda p: p.stat().st_mtime):
        row, seed = path.stem.rsplit("-", 1)
        facts = json.loads(path.read_text())
        if row not in ROWS or "likelihood" not in facts:
            continue
        names = list(facts["likelihood"])
        judged = {p.stem.removesuffix("-judged"): p for p in path.parent.glob("*-judged.wav")}
        stretches = {n: np.array(measured("embedding", p)) for n, p in judged.items()}
        scores: dict[str, list[float]] = defaultdict(list)
        for n, name in enumerate(names):
            files = [path.parent / f"{row}-{seed}" / f"{name}-{i}.wav" for i in range(2)]
            voice = np.array(measured("embedding", *files))
            kind = name.split("-")[0]
            others = {o: float(voice @ s) for o, s in stretches.items() if o.startswith(kind)}
            scores["similarity"].append(others[name])
            scores["first"].append(float(max(others, key=others.__getitem__) == name))
            texts = [measured("words tiny.en", file) for file in files]
            scores["words"].append(words_wrong(_texts(n), texts))
            scores["semantic"].append(facts["likelihood"][name][0])
            scores["flow"].append(facts["likelihood"][name][1])
        table.append(
            {
                "encoder": path.parent.name, "row": row, "seed": int(seed), "speakers": names, **scores,
                **{k: facts.get(k) for k in ("scale", "guard", "guard at full scale", "cost", "minutes")},
            }
        )  # fmt: skip
        cached.write_text(json.dumps(known))
        print(path.parent.name, path.stem, flush=True)
    (asked.out / "rows.json").write_text(json.dumps(table, indent=None) + "\n")
    (asked.out / "rows.md").write_text(as_markdown(table))
    print(as_markdown(table))


def as_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows by encoder; two figures are of synthetic and human speakers."""
    columns = (
        "encoder", "row", "seed", "similarity", "gained by all (standard error)", "first", "words wrong, %",
        "nats of unheard clips", "flow error", "scale", "codes of presets equal, %", "nats of presets",
        "minutes", "worth it",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for encoder in dict.fromkeys(one["encoder"] for one in table):
        mine = [one for one in table if one["encoder"] == encoder]
        base = [one for one in mine if one["row"] == "nothing"]
        for one in sorted(mine, key=lambda one: (list(ROWS).index(one["row"]), one["seed"])):
            human = np.array([name.startswith("human") for name in one["speakers"]])

            def two(key: str, form: str, of: Callable[[Any], Any] = np.mean, unit: int = 1) -> str:
                found = np.array(one[key]) * unit  # noqa: B023
                return f"{of(found[~human]):{form}}, {of(found[human]):{form}}"  # noqa: B023

            gain, error, worth = compared(one, base) if base else (0.0, 0.0, False)
            guard = one["guard"]
            cells = (
                encoder, one["row"], str(one["seed"]), two("similarity", ".3f"), f"{gain:+.3f} ({error:.3f})",
                two("first", ".0f", np.sum), two("words", ".1f", unit=100), two("semantic", ".2f"),
                two("flow", ".3f"), f"{one['scale']:g}", f"{100 * guard['agreement']:.1f}",
                f"{guard['nats']:+.3f}", f"{one['minutes'] or 0:.1f}", "yes" if worth else "no",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compared(one: Mapping[str, Any], base: Sequence[Mapping[str, Any]]) -> tuple[float, float, bool]:
    """Similarity gained over doing nothing, its standard error over speakers, and what the rule says."""
    gains = np.array(one["similarity"]) - np.mean([b["similarity"] for b in base], axis=0)
    error = float(gains.std(ddof=1) / len(gains) ** 0.5)
    words = float(np.mean(one["words"]) - np.mean([b["words"] for b in base]))
    unharmed = one["guard"]["agreement"] >= 0.98 and one["guard"]["nats"] <= 0.02
    worth = (
        gains.mean() > max(LEAST_GAIN, 2 * error)
        and words <= MOST_WORDS
        and unharmed
        and one["row"] != "nothing"
    )
    return float(gains.mean()), error, bool(worth)


def main() -> None:
    from revox.demo import checkpoint_folder

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("run")
    part.add_argument("--name", required=True)
    for name in ("data", "speech", "out"):
        part.add_argument(f"--{name}", type=Path, required=True)
    part.add_argument("--encoder", type=Path)
    part.add_argument("--verifier", help="for the guard")
    part.add_argument("--checkpoint", type=Path, default=checkpoint_folder())
    part.add_argument("--rows", help="with two commas between them; by default all")
    part.add_argument("--seeds", type=int, default=1)
    part.add_argument("--steps", type=int, default=200)
    part = parts.add_parser("judge")
    part.add_argument("out", type=Path)
    part.add_argument("--models", type=Path, default=Path("runs/models"))
    asked = parser.parse_args()
    {"run": run, "judge": judge}[asked.part](asked)


if __name__ == "__main__":
    main()
