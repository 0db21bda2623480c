"""How much of a pair's codes can be heard in its sound? Asked of the lab's own encoder, the one put aside.

    python benchmarks/pair_labels.py [--sentences 320] [--items 80]

Pairs are codes and what the decoder makes of them. An encoder that learns from them is told the codes as the
right answer; where even the encoder that the decoder was made with hears others, that answer is noise. Each
row is a way to draw codes, from what the model says in its presets' voices and, a share of it, in others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lab.sentences import sentences
from revox.checkpoint.load import load_model
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.find import MODEL_PARTS
from revox.coding.pairs import PairSettings, PresetPairs
from revox.coding.presets import preset_codes
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.training.settings import Pairs
from revox.training.spoken import SpokenSettings, spoken_utterances

ORDER = ("shortest", "longest", "mixed", "offset", "jitter", "replace")
STILL = {"mixed": 0.0, "offset": 0.0, "jitter": 0.0, "replace": 0.0}
WAYS: dict[str, dict[str, Any]] = {
    "as they were said": {"shortest": 16, "longest": 64, **STILL},
    "as training takes them": Pairs().model_dump(exclude={"all_pass"}),
    "strung of 4 to 24 frames": {"shortest": 4, "longest": 24, **STILL},
    "a voice's values moved": {"shortest": 16, "longest": 64, **STILL, "offset": 0.4},
    "each frame's values moved": {"shortest": 16, "longest": 64, **STILL, "jitter": 0.15},
    "two voices mixed, half of them": {"shortest": 16, "longest": 64, **STILL, "mixed": 0.5},
    "as training took them before": {
        "shortest": 4, "longest": 24, "mixed": 0.3, "offset": 0.4, "jitter": 0.15, "replace": 0.05,
    },
}  # fmt: skip
FRAMES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--sentences", type=int, default=320)
    parser.add_argument("--interpolated", type=float, default=0.7)
    parser.add_argument("--items", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = checkpoint_folder()
    model = load_model(checkpoint, dtype=torch.float32, parts=MODEL_PARTS)
    original = original_codec(checkpoint, asked.encoder)
    coder = Coder(original)
    with tempfile.TemporaryDirectory() as folder:
        texts = list(islice(sentences("train", 0), asked.sentences))
        settings = SpokenSettings(asked.sentences, texts, interpolated=asked.interpolated)
        said = [one.codes for one in spoken_utterances(checkpoint, settings, Path(folder))]
    bank = preset_codes(checkpoint, model) + said
    rows = []
    for way, settings in WAYS.items():
        rng = torch.Generator().manual_seed(0)
        drawn = PresetPairs(original, bank, PairSettings(*(settings[name] for name in ORDER))).draw_codes(
            asked.items, FRAMES, rng
        )
        same, levels = [], []
        for codes in drawn:
            with torch.no_grad():
                sound = original.decode(codes[None])[0]
            heard = find_codes(coder, sound, CodingSettings("encoder")).codes[:, :FRAMES]
            same.append(float((heard[0] == codes[0]).float().mean()))
            levels.append(float((heard[1:] - codes[1:]).abs().float().mean()))
        rows.append(
            {
                "way": way, **settings, "same_semantic_code": round(mean(same), 3),
                "level_error": round(mean(levels), 2),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    date = datetime.now(timezone.utc).date().isoformat()
    path = asked.out / f"{date}-pair-labels.json"
    report = {"date": date, "sentences": asked.sentences, "interpolated": asked.interpolated, "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
