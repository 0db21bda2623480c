"""Draws the lab's synthetic speakers: `python benchmarks/lab_speakers.py OUT.json`.

Speakers whom the recognizer does not hear saying three sentences are dropped, so that everybody in the lab
can be verifierd by their words; Resemblyzer then says who sounds like whom.
"""

from __future__ import annotations

import argparse
import itertools
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from lab.sentences import jsgf, sentences
from lab.speakers import SyntheticSpeaker, cast_presets, draw_speakers, split_speakers, to_json
from lab.synthesize import synthesize
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_error_rate
from revox.metrics.speaker import SpeakerVerifier
from revox.speech.audio import Audio

PROBES = list(itertools.islice(sentences("train", 77), 3))
MOST_ERRORS = 0.05
_tools: list = []


def _begin() -> None:
    _tools.extend((PocketsphinxRecognizer(jsgf(), reject=False), SpeakerVerifier()))


def probe(speaker: SyntheticSpeaker) -> tuple[float, np.ndarray]:
    """Word error rate of the probes and the speaker's embedding [256]."""
    recognizer, verifier = _tools
    spoken = [synthesize(speaker, text).samples for text in PROBES]
    transcripts = [recognizer.transcribe(Audio(samples, 24000)) for samples in spoken]
    return word_error_rate(PROBES, transcripts), verifier.embed(Audio(np.concatenate(spoken), 24000))


def main(out: Path, count: int = 440, seed: int = 3) -> None:
    """Draw, probe, split and cast; one speaker a line in `out`."""
    drawn = draw_speakers(count, seed)
    with Pool(2, _begin) as pool:
        probes = []
        for i, one in enumerate(pool.imap(probe, drawn)):
            probes.append(one)
            if i % 50 == 49:
                print(f"{i + 1} of {count}", flush=True)
    intelligible = [i for i, (errors, _) in enumerate(probes) if errors <= MOST_ERRORS]
    errors = np.median([one for one, _ in probes])
    print(f"{len(intelligible)} of {count} are intelligible; median errors {errors:.3f}")
    embeddings = {drawn[i].name: probes[i][1] for i in intelligible}
    pool_ = [drawn[i] for i in intelligible]
    split = split_speakers(pool_, np.stack([embeddings[s.name] for s in pool_]), seed)
    cast = cast_presets(split, np.stack([embeddings[s.name] for s in split]), seed)
    out.write_text(to_json(cast))
    held = np.stack([embeddings[s.name] for s in cast if s.split == "heldout"])
    likeness = held @ held.T - 2 * np.eye(len(held))
    print(f"{len(cast)} speakers; held out, likest other: {np.sort(likeness.max(axis=1)).round(2)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    main(parser.parse_args().out)
