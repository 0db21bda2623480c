"""How good is the lab checkpoint? Codec, speech, and cloning through the true encoder, with floors and
ceilings.

    python benchmarks/lab_quality.py --data RUN/data --encoder lab/reference-encoder/encoder.safetensors

The clips and speakers are the committed held-out lists; `--data` is where `python -m lab build` put the
speech.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path

import numpy as np
import torch

from lab.data import RATE, SpeechSet
from lab.sentences import jsgf
from revox import load
from revox.checkpoint.voices import Voice
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.losses.spectral import mel_distance
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_error_rate
from revox.metrics.speaker import SpeakerVerifier
from revox.speech import Audio

MIN_SECONDS = 3.0


def long_clips(speech: SpeechSet, limit: float = 8.0) -> dict[str, np.ndarray]:
    """Up to `limit` seconds of every speaker without a preset's name, utterances laid end to end."""
    found = {}
    for speaker in speech.speakers:
        mine = [i for i in speech.of(speaker) if speech.utterances[i].preset is None]
        if mine:
            joined = np.concatenate([speech.waveform(i) for i in mine])
            found[speaker] = joined[: int(limit * RATE)]
    return found


def lab_arguments(description: str | None) -> argparse.ArgumentParser:
    """Where a lab build's speech, the checkpoint and its encoder lie; how many sentences; where to write."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sentences", type=int, default=60)
    return parser


def preset_sentences(speech: SpeechSet, count: int) -> list[int]:
    """`count` utterances of the presets, spread evenly."""
    mine = [i for i, utterance in enumerate(speech.utterances) if utterance.preset]
    return mine[:: max(1, len(mine) // count)][:count]


def codec_table(clips: dict[str, np.ndarray], codec, judge: SpeakerVerifier) -> dict[str, float]:
    """Decoded clips beside their originals: similarity, rank among all, mel distance; and the floor."""
    originals = {k: judge.embed(Audio(v, RATE)) for k, v in clips.items()}
    names = list(clips)
    own, ranks, distances, others = [], [], [], []
    for i, name in enumerate(names):
        with torch.no_grad():
            decoded = codec.decode(codec.encode(torch.from_numpy(clips[name])[None]))[0, : len(clips[name])]
        distances.append(float(mel_distance(decoded[None], torch.from_numpy(clips[name])[None], RATE)))
        voice = judge.embed(Audio(decoded.numpy(), RATE))
        scores = [judge.similarity(voice, original) for original in originals.values()]
        own.append(scores[i])
        ranks.append(1 + sum(score > scores[i] for score in scores))
    for i, a in enumerate(names):
        others += [judge.similarity(originals[a], originals[b]) for b in names[i + 1 :]]
    halves = [
        judge.similarity(Audio(v[: len(v) // 2], RATE), Audio(v[len(v) // 2 :], RATE)) for v in clips.values()
    ]
    return {
        "clips": len(names),
        "similarity": float(np.median(own)),
        "first_of_all": int(sum(r == 1 for r in ranks)),
        "median_rank": float(np.median(ranks)),
        "same_speaker_halves": float(np.median(halves)),
        "different_speakers": float(np.median(others)),
        "mel_distance": float(np.median(distances)),
    }


def cloning_table(
    clips: dict[str, np.ndarray], codec, tts, judge: SpeakerVerifier, texts: list[str]
) -> dict[str, float]:
    """Speech in each clip's voice, from 5 s through the true encoder, beside the clips."""
    references = {
        k: v[: int(5 * RATE) // 1920 * 1920] for k, v in clips.items() if len(v) > MIN_SECONDS * RATE
    }
    embedded = [judge.embed(Audio(v, RATE)) for v in references.values()]
    recognizer = PocketsphinxRecognizer(jsgf())
    ranks, similarities, ceilings, heard = [], [], [], []
    for i, wave in enumerate(references.values()):
        with torch.no_grad():
            codes = codec.encode(torch.from_numpy(wave)[None])[0]
            again = codec.decode(codes[None])[0].numpy()
        ceilings.append(judge.similarity(Audio(again, RATE), embedded[i]))
        voice = Voice(
            name="clone",
            codes=codes,
            rows=tts.model.mm_audio_embeddings.voice_embedding(codes),
            provenance={},
        )
        parts = [tts.speak(t, voice, seed=s, max_seconds=6.0) for s, t in enumerate(texts)]
        heard += [recognizer.transcribe(part) for part in parts]
        audio = Audio(np.concatenate([part.samples for part in parts]), RATE)
        if len(audio.samples) < RATE:
            ranks.append(len(references))
            similarities.append(0.0)
            continue
        said = judge.embed(audio)
        scores = [judge.similarity(said, reference) for reference in embedded]
        similarities.append(scores[i])
        ranks.append(1 + sum(score > scores[i] for score in scores))
    return {
        "speakers": len(ranks),
        "similarity": float(np.median(similarities)),
        "first_of_all": int(sum(r == 1 for r in ranks)),
        "median_rank": float(np.median(ranks)),
        "decoded_reference_similarity": float(np.median(ceilings)),
        "word_errors": word_error_rate(texts * len(references), heard),
    }


def main() -> None:
    arguments = lab_arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    folder = arguments.checkpoint or checkpoint_folder()
    codec = original_codec(folder, arguments.encoder)
    judge = SpeakerVerifier()
    report: dict = {"date": datetime.date.today().isoformat(), "machine": f"{platform.machine()} CPU"}
    held = SpeechSet(arguments.data, "heldout", "synthetic")
    synthetic = long_clips(held)
    report["codec_synthetic"] = codec_table(synthetic, codec, judge)
    print("codec, synthetic", report["codec_synthetic"], flush=True)
    human: dict[str, np.ndarray] = {}
    if (arguments.data / "human-heldout.json").is_file():
        human = long_clips(SpeechSet(arguments.data, "heldout", "human"))
        report["codec_human"] = codec_table(human, codec, judge)
        print("codec, human", report["codec_human"], flush=True)

    recognizer = PocketsphinxRecognizer(jsgf())
    chosen = preset_sentences(held, arguments.sentences)
    texts = [held.utterances[i].text for i in chosen]
    source = [recognizer.transcribe(Audio(held.waveform(i), RATE)) for i in chosen]
    decoded = []
    for i in chosen:
        with torch.no_grad():
            wave = codec.decode(codec.encode(torch.from_numpy(held.waveform(i))[None]))[0].numpy()
        decoded.append(recognizer.transcribe(Audio(wave, RATE)))
    tts = load(folder, dtype=torch.float32)
    spoken, ended, similar, durations = [], 0, [], []
    for i in chosen:
        utterance = held.utterances[i]
        audio = tts.speak(utterance.text, utterance.preset, seed=0, max_seconds=10.0)
        ended += not audio.truncated
        durations.append(len(audio.samples) / RATE - utterance.samples / RATE)
        spoken.append(recognizer.transcribe(audio))
        if len(audio.samples) > RATE:
            similar.append(judge.similarity(audio, Audio(held.waveform(i), RATE)))
    rng = np.random.default_rng(0)
    noise = [
        recognizer.transcribe(Audio((rng.standard_normal(2 * RATE) * 0.05).astype(np.float32), RATE))
        for _ in range(10)
    ]
    report["speech"] = {
        "sentences": len(texts),
        "word_error_source": word_error_rate(texts, source),
        "word_error_decoded": word_error_rate(texts, decoded),
        "word_error_spoken": word_error_rate(texts, spoken),
        "word_error_spoken_against_another_sentence": word_error_rate(texts[1:] + texts[:1], spoken),
        "words_heard_in_noise": sum(len(n.split()) for n in noise),
        "ended_by_itself": ended,
        "median_difference_of_length_seconds": float(np.median(durations)),
        "similarity_to_the_presets_source": float(np.median(similar)) if similar else None,
    }
    print("speech", report["speech"], flush=True)

    report["cloning_through_the_true_encoder"] = cloning_table(synthetic, codec, tts, judge, texts[:3])
    print("cloning, synthetic", report["cloning_through_the_true_encoder"], flush=True)
    if human:
        report["cloning_human"] = cloning_table(human, codec, tts, judge, texts[:3])
        print("cloning, human", report["cloning_human"], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{report['date']}-lab-quality.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
