"""Where does the lab's language model lose words: in its semantic codes, its acoustic codes, or its own past?

    python benchmarks/lab_words.py speak --checkpoint OUT --encoder OUT-encoder/encoder.safetensors \
        --data RUN/data --out WORDS
    PYTHONPATH=src:. JUDGES/bin/python benchmarks/lab_words.py judge WORDS --models runs/models

Validation speakers, whose recordings give the true codes, say sentences of theirs from a reference of others;
parts of the true codes are put in the place of the model's own: in what is played, and in what it reads of
its past. The differences between the rows say what costs words. See `lab_quality.py` for the two parts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# What is played: true semantic, true acoustic; what is read of the past: true semantic, true acoustic.
ROWS = {
    "codec": (True, True, True, True),
    "own semantic codes, true past": (False, True, True, True),
    "own acoustic codes, true past": (True, False, True, True),
    "both its own, true past": (False, False, True, True),
    "own acoustic codes and past, true semantic": (True, False, True, False),
    "all its own": (False, False, False, False),
}


def speak(asked: argparse.Namespace) -> None:
    """Writes every sentence in every row, and index.json."""
    import numpy as np
    import torch

    from lab.data import RATE, SpeechSet
    from lab.quality.lists import read_lists
    from revox import load
    from revox.evaluation.reference_encoder import original_codec
    from revox.model.backbone import KVCache
    from revox.model.config import N_SPECIAL_CODES
    from revox.speech import Audio, write_audio
    from revox.synthesis.engine import DEFAULT_CFG, noise_of

    torch.set_num_threads(1)
    codec = original_codec(asked.checkpoint, asked.encoder)
    tts = load(asked.checkpoint, device="cpu", dtype=torch.float32)
    model = tts.model
    speech = SpeechSet(asked.data, "validation", "synthetic")
    voices = read_lists()["validation"]["voices"]["synthetic"]

    def codes_of(samples: np.ndarray) -> torch.Tensor:
        return codec.encode(torch.from_numpy(samples)[None])[0]

    @torch.no_grad()
    def say(text: str, truth: torch.Tensor, voice: torch.Tensor, parts: tuple, cfg: float) -> np.ndarray:
        tokens = torch.tensor(tts.prompter.tokens(text, len(voice)))
        prompt = model.embed_prompt(tokens, tts.prompter.audio_token, voice)
        frames = truth.shape[1]
        cache = KVCache.empty(model.config.backbone, 1, len(prompt) + frames + 2, model.dtype, model.device)
        hidden = model.prefill([prompt], cache)
        noise, played = noise_of(0, model.config.codec.acoustic_dim), []
        for n in range(frames):
            own, true = model.acoustic_transformer.frame(hidden, noise[n][None], cfg), truth[:, n][None]
            # The length is the true one: where the model would end, the true code stands in.
            own = torch.where(own[:, :1] < N_SPECIAL_CODES, true, own)
            semantic, acoustic, semantic_read, acoustic_read = (true if part else own for part in parts)
            played.append(torch.cat((semantic[:, :1], acoustic[:, 1:]), dim=1)[0])
            hidden = model.feed_frames(torch.cat((semantic_read[:, :1], acoustic_read[:, 1:]), dim=1), cache)
        codes = torch.stack(played, dim=1) - N_SPECIAL_CODES
        return codec.decode(codes[None])[0].numpy()

    index: dict[str, list[tuple[str, str]]] = {}
    for voice in voices[: asked.voices]:
        mine = speech.of(voice["speaker"])
        stream = np.concatenate([speech.waveform(mine[i]) for i in voice["utterances"]])
        others = [mine[i] for i in range(len(mine)) if i not in voice["utterances"]][: asked.sentences]
        with torch.no_grad():
            reference = codes_of(stream[: round(voice["reference"] * RATE)])
            embedding = model.mm_audio_embeddings.voice_embedding(reference).to(model.dtype)
            truths = [codes_of(speech.waveform(i)) + N_SPECIAL_CODES for i in others]
        for cfg in asked.cfg or [DEFAULT_CFG, 2 * DEFAULT_CFG]:
            for number, (row, parts) in enumerate(ROWS.items()):
                for i, truth in zip(others, truths, strict=True):
                    text = str(speech.utterances[i].text)
                    file = asked.out / f"{number}-{cfg:g}" / f"{i}.wav"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_audio(file, Audio(say(text, truth, embedding, parts, cfg), RATE))
                    index.setdefault(f"{row}, cfg {cfg:g}", []).append(
                        (str(file.relative_to(asked.out)), text)
                    )
        print(voice["speaker"], flush=True)
        (asked.out / "index.json").write_text(json.dumps(index, indent=1))


def judge(asked: argparse.Namespace) -> None:
    """Prints words wrong of every row and writes words.json."""
    from lab.quality.measures import RATE, Models
    from lab.quality.tables import RECOGNIZERS
    from lab.quality.words import words_wrong
    from revox.speech import read_audio

    models = Models({name: asked.models / f"whisper-{name}-ct2" for name in RECOGNIZERS})
    found: dict[str, dict[str, float]] = {}
    for row, pairs in json.loads((asked.out / "index.json").read_text()).items():
        audios = [read_audio(asked.out / file, rate=RATE) for file, _ in pairs]
        texts = [text for _, text in pairs]
        found[row] = {
            name: round(words_wrong(texts, [models.score(f"words {name}", audio) for audio in audios]), 4)
            for name in RECOGNIZERS
        }
        print(row, found[row], flush=True)
    (asked.out / "words.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    speaking = parts.add_parser("speak")
    for name in ("checkpoint", "encoder", "data", "out"):
        speaking.add_argument(f"--{name}", type=Path, required=True)
    speaking.add_argument("--voices", type=int, default=20)
    speaking.add_argument("--sentences", type=int, default=3, help="of each voice")
    speaking.add_argument("--cfg", type=float, nargs="+")
    judging = parts.add_parser("judge")
    judging.add_argument("out", type=Path)
    judging.add_argument("--models", type=Path, default=Path("runs/models"))
    asked = parser.parse_args()
    {"speak": speak, "judge": judge}[asked.part](asked)


if __name__ == "__main__":
    main()
