"""Initial weights of a codec."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from revox.losses.stft import hz_to_mel, mel_to_hz
from revox.model.codec import Codec, CodecTransformer
from revox.model.layers import CausalConv1d, CausalConvTranspose1d


def oscillators(channels: int, patch: int, kernel: int, rate: int, top: float = 8000.0) -> np.ndarray:
    """Windowed cosines and sines `[channels, kernel * patch]`, with frequencies evenly spaced in mel.

    From 40 Hz to `top` Hz, at `rate` Hz. The length of a window follows from the spacing of the frequencies
    (a Gabor frame); each row has unit norm.
    """
    pairs = channels // 2
    mels = np.linspace(hz_to_mel(40.0, htk=True), hz_to_mel(top, htk=True), pairs)
    hertz = mel_to_hz(mels, htk=True)
    spacing = np.gradient(hertz)
    span = kernel * patch
    atoms = np.zeros((channels, span))
    for i, (center, step) in enumerate(zip(hertz, spacing, strict=True)):
        length = int(np.clip(2 * rate / step, 1.5 * patch, span))
        window = np.hanning(length + 2)[1:-1]
        time = (np.arange(length) - length / 2) / rate
        for j, wave in enumerate((np.cos, np.sin)):
            atom = window * wave(2 * np.pi * center * time)
            atoms[2 * i + j, :length] = atom / np.linalg.norm(atom)
    return atoms


@torch.no_grad()
def transpose_decoder(codec: Codec) -> None:
    """Set the encoder's weights to the decoder's transposed, layer by layer in reverse.

    Transformers are copied, of different depths the last layers that both have. Convolutions become their
    adjoints, delayed until they are causal: where the decoder has kernel w `[out, in, taps]`, the encoder
    gets w `[in, out, taps]` with the taps reversed; a transposed convolution's taps stay in order. A public
    port of the model encodes with these weights as they are.
    """
    decoder = [block for block in codec.decoder_blocks if isinstance(block, CodecTransformer)]
    encoder = [block for block in codec.encoder_blocks if isinstance(block, CodecTransformer)]
    for learned, given in zip(encoder, reversed(decoder), strict=True):
        layers, others = list(learned.layers.values()), list(given.layers.values())
        for one, other in zip(reversed(layers), reversed(others), strict=False):
            one.load_state_dict(other.state_dict())
    kinds = (CausalConv1d, CausalConvTranspose1d)
    back = [codec.output_proj, *(one for one in reversed(codec.decoder_blocks) if isinstance(one, kinds))]
    own = [codec.input_proj, *(one for one in codec.encoder_blocks if isinstance(one, CausalConv1d))]
    for one, other in zip(own, back, strict=True):
        weight = other.conv.weight
        if isinstance(other, CausalConv1d):
            weight = weight.transpose(0, 1).flip(2)
        one.conv.weight = weight  # a transposed one has its weight as [in, out, taps] already


@torch.no_grad()
def scale_latents(codec: Codec, codes: Tensor, audio: Tensor) -> None:
    """Scale the encoder's last convolution so that its latents of `audio` `[batch, samples]` vary as those of
    the right `codes` `[batch, 37, frames]` do, channel by channel."""
    found = codec.encode_latents(audio).float().std(dim=(0, 2)).clamp_min(1e-5)
    rows = codec.quantizer.semantic_codebook.embedding[codes[:, 0].flatten()].float()
    values = codec.quantizer.acoustic_codebook.decode(codes[:, 1:]).float()
    # The first and last level stand for everything beyond them.
    acoustic = torch.atanh(values.clamp(-0.95, 0.95)).std(dim=(0, 2))
    wanted = torch.cat((rows.std(dim=0), acoustic.clamp_min(0.05)))
    last = codec.encoder_blocks[-1]
    assert isinstance(last, CausalConv1d)
    last.conv.weight = last.conv.weight * (wanted / found)[:, None, None]


def initialize(codec: Codec, seed: int, speech_level: float = 0.07) -> None:
    """Set weights with which activations start near unit size in every layer, and the codec's two ends start
    as a bank of oscillators instead of noise.

    The norms' eps is 0.01: activations far below 0.1 would pass them almost unscaled, every layer would stay
    near zero, and only the convolutions would act. `speech_level` is the waveform's RMS (full scale 1).
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=rng) * std

    config = codec.config
    patch, kernel = config.pretransform_patch_size, config.patch_proj_kernel_size
    atoms = torch.from_numpy(oscillators(config.dim, patch, kernel, config.sampling_rate)).float()
    with torch.no_grad():
        for parameter in codec.parameters():
            if parameter.dim() == 2:
                parameter.copy_(normal(parameter.shape, parameter.shape[1] ** -0.5))
        for name, module in codec.named_modules():
            if not isinstance(module, (CausalConv1d, CausalConvTranspose1d)):
                continue
            weight = module.conv.weight
            if name == "output_proj":
                # The atom of channel i begins at its own patch and extends into the next ones.
                spread = atoms.unflatten(1, (kernel, patch)).flip(1)  # channels, taps back, samples
                module.conv.weight = spread.permute(2, 0, 1) * speech_level
                continue
            if name == "input_proj":
                # The atom ends with the newest sample.
                ended = atoms.flip(1).unflatten(1, (kernel, patch))
                module.conv.weight = ended.permute(0, 2, 1) / speech_level * 0.5
                continue
            inputs, taps, stride = (
                module.conv.in_channels,
                module.conv.kernel_size[0],
                module.conv.stride[0],
            )
            transposed = isinstance(module, CausalConvTranspose1d)
            std = (inputs * taps / (stride if transposed else 1)) ** -0.5
            std *= 2.0 if name == "decoder_blocks.0" else 1.0
            module.conv.weight = normal(weight.shape, std)


@torch.no_grad()
def even_input(codec: Codec, speech: Tensor, size: float = 0.8) -> None:
    """Scale the input's oscillators: each pair answers `speech` `[batch, samples]` with the RMS `size`.

    Speech at 6 kHz is 30 dB under speech at 500 Hz. The first norm divides all channels by one number, so the
    high ones would stay too small for the first layer to see.
    """
    patch = codec.config.pretransform_patch_size
    answers = codec.input_proj(speech.unflatten(-1, (-1, patch)).transpose(1, 2))
    pairs = answers.unflatten(1, (-1, 2)).square().sum(2).mean((0, 2)).sqrt()
    scale = (size / pairs.clamp_min(1e-6)).repeat_interleave(2)
    codec.input_proj.conv.weight = codec.input_proj.conv.weight * scale[:, None, None]
