"""Does inversion through the lab's frozen decoder keep the speaker? Held-out clips against wrong speakers.

    python benchmarks/lab_inversion.py --data RUN/data [--clips 8] [--seconds 3]

For each clip: the similarity of its decoded codes to the whole recording it came from, to the recordings of
the other held-out speakers, and the recording's rank among all. Ceiling: codes of the encoder put aside.
Floor: decoded from another speaker's codes, the rank is (speakers + 1) / 2 on average.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import numpy as np
import torch

from lab.data import RATE, SpeechSet
from lab_quality import long_clips
from revox.checkpoint.load import load_model
from revox.coding import Coder, CodingSettings, find_codes
from revox.coding.invert import InversionConfig
from revox.coding.presets import preset_codes
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = checkpoint_folder()
    model = load_model(folder, dtype=torch.float32, parts=("audio_tokenizer", "mm_audio_embeddings"))
    codec = model.audio_tokenizer
    coder = Coder(codec, preset_codes(folder, model))
    original = Coder(original_codec(folder, arguments.encoder))
    judge = SpeakerVerifier()
    config = InversionConfig()
    report: dict = {
        "date": datetime.date.today().isoformat(),
        "seconds": arguments.seconds,
        "steps": config.steps,
    }
    for kind in ("human", "synthetic"):
        clips = list(long_clips(SpeechSet(arguments.data, "heldout", kind)).values())
        voices = [judge.embed(Audio(clip, RATE)) for clip in clips]
        rows: dict[str, list[tuple[float, float, int]]] = {"inversion": [], "original encoder": []}
        chosen = list(range(0, len(clips), max(1, len(clips) // arguments.clips)))[: arguments.clips]
        frame = codec.samples_per_frame
        for i in chosen:
            length = min(len(clips[i]), int(arguments.seconds * RATE)) // frame * frame
            target = torch.from_numpy(clips[i][:length])
            found = {
                "inversion": find_codes(coder, target, CodingSettings("inversion")).codes,
                "original encoder": find_codes(original, target, CodingSettings("encoder")).codes,
            }
            for name, codes in found.items():
                with torch.no_grad():
                    voice = judge.embed(Audio(codec.decode(codes[None])[0].numpy(), RATE))
                wrong = [judge.similarity(voice, v) for k, v in enumerate(voices) if k != i]
                place = 1 + sum(other > judge.similarity(voice, voices[i]) for other in wrong)
                rows[name].append((judge.similarity(voice, voices[i]), float(np.median(wrong)), place))
            print(kind, i, {k: tuple(round(x, 3) for x in v[-1]) for k, v in rows.items()}, flush=True)
        report[kind] = {
            name: {
                "clips": len(found),
                "similarity": float(np.median([r[0] for r in found])),
                "similarity_to_wrong_speakers": float(np.median([r[1] for r in found])),
                "closer_to_its_own_than_to_the_median_wrong_speaker": sum(r[0] > r[1] for r in found),
                "median_rank": float(np.median([r[2] for r in found])),
                "speakers": len(clips),
            }
            for name, found in rows.items()
        }
        print(kind, json.dumps(report[kind], indent=1), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{report['date']}-lab-inversion.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
