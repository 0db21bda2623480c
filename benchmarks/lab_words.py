"""Where does the lab's language model lose words: in its semantic codes, its acoustic codes, or its own past?

    python benchmarks/lab_words.py --data RUN/data --encoder lab/reference-encoder/encoder.safetensors

Held-out sentences of the presets, whose true codes are known, are spoken with parts of the true codes put
in the place of the model's own: in what is heard, and in what it reads of its past. The differences between
the rows say what costs words.
"""

from __future__ import annotations

import datetime
import json
import platform

import torch

from lab.data import RATE, SpeechSet
from lab.sentences import jsgf
from lab_quality import lab_arguments, preset_sentences
from revox import load
from revox.checkpoint.voices import load_voice
from revox.demo import checkpoint_folder
from revox.evaluation.reference_encoder import original_codec
from revox.metrics.intelligibility import PocketsphinxRecognizer, word_error_rate
from revox.model.backbone import KVCache
from revox.model.config import N_SPECIAL_CODES
from revox.speech import Audio
from revox.synthesis.engine import DEFAULT_CFG, noise_of

# What is heard: true semantic, true acoustic; what is read of the past: true semantic, true acoustic.
ROWS = {
    "codec": (True, True, True, True),
    "own semantic codes, true past": (False, True, True, True),
    "own acoustic codes, true past": (True, False, True, True),
    "both its own, true past": (False, False, True, True),
    "own acoustic codes and past, true semantic": (True, False, True, False),
    "all its own": (False, False, False, False),
}


def main() -> None:
    parser = lab_arguments(__doc__)
    parser.add_argument("--cfg", type=float, nargs="+", default=[DEFAULT_CFG, 2 * DEFAULT_CFG])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.checkpoint or checkpoint_folder()
    codec, tts = original_codec(folder, arguments.encoder), load(folder, device="cpu", dtype=torch.float32)
    model, recognizer = tts.model, PocketsphinxRecognizer(jsgf())
    held = SpeechSet(arguments.data, "heldout", "synthetic")
    chosen = preset_sentences(held, arguments.sentences)
    texts = [held.utterances[i].text for i in chosen]

    @torch.no_grad()
    def hear(which: int, parts: tuple[bool, bool, bool, bool], cfg: float) -> str:
        utterance = held.utterances[which]
        truth = codec.encode(torch.from_numpy(held.waveform(which))[None])[0] + N_SPECIAL_CODES
        rows = load_voice(folder, utterance.preset).embedding.to(model.dtype)
        tokens = torch.tensor(tts.prompter.tokens(utterance.text, len(rows)))
        prompt = model.embed_prompt(tokens, tts.prompter.audio_token, rows)
        frames = truth.shape[1]
        cache = KVCache.empty(model.config.backbone, 1, len(prompt) + frames + 2, model.dtype, model.device)
        hidden = model.prefill([prompt], cache)
        noise, heard = noise_of(0, model.config.codec.acoustic_dim), []
        for n in range(frames):
            own, true = model.acoustic_transformer.frame(hidden, noise[n][None], cfg), truth[:, n][None]
            # The length is the true one: where the model would end, the true code stands in.
            own = torch.where(own[:, :1] < N_SPECIAL_CODES, true, own)
            semantic_said, acoustic_said, semantic_read, acoustic_read = (true if p else own for p in parts)
            heard.append(torch.cat((semantic_said[:, :1], acoustic_said[:, 1:]), dim=1)[0])
            hidden = model.feed_frames(torch.cat((semantic_read[:, :1], acoustic_read[:, 1:]), dim=1), cache)
        codes = torch.stack(heard, dim=1) - N_SPECIAL_CODES
        return recognizer.transcribe(Audio(codec.decode(codes[None])[0].numpy(), RATE))

    report: dict = {
        "date": datetime.date.today().isoformat(), "machine": f"{platform.machine()} CPU",
        "sentences": len(texts), "word_errors": {},
    }  # fmt: skip
    for cfg in arguments.cfg:
        for name, parts in ROWS.items():
            if parts == ROWS["codec"] and cfg != arguments.cfg[0]:
                continue
            found = word_error_rate(texts, [hear(i, parts, cfg) for i in chosen])
            report["word_errors"][f"{name}, cfg {cfg:g}"] = found
            print(f"{name}, cfg {cfg:g}: {100 * found:.1f} %", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{report['date']}-lab-words.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
