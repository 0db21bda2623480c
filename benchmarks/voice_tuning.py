"""What tuning a voice gains on the lab, against doing nothing and against a wrong speaker's clips.

    python benchmarks/voice_tuning.py speak --checkpoint LAB --encoder ENCODER --data RUN/data \
        --speech KOKORO --multi ../shared/speech/librispeech-multi --out OUT [--rows tuned,adapted]
    PYTHONPATH=src:. JUDGES/bin/python benchmarks/voice_tuning.py judge OUT --models runs/models

`speak` needs revox; `judge` the recognizers' environment (lab/speech/README.md). Both resume; an OUT that
was begun with another checkpoint, encoder or --minutes is refused. Speakers
are the lab's held-out ones and the five of --multi. KOKORO is what `python -m lab.speech.kokoro --plan PLAN`
makes, PLAN being benchmarks/tuning-speech.tsv (300 s of a speaker) or benchmarks/adaptation-speech.tsv (up
to 60 s): a speaker that the lab learned from is passed over. Of each speaker the last utterances, 5 s or
more, are never learned: they judge likelihood and similarity. Goals: similarity 0.05 higher from 60 s
(synthetic) and from 30 s (human), words at most 2 points more wrong. The row "adapted" is another lever on
the same clips: `revox train adapt --objective speech` on that one speaker, at the largest scale that its
guard allows, or at full scale where it allows none ("scale" in the manifest is then 0); its voice is the
clone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stamps import encoder_identity, refuse, stamp, weights_identity

RATE = 24_000
JUDGED = 5.0  # seconds of each speaker that only judge
REFERENCE = 8.0  # seconds that the voice is first cloned from
GROUPS = {"synthetic": (10, (15.0, 60.0, 300.0)), "human": (10, (8.0,)), "multi": (5, (30.0,))}
VOICES = ("before", "tuned", "wrong speaker", "adapted")
ENOUGH = 0.7  # of the seconds asked for; a speaker of whom there is less is left out
SENTENCES = (
    "We will be back on Thursday at four forty five.",
    "She put the letters on the table and went out into the garden.",
    "Nobody knew what the old man wanted to say to his friend.",
)


@dataclass(frozen=True)
class Utterance:
    """What one speaker says once: samples [n] at 24 kHz and the words."""

    samples: np.ndarray
    text: str


def held_out_synthetic(speech: Path) -> dict[str, list[Utterance]]:
    """Utterances in the folder `speech`, by speaker, of those that the lab has not learned from."""
    from lab.data import read_utterance
    from lab.sources import SPEECH, SourceUtterance
    from lab.speech.plan import read_speakers

    learned = {name for name, one in read_speakers(SPEECH / "speakers.json").items() if one.split == "train"}
    synthetic: dict[str, list[Utterance]] = defaultdict(list)
    for line in (speech / "index.jsonl").read_text().splitlines():
        one = json.loads(line)
        if one["speaker"] in learned:
            continue
        source = SourceUtterance(
            speech / "audio" / one["file"], None, one["speaker"], "", None, one["written"]
        )
        samples = read_utterance(source)[0].astype(np.float32) / 32768
        synthetic[one["speaker"]].append(Utterance(samples, one["written"]))
    if not synthetic:
        refuse(f"the lab learned from every speaker in {speech}: see the plans at the top of {__file__}")
    return synthetic


def synthetic_and_human(data: Path, speech: Path) -> dict[str, dict[str, list[Utterance]]]:
    """Utterances of the held-out speakers by name: synthetic ones of `speech`, human ones of a build."""
    from lab.data import SpeechSet

    people = SpeechSet(data, "heldout", "human")
    human = {
        name: [
            Utterance(people.waveform(i), str(people.utterances[i].text))
            for i in people.of(name)
            if people.utterances[i].text
        ]
        for name in people.speakers
    }
    return {"synthetic": held_out_synthetic(speech), "human": human}


def _multi(folder: Path) -> dict[str, list[Utterance]]:
    from revox.speech import read_audio

    multi: dict[str, list[Utterance]] = defaultdict(list)
    for line in (folder / "transcripts.jsonl").read_text().splitlines():
        clip = json.loads(line)
        text = " ".join(word[2] for word in clip["words"])
        multi[clip["file"].split("-")[0]].append(
            Utterance(read_audio(folder / clip["file"], rate=RATE).samples, text)
        )
    return multi


def divided(utterances: Sequence[Utterance], most: float) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances to learn from, `most` seconds at most, and those that judge, from the end."""
    judged: list[Utterance] = []
    rest = list(utterances)
    while rest and sum(len(u.samples) for u in judged) < JUDGED * RATE:
        judged.append(rest.pop())
    learned: list[Utterance] = []
    for one in rest:
        if sum(len(u.samples) for u in [*learned, one]) > most * RATE and len(learned) > 1:
            break
        learned.append(one)
    return learned, judged


def preset_data(folder: Path, model: Any, data: Path, out: Path) -> Any:
    """`AdaptData` of what the presets of `folder` say of the lab's sentences; codes kept in `out`."""
    from lab.data import SpeechSet
    from revox.coding import Coder
    from revox.coding.presets import preset_codes
    from revox.coding.student import trained_student
    from revox.training import adapt_data

    texts = sorted({str(u.text) for u in SpeechSet(data, "train", "synthetic").utterances})[::30][:40]
    coder = Coder(
        model.audio_tokenizer,
        lambda should_stop: preset_codes(folder, model),
        student=partial(trained_student, folder),
    )
    method = "encoder" if coder.has_encoder else "student"
    spoken = adapt_data.spoken_presets(folder, adapt_data.AdaptSpeech(texts, out))
    presets = adapt_data.preset_items(folder, coder, spoken, method)
    return adapt_data.divided(presets, adapt_data.distilled(presets))


@contextmanager
def merged_folder(asked: argparse.Namespace, tensors: Mapping[str, Any], out: Path) -> Iterator[Any]:
    """What speaks with the folder that `revox inject` makes of an adaptation's `tensors`, within `out`.

    Without an encoder, which `inject` wants, the weights are written here.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from revox import load
    from revox.checkpoint.inject import InjectionOptions, inject
    from revox.checkpoint.tensors import WEIGHTS, write_safetensors_stream

    file, folder = out / "adaptation.safetensors", out / "adapted"
    shutil.rmtree(folder, ignore_errors=True)
    if asked.encoder is None:
        shutil.copytree(asked.checkpoint, folder)
        weights = load_file(folder / WEIGHTS)
        save_file(weights | {n: t.bfloat16().contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
        yield load(folder, "cpu", torch.float32)
        shutil.rmtree(folder)
        return
    write_safetensors_stream(file, [(n, tuple(t.shape), "BF16", t) for n, t in tensors.items()], {})
    options = InjectionOptions(out=folder, merge=True, adaptation=file)
    inject(asked.checkpoint, asked.encoder, options)
    yield load(folder, "cpu", torch.float32)
    shutil.rmtree(folder)


def adapt_to_speaker(
    model: Any, prompter: Any, presets: Any, items: Sequence[Any], run: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merged tensors of LoRA learned from one speaker's `items`, and its figures."""
    from revox.training.adapt import AdaptTrainer, AdaptTraining

    settings = AdaptTraining(objective="speech", steps=200)
    fourth = max(1, len(items) // 4)
    data = replace(presets, items=items[fourth:], held_out_items=items[:fourth])
    began = time.process_time()
    trainer = AdaptTrainer(model, prompter, settings, data, run)
    trainer.run(lambda figures: None, report_every=50, validate_every=settings.steps)
    scale, guard = trainer.largest_scale()
    facts = {
        "scale": scale, "guard": asdict(guard), "cpu_seconds": round(time.process_time() - began, 1),
        "cost": [trainer.held_out_cost(0.0), trainer.held_out_cost(scale)],
    }  # fmt: skip
    tensors = trainer.deltas.merged(model, scale or 1.0)
    trainer.deltas.remove(model)
    return tensors, facts


def lacking(rows: Mapping[str, Any], key: str, asked_rows: Sequence[str]) -> list[str]:
    """The voices asked for that the manifest's `rows` do not have for `key` yet."""
    there = rows[key]["rows"] if key in rows else {}
    return [row for row in VOICES if (row == "before" or row in asked_rows) and row not in there]


def speak(asked: argparse.Namespace) -> None:
    """Tune every voice, speak with it before and after, and write the manifest."""
    import torch

    from revox import load
    from revox.checkpoint.inject import InjectionOptions, inject
    from revox.checkpoint.load import load_model
    from revox.checkpoint.voices import Voice
    from revox.cloning.clone import SelectedSpeech, source_of
    from revox.cloning.tune import TuningClip, VoiceTuning, tune_voice
    from revox.metrics.likelihood import likelihood
    from revox.speech import Audio, select_reference, write_audio
    from revox.speech.files import replace_file
    from revox.training.adapt import AdaptItem

    asked_rows = asked.rows.split(",")
    if unknown := set(asked_rows) - set(VOICES):
        refuse(f"there is no row {', '.join(sorted(unknown))}: take some of {', '.join(VOICES[1:])}")
    torch.set_num_threads(1)
    stamp(
        asked.out,
        {
            "checkpoint": weights_identity(asked.checkpoint), "encoder": encoder_identity(asked.encoder),
            "minutes": asked.minutes,
        },
    )  # fmt: skip
    folder = asked.out / "checkpoint"
    if not folder.exists():
        inject(asked.checkpoint, asked.encoder, InjectionOptions(out=folder))
    tts = load(folder, "cpu", torch.float32)
    path = asked.out / "manifest.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = VoiceTuning(minutes=asked.minutes)
    if "adapted" in asked_rows:
        model = load_model(folder, "cpu", torch.float32)
        presets = preset_data(folder, model, asked.data, asked.out)

    def clips(utterances: Sequence[Utterance]) -> list[TuningClip]:
        made = []
        for one in utterances:
            padded = np.pad(one.samples, (0, -len(one.samples) % 1920))
            made.append(TuningClip(one.text, tts.find_codes(Audio(padded, RATE)).codes))
        return made

    def cost(tts: Any, voice: Any, judged: Sequence[TuningClip]) -> dict[str, float]:
        found = []
        for clip in judged:
            tokens = torch.tensor(tts.prompter.tokens(clip.text, len(voice.embedding)))
            prompt = tts.model.embed_prompt(tokens, tts.prompter.audio_token, voice.embedding)
            found.append(likelihood(tts.model, prompt, clip.codes))
        return {
            "semantic": float(torch.stack([one.semantic_nll for one in found]).mean()),
            "flow": float(torch.stack([one.flow_error for one in found]).mean()),
        }

    found = synthetic_and_human(asked.data, asked.speech) | {"multi": _multi(asked.multi)}
    for kind, speakers in found.items():
        if kind not in asked.kinds:
            continue
        most, lengths = GROUPS[kind]
        names = [n for n in sorted(speakers) if len(divided(speakers[n], 1.0)[0]) > 1][
            : min(most, asked.limit)
        ]
        for n, name in enumerate(names):
            for seconds in lengths:
                key = f"{kind}-{name}-{seconds:g}"
                todo = lacking(rows, key, asked_rows)
                if not todo or asked.seconds not in (None, seconds):
                    continue
                learned, judged = divided(speakers[name], seconds)
                if sum(len(u.samples) for u in learned) < ENOUGH * seconds * RATE:
                    continue
                other, _ = divided(speakers[names[(n + 1) % len(names)]], seconds)
                samples = np.concatenate([u.samples for u in learned])[: round(REFERENCE * RATE)]
                selection = select_reference(Audio(samples, RATE), rate=RATE, min_seconds=0.5, whole=True)
                reference = SelectedSpeech(selection, source_of(samples.tobytes()))
                start = tts.clone(reference, consent="a speaker of the lab's lists", seed=0)
                facts: dict[str, Any] = dict(rows[key]["rows"]) if key in rows else {}
                own = clips(learned)
                wrong = clips(other) if "wrong speaker" in todo else []
                measured = clips(judged)

                def finished(row: str, tts: Any, voice: Any) -> None:
                    facts.setdefault(row, {}).update(cost(tts, voice, measured))  # noqa: B023
                    for i, text in enumerate(SENTENCES):
                        audio = tts.synthesize(text, voice, seed=0, max_seconds=15.0).audio
                        file = asked.out / f"{key}-{row}-{i}.wav"  # noqa: B023
                        write_audio(file, Audio(audio.samples, RATE))

                if "before" in todo:
                    finished("before", tts, start)
                for row, given in (("tuned", own), ("wrong speaker", wrong)):
                    if row not in todo:
                        continue
                    validating = max(1, round(settings.held_out * len(given)))
                    began = time.process_time()
                    tuning = tune_voice(
                        tts.model, tts.prompter, start, given[validating:], given[:validating], settings
                    )
                    facts[row] = {
                        **{k: v for k, v in asdict(tuning).items() if k != "embedding"},
                        "cpu_seconds": round(time.process_time() - began, 1),
                    }
                    finished(row, tts, Voice(name, start.codes, tuning.embedding))
                if "adapted" in todo:
                    items = [AdaptItem(one.text, one.codes, start.codes) for one in own]
                    run = asked.out / "runs" / key
                    tensors, facts["adapted"] = adapt_to_speaker(model, tts.prompter, presets, items, run)
                    with merged_folder(asked, tensors, asked.out) as adapted:
                        finished("adapted", adapted, start)
                stretch = np.concatenate([u.samples for u in judged])
                write_audio(asked.out / f"{key}-judged.wav", Audio(stretch, RATE))
                rows[key] = {
                    "kind": kind, "speaker": name, "seconds": seconds, "rows": facts,
                    "learned": round(sum(len(u.samples) for u in learned) / RATE, 1),
                }  # fmt: skip
                replace_file(path, json.dumps(rows, indent=1, default=str) + "\n")
                print(key, {r: round(f["semantic"], 3) for r, f in facts.items()}, flush=True)


def judge(asked: argparse.Namespace) -> None:
    """Score what `speak` made and write results.json and results.md."""
    from lab.quality.measures import Models
    from lab.quality.words import words_wrong
    from revox.speech import Audio, read_audio

    models = Models({name: asked.models / f"whisper-{name}-ct2" for name in ("base", "tiny.en")})
    rows = json.loads((asked.out / "manifest.json").read_text())

    def audio(name: str) -> Audio:
        return read_audio(asked.out / f"{name}.wav", rate=16_000)

    stretches = {key: np.array(models.score("embedding", audio(f"{key}-judged"))) for key in rows}
    table: dict[tuple[str, float, str], list[dict[str, float]]] = defaultdict(list)
    for key, one in rows.items():
        others = [k for k, o in rows.items() if (o["kind"], o["seconds"]) == (one["kind"], one["seconds"])]
        for row in one["rows"]:
            spoken = [audio(f"{key}-{row}-{i}") for i in range(len(SENTENCES))]
            voice = np.array(
                models.score("embedding", Audio(np.concatenate([s.samples for s in spoken]), 16_000))
            )
            scores = {k: float(voice @ stretches[k]) for k in others}
            texts = {m: [models.score(f"words {m}", s) for s in spoken] for m in ("base", "tiny.en")}
            table[one["kind"], one["seconds"], row].append(
                {
                    "similarity": scores[key],
                    "first": float(max(scores, key=scores.__getitem__) == key),
                    **{f"words wrong, {m}": words_wrong(SENTENCES, found) for m, found in texts.items()},
                    "naturalness": float(np.mean([models.score("naturalness", s) for s in spoken])),
                    "semantic": one["rows"][row]["semantic"],
                    "flow": one["rows"][row]["flow"],
                    "minutes": one["rows"][row].get("cpu_seconds", 0.0) / 60,
                }
            )
    columns = list(next(iter(table.values()))[0])
    lines = [
        "| speakers | seconds | voice | n | " + " | ".join(columns) + " |",
        "|" + " --- |" * (4 + len(columns)),
    ]
    means = []
    for (kind, seconds, row), found in table.items():
        mean = {c: float(np.mean([f[c] for f in found])) for c in columns}
        means.append({"kind": kind, "seconds": seconds, "voice": row, "n": len(found), **mean})
        lines.append(
            f"| {kind} | {seconds:g} | {row} | {len(found)} | "
            + " | ".join(f"{mean[c]:.3f}" for c in columns)
            + " |"
        )
    (asked.out / "results.json").write_text(json.dumps(means, indent=1) + "\n")
    (asked.out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("speak")
    for name in ("checkpoint", "encoder", "data", "speech", "multi", "out"):
        part.add_argument(f"--{name}", type=Path, required=True)
    part.add_argument("--minutes", type=float, default=10.0)
    part.add_argument("--limit", type=int, default=100, help="at most so many speakers of each kind")
    part.add_argument("--rows", default="tuned,wrong speaker", help="of tuned, wrong speaker, adapted")
    part.add_argument("--seconds", type=float, help="of this length of speech only")
    part.add_argument("--kinds", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    part = parts.add_parser("judge")
    part.add_argument("out", type=Path)
    part.add_argument("--models", type=Path, default=Path("runs/models"))
    asked = parser.parse_args()
    {"speak": speak, "judge": judge}[asked.part](asked)


if __name__ == "__main__":
    main()
