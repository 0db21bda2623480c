"""What of the words survives the teacher codec's bottleneck, before anything learns waveforms.

    python benchmarks/lab_foreseen.py speak RUN --config CONFIG --out DIR
    PYTHONPATH=src:. JUDGES/bin/python benchmarks/lab_foreseen.py judge DIR --models runs/models

`speak` turns validation utterances' own spectra (`source`), the teacher codec's from true codes (`true`),
and those from true semantic codes with foreseen acoustic values (`foreseen`:
`lab.teacher_codec.foreseen_values`, the true past given) into sound by Griffin-Lim's method (Perraudin et
al. 2013). `judge` counts words wrong by Whisper base, greedy. What a language model says can hardly be
clearer than `foreseen`; a trained decoder makes better sound than Griffin-Lim, so figures compare codecs,
not speech.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    made = commands.add_parser("speak")
    made.add_argument("run", type=Path)
    made.add_argument("--config", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--count", type=int, default=10, help="utterances of each kind")
    made.set_defaults(do=speak)
    judged = commands.add_parser("judge")
    judged.add_argument("out", type=Path)
    judged.add_argument("--models", type=Path, required=True)
    judged.set_defaults(do=judge)
    asked = parser.parse_args()
    asked.do(asked)


def speak(asked: argparse.Namespace) -> None:
    import torch

    from lab.build import BuildRun, frame_sets, semantic_data, trained_teacher
    from lab.frames import PATCH_BANDS, PATCH_FFT
    from lab.settings import read_settings
    from lab.teacher_codec import foreseen_values
    from revox.losses.stft import stft, to_mel

    run = BuildRun(asked.run, read_settings(asked.config))
    teacher, hop = trained_teacher(run), run.params.voxtral_config().codec.pretransform_patch_size
    rate = run.params.voxtral_config().codec.sampling_rate
    with run.state("teacher") as state:
        weights = state["foreseen"]
    foresee = torch.nn.Sequential(
        torch.nn.Linear(*weights["0.weight"].shape[::-1]),
        torch.nn.SiLU(),
        torch.nn.Linear(*weights["2.weight"].shape[::-1]),
    )
    foresee.load_state_dict(weights)
    bank = to_mel(torch.eye(PATCH_FFT // 2 + 1), rate, PATCH_BANDS)
    window = torch.hann_window(PATCH_FFT)

    def sound(mel: torch.Tensor) -> np.ndarray:
        # Magnitudes by multiplicative updates, then phases by fast Griffin-Lim.
        wanted = 10**mel.T
        magnitude = (torch.linalg.pinv(bank) @ wanted).clamp_min(1e-8)
        for _ in range(60):
            magnitude = magnitude * ((bank.T @ wanted) / (bank.T @ (bank @ magnitude) + 1e-9))
        rng = torch.Generator().manual_seed(0)
        phase = torch.exp(2j * torch.pi * torch.rand(magnitude.shape, generator=rng))
        before = torch.zeros_like(phase)
        for _ in range(60):
            wave = torch.istft(magnitude * phase, PATCH_FFT, hop, window=window)
            found = stft(wave, PATCH_FFT, hop)
            found = torch.nn.functional.pad(found, (0, magnitude.shape[1] - found.shape[1]))
            moved = found - 0.5 * before
            before, phase = found, moved / (moved.abs() + 1e-9)
        wave = torch.istft(magnitude * phase, PATCH_FFT, hop, window=window)
        return (0.5 * wave / wave.abs().max()).numpy()

    asked.out.mkdir(parents=True, exist_ok=True)
    texts = {}
    data = semantic_data(run, teacher)
    for kind, split in frame_sets(run, ("validation",)):
        speech, one = run.speech(split, kind), data[kind, split]
        fit = [i for i, u in enumerate(speech.utterances) if u.text and 1.5 < u.samples / rate < 5]
        for n, i in enumerate(fit[: asked.count]):
            rows = slice(one.frames.starts[i], one.frames.ends[i])
            features = torch.from_numpy(one.frames.features[rows].astype(np.float32))[None]
            codes = torch.from_numpy(one.codes[rows].astype(np.int64))[None]
            with torch.no_grad():
                given, values = teacher.rows[codes], torch.tanh(teacher.encode_latents(features, codes))
                half = (teacher.levels - 1) / 2
                acoustic = {
                    "true": (values * half).round() / half,
                    "foreseen": foreseen_values(foresee, values, given),
                }
                spectra = {"source": features} | {
                    name: teacher.decode(given, x) * teacher.scale + teacher.mean
                    for name, x in acoustic.items()
                }
            for name, x in spectra.items():
                mel = x[0, :, : rate // hop * 2 // 25 * PATCH_BANDS].reshape(-1, PATCH_BANDS)
                soundfile.write(asked.out / f"{kind}-{n:02d}-{name}.wav", sound(mel), rate)
            texts[f"{kind}-{n:02d}"] = speech.utterances[i].text
    (asked.out / "texts.json").write_text(json.dumps(texts, indent=1))


def judge(asked: argparse.Namespace) -> None:
    import jiwer
    import librosa
    from faster_whisper import WhisperModel

    from lab.quality.words import normalize_words

    whisper = WhisperModel(str(asked.models / "whisper-base-ct2"), compute_type="int8", cpu_threads=1)
    counts: dict[tuple[str, str], list[int]] = {}
    for key, text in json.loads((asked.out / "texts.json").read_text()).items():
        for path in sorted(asked.out.glob(f"{key}-*.wav")):
            samples, rate = soundfile.read(path, dtype="float32")
            samples = librosa.resample(samples, orig_sr=rate, target_sr=16000)
            segments, _ = whisper.transcribe(
                samples, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False,
                max_new_tokens=60,
            )  # fmt: skip
            words = normalize_words(text)
            found = jiwer.process_words(words, normalize_words(" ".join(s.text for s in segments)) or "-")
            count = counts.setdefault((key.split("-")[0], path.stem.rpartition("-")[2]), [0, 0])
            count[0] += found.substitutions + found.deletions + found.insertions
            count[1] += len(words.split())
    for (kind, name), (wrong, total) in sorted(counts.items()):
        print(f"{kind:10} {name:9} {100 * wrong / total:5.1f} % of {total} words wrong")


if __name__ == "__main__":
    main()
