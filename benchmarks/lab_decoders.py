"""Which decoder of a lab build says words best? States of its run, side by side, on validation sentences.

    python benchmarks/lab_decoders.py --data RUN/data last=RUN/decoder/decoder-state.pt \
        average=RUN/decoder/decoder-state.pt@averaged

Codes are those of the encoder put aside; "ships" is the checkpoint's own decoder. The held-out sentences are
`lab_quality.py`'s, and never chosen by.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from lab.codec_training import HALVES
from lab.data import RATE, SpeechSet
from lab.sentences import jsgf
from lab_quality import lab_arguments, preset_sentences
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.losses.spectral import mel_distance
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_error_rate
from revox.speech import Audio


def decoder_of(state: str) -> dict[str, torch.Tensor]:
    """The decoder's tensors of a run's state, in bf16's values: its last weights, or with `@averaged` their
    average."""
    path, _, part = state.partition("@")
    kept = torch.load(path, map_location="cpu", weights_only=True)[part or "codec"]
    named = {k.removeprefix("module."): v for k, v in kept.items()}
    return {k: v.bfloat16().float() for k, v in named.items() if k.startswith(HALVES["decoder"])}


def main() -> None:
    parser = lab_arguments(__doc__)
    parser.add_argument("states", nargs="*", metavar="LABEL=STATE[@averaged]")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    codec = original_codec(asked.checkpoint or checkpoint_folder(), asked.encoder)
    speech = SpeechSet(asked.data, "validation", "synthetic")
    chosen = preset_sentences(speech, asked.sentences)
    waves = [speech.waveform(i) for i in chosen]
    texts = [speech.utterances[i].text for i in chosen]
    recognizer = PocketsphinxRecognizer(jsgf())
    source = [recognizer.transcribe(Audio(wave, RATE)) for wave in waves]
    rows = {"source speech": {"words_wrong": round(word_error_rate(texts, source), 4)}}
    with torch.no_grad():
        codes = [codec.encode(torch.from_numpy(wave)[None]) for wave in waves]
        for label, state in [("ships", ""), *(one.split("=", 1) for one in asked.states)]:
            if state:
                codec.load_state_dict(decoder_of(state), strict=False)
            decoded = [codec.decode(one)[0] for one in codes]
            heard = [recognizer.transcribe(Audio(one.numpy(), RATE)) for one in decoded]
            mel = [
                float(mel_distance(one[None, : len(wave)], torch.from_numpy(wave)[None], RATE))
                for one, wave in zip(decoded, waves, strict=True)
            ]
            rows[label] = {
                "words_wrong": round(word_error_rate(texts, heard), 4),
                "mel": round(float(np.median(mel)), 4),
            }
            print(label, rows[label], flush=True)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
