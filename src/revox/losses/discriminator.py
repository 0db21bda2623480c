"""Light STFT discriminators and the losses that go with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from revox.losses.stft import power


class StftDiscriminator(nn.Module):
    """2-D convolutions over one complex STFT, after EnCodec's MS-STFT discriminator (arXiv 2210.13438), but
    small.

    Takes a complex spectrogram `[batch, bins, frames]`, gives its score map and the feature maps of its
    layers.
    """

    def __init__(self, channels: int, n_layers: int = 4) -> None:
        super().__init__()
        convs: list[nn.Module] = [weight_norm(nn.Conv2d(2, channels, (9, 3), (2, 1), (4, 1)))]
        width = channels
        for i in range(n_layers - 1):
            wider = min(2 * width, 4 * channels)
            dilation = 2**i
            convs.append(
                weight_norm(nn.Conv2d(width, wider, (7, 3), (2, 1), (3, dilation), dilation=(1, dilation)))
            )
            width = wider
        self.convs = nn.ModuleList(convs)
        self.score = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)))

    def forward(self, spectrum: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Score `[batch, 1, bins', frames]` and features of `spectrum` (complex)."""
        # Magnitudes are compressed and phases stay: harmonics 40 dB down still count.
        magnitudes = (power(spectrum) + 1e-9).sqrt()
        x = torch.view_as_real(spectrum) * (magnitudes ** (0.4 - 1.0))[..., None]
        x = x.permute(0, 3, 1, 2)
        features = []
        for conv in self.convs:
            x = functional.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.score(x).float(), features


class Discriminators(nn.Module):
    """One `StftDiscriminator` for each resolution it is given spectra of."""

    def __init__(self, n_resolutions: int, channels: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList([StftDiscriminator(channels) for _ in range(n_resolutions)])

    def forward(
        self, spectra: list[Tensor], which: Sequence[int] | None = None
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """Score and features for each resolution, or for the resolutions `which`, whose spectra are given."""
        nets = self.nets if which is None else [self.nets[i] for i in which]
        return [net(s) for net, s in zip(nets, spectra, strict=True)]


Outputs = list[tuple[Tensor, list[Tensor]]]
"""Score map and feature maps, for each resolution."""


def discriminator_loss(real: Outputs, fake: Outputs) -> Tensor:
    """Hinge loss of the discriminators, mean over resolutions."""
    losses = [
        functional.relu(1 - r).mean() + functional.relu(1 + f).mean()
        for (r, _), (f, _) in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(fake: Outputs) -> Tensor:
    """Hinge loss of the generator: -E[D(fake)], mean over resolutions."""
    return torch.stack([-score.mean() for score, _ in fake]).mean()


def feature_matching_loss(real: Outputs, fake: Outputs) -> Tensor:
    """L1 between feature maps relative to the real ones' mean size (EnCodec, eq. 2), mean over clips, layers
    and resolutions."""
    losses = []
    for (_, real_maps), (_, fake_maps) in zip(real, fake, strict=True):
        for r, f in zip(real_maps, fake_maps, strict=True):
            r, within = r.detach(), tuple(range(1, r.dim()))
            error, size = ((x.abs().mean(within, dtype=torch.float32)) for x in (r - f, r))
            losses.append((error / size.clamp_min(1e-2)).mean())
    return torch.stack(losses).mean()
