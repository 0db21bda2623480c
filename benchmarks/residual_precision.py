"""What bf16 residuals cost: the encoder as it is trained, and as it is served.

    python benchmarks/residual_precision.py [--seconds 8] [--out benchmarks/results]

Training keeps weights and residual stream in float32 and computes matrix products in bf16 (autocast); serving
also has weights and residuals in bf16, and the quantizer. The lab's reference encoder finds the codes of the
demonstration's recordings in each of these ways. A row compares them with float32's: the share of equal
semantic codes, the mean distance of acoustic codes in levels of 20, and the distance of the latents relative
to their size.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from revox.demo import checkpoint_folder
from revox.demo.demo import EXAMPLES
from revox.evaluation.reference_encoder import original_codec
from revox.model.codec import Codec
from revox.speech import normalize_loudness, read_audio


def codes_of(codec: Codec, latents: Tensor) -> Tensor:
    """Codes `[37, frames]` of latents `[1, 292, frames]`, by the codec's own quantizer, in its type."""
    quantizer = codec.quantizer
    return quantizer.encode(latents.to(quantizer.semantic_codebook.embedding.dtype))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("lab/reference-encoder/encoder.safetensors"))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    plain = original_codec(checkpoint_folder(), asked.encoder)
    served = copy.deepcopy(plain).to(torch.bfloat16)

    def under_autocast(codec: Codec, wave: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return codec.encode_latents(wave)

    ways: dict[str, tuple[Callable[[Tensor], Tensor], Codec]] = {
        "bf16 products, float32 residuals and weights (training)": (
            lambda wave: under_autocast(plain, wave), plain,
        ),
        "bf16 residuals and weights, float32 quantizer": (
            lambda wave: under_autocast(served, wave.bfloat16()), plain,
        ),
        "bf16 throughout (serving)": (lambda wave: under_autocast(served, wave.bfloat16()), served),
    }  # fmt: skip
    waves = []
    for path in sorted(EXAMPLES.glob("*.flac")):
        rate = plain.config.sampling_rate
        samples = normalize_loudness(read_audio(path).at(rate).samples[: round(asked.seconds * rate)], rate)
        frame = plain.samples_per_frame
        waves.append(torch.from_numpy(samples[: len(samples) // frame * frame].copy())[None])
    rows = []
    with torch.no_grad():
        exact = [plain.encode_latents(wave) for wave in waves]
        right = torch.cat([codes_of(plain, z) for z in exact], dim=1)
        for name, (encode, quantizing) in ways.items():
            latents = [encode(wave) for wave in waves]
            found = torch.cat([codes_of(quantizing, z) for z in latents], dim=1)
            error = torch.cat([(a.float() - b).flatten() for a, b in zip(latents, exact, strict=True)])
            size = torch.cat([b.flatten() for b in exact])
            rows.append(
                {
                    "way": name,
                    "same_semantic_code": round(float((found[0] == right[0]).float().mean()), 4),
                    "level_error": round(float((found[1:] - right[1:]).abs().float().mean()), 4),
                    "latent_error": round(float(error.norm() / size.norm()), 5),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    date = datetime.now(timezone.utc).date().isoformat()
    path = asked.out / f"{date}-residual-precision.json"
    report = {"date": date, "device": "cpu", "clips": len(waves), "frames": right.shape[1], "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
