"""Does an encoder that learns from pairs read the decoder's phases? Trained with and without turning them.

    python benchmarks/pair_phases.py --data RUN/data [--steps 450] [--phases 0 2.5] [--sentences 64]

Trains the lab's encoder on pairs alone (no recording is heard), once for each `--phases`, everything else the
same, and compares the codes that it gives validation speakers' recordings with those of the encoder put
aside. Held-out speakers are not touched. On the pairs themselves the encoder of phases 0 looks better: that
is what it has learnt.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lab.data import KINDS, RATE, SpeechSet
from revox.checkpoint.load import load_model
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.find import MODEL_PARTS
from revox.coding.presets import preset_codes
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.losses.spectral import mel_distance
from revox.metrics.codes import embedding_cosine
from revox.training.encoder import EncoderTrainer, TrainingData
from revox.training.sentences import drawn_sentences
from revox.training.settings import EncoderTraining
from revox.training.spoken import SpokenSettings, spoken_utterances

SPEAKERS, SECONDS = 8, 3.2


def recordings(data: Path, kind: str, frame: int) -> list[Tensor]:
    """One stretch `[samples]` of each of the first validation speakers that is no preset's own."""
    speech = SpeechSet(data, "validation", kind)
    first: dict[str, int] = {}
    for i, utterance in enumerate(speech.utterances):
        if utterance.preset is None:
            first.setdefault(utterance.speaker, i)
    cut = [speech.waveform(i)[: round(SECONDS * RATE)] for i in list(first.values())[:SPEAKERS]]
    return [torch.from_numpy(one[: len(one) // frame * frame].copy()) for one in cut]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--phases", type=float, nargs="+", default=[0.0, 2.5])
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = checkpoint_folder()
    model = load_model(checkpoint, dtype=torch.float32, parts=MODEL_PARTS)
    original = original_codec(checkpoint, asked.encoder)
    clips = {kind: recordings(asked.data, kind, original.samples_per_frame) for kind in KINDS}
    coder, encoding = Coder(original), CodingSettings("encoder")
    right = {kind: [find_codes(coder, clip, encoding).codes for clip in clips[kind]] for kind in KINDS}
    presets = preset_codes(checkpoint, model)
    mean = torch.cat([model.mm_audio_embeddings.voice_embedding(c)[:-1].float() for c in presets]).mean(dim=0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        texts = drawn_sentences(asked.sentences)
        spoken = spoken_utterances(
            checkpoint, SpokenSettings(asked.sentences, texts), Path(folder) / "spoken"
        )
        bank = presets + [one.codes for one in spoken]
        for phases in asked.phases:
            settings = EncoderTraining.model_validate(
                {
                    "clips": 0,
                    "pairs": 10,
                    "seconds": 1.6,
                    "learning_rate": 1e-3,
                    "betas": (0.9, 0.98),
                    "steps": asked.steps,
                    "warmup": 10,
                    "decay_steps": max(1, asked.steps // 2),
                    "weights": {"diversity": 0},
                    "pair": {"all_pass": phases},
                }
            )
            trainer = EncoderTrainer(model, TrainingData(bank), settings, Path(folder) / f"{phases}")
            began, last = time.process_time(), []
            for step in range(asked.steps):
                last = [*last[-19:], trainer.step()]
                if (step + 1) % 50 == 0:
                    print(f"phases {phases:g}: step {step + 1} of {asked.steps}", flush=True)
            codec = copy.deepcopy(original)
            codec.load_state_dict(trainer.encoder_state(), strict=False)
            restored = Coder(codec)
            row: dict[str, Any] = {
                "phases": phases, "steps": asked.steps, "cpu_seconds": round(time.process_time() - began),
                "pairs_level_error": sum(one["acoustic"] for one in last) / len(last),
            }  # fmt: skip
            for kind in KINDS:
                found = []
                for clip, truth in zip(clips[kind], right[kind], strict=True):
                    codes = find_codes(restored, clip, encoding).codes
                    own, true = (
                        model.mm_audio_embeddings.voice_embedding(c)[:-1].float() for c in (codes, truth)
                    )
                    with torch.no_grad():
                        decoded = original.decode(codes[None])[0][: len(clip)]
                    found.append(
                        {
                            "same_semantic_code": float((codes[0] == truth[0]).float().mean()),
                            "level_error": float((codes[1:] - truth[1:]).abs().float().mean()),
                            "row_cosine": embedding_cosine(own, true, mean),
                            "mel": float(mel_distance(decoded, clip, RATE)),
                        }
                    )
                row[kind] = {name: round(median(one[name] for one in found), 4) for name in found[0]}
            rows.append(row)
            print(json.dumps(row), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    date = datetime.now(timezone.utc).date().isoformat()
    path = asked.out / f"{date}-pair-phases.json"
    path.write_text(json.dumps({"date": date, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
