"""The speaker's voice as a loss: 1 - cosine of a frozen network's embeddings of reconstruction and original.

The network is an ECAPA-TDNN (`revox.training.ecapa`): as SpeechBrain publishes it (`embedding_model.ckpt`),
or a small one that the project trained itself (`revox.training.verifier`).

The network that scores a result may not be in the loss it was trained with: Resemblyzer's, which scores
speaker similarity in every table of this project, is refused under any name.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from revox.training.ecapa import EcapaTdnn
from revox.training.errors import TrainingError
from revox.training.resampling import Resampler

_PUBLISHED = "embedding_model.ckpt"  # SpeechBrain's name of the weights
_SHORTEST = 0.1  # seconds; shorter clips are extended with silence, so that every network's windows fit


class SpeakerLoss(nn.Module):
    """1 - cosine of two voices, differentiable to the waveform; the network stays frozen, in eval mode.

    Computed in float32 also under autocast. Nothing of it is trained: keep it out of a run's state.
    """

    def __init__(self, network: nn.Module, rate: int = 24000) -> None:
        """`network(waveforms, lengths)` gives `[batch, dim]` at its own `network.rate`; clips are at `rate`.

        Both in Hz. Raises TrainingError when the network is Resemblyzer's.
        """
        super().__init__()
        refuse_resemblyzer(network.state_dict())
        self.network = network.eval().requires_grad_(False)
        network_rate: Any = network.rate
        self.resampler = Resampler(rate, int(network_rate))
        self._shortest = round(_SHORTEST * network_rate)

    @classmethod
    def load(cls, source: str, rate: int = 24000, device: str = "cpu") -> SpeakerLoss:
        """With the network of a file, a folder or a hub id; a file or folder is never looked up elsewhere.

        Pickled files are read as plain tensors only. Raises TrainingError when there is no such network,
        or when it is Resemblyzer's.
        """
        if re.search(r"resemblyzer|(?<![a-z0-9])ge2e(?![a-z0-9])", source, re.I):
            raise TrainingError(_REFUSED.format(source))
        return cls(_network(source), rate).to(torch.device(device))

    def train(self, mode: bool = True) -> SpeakerLoss:
        """Stays in eval mode whatever its owner does: batch statistics would mix the clips."""
        return super().train(False)

    def similarity(self, reconstruction: Tensor, original: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Cosine `[batch]` of the voices in two `[batch, samples]`; the gradient goes to the first only.

        `lengths` `[batch]`, in samples, marks where each clip ends; its value is the one it has alone.
        """
        with torch.autocast(reconstruction.device.type, enabled=False):
            with torch.no_grad():
                target = self._embed(original, lengths)
            return F.cosine_similarity(self._embed(reconstruction, lengths), target, dim=-1)

    def forward(self, reconstruction: Tensor, original: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean over clips of 1 - `similarity`: a scalar."""
        return (1 - self.similarity(reconstruction, original, lengths)).mean()

    def _embed(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        batch, samples = waveforms.shape
        if lengths is None:
            lengths = torch.full((batch,), samples)
        lengths = lengths.to(waveforms.device)
        resampled = self.resampler(_silent_beyond(waveforms.float(), lengths))
        own = -(-lengths * self.resampler.up // self.resampler.down)
        # The resampler rings beyond a clip's end, which a clip alone does not have.
        resampled = _silent_beyond(resampled, own)
        resampled = F.pad(resampled, (0, max(0, self._shortest - resampled.shape[1])))
        return self.network(resampled, own.clamp(min=self._shortest))


def _silent_beyond(waveforms: Tensor, lengths: Tensor) -> Tensor:
    place = torch.arange(waveforms.shape[1], device=waveforms.device)
    return waveforms.masked_fill(place >= lengths[:, None], 0.0)


def refuse_resemblyzer(state: Mapping[str, Any]) -> None:
    """Raises TrainingError when tensors (name -> tensor, nested or not) are those of Resemblyzer's encoder.

    It is a GE2E network (arXiv 1710.10467): an LSTM of 3 layers of 256 and a linear layer of 256.
    """
    tensors = _flat(state)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layers = {
        found.group(1)
        for name, shape in shapes.items()
        if (found := re.search(r"weight_hh_l(\d+)$", name)) and shape == (1024, 256)
    }
    linear = any(shape == (256, 256) and name.endswith(".weight") for name, shape in shapes.items())
    if layers == {"0", "1", "2"} and linear:
        raise TrainingError(_REFUSED.format("This network (3 LSTM layers of 256, linear 256)"))


_REFUSED = (
    "{} is Resemblyzer's, which scores similarity and may not be in a loss; name another, such as "
    "speechbrain/spkrec-ecapa-voxceleb or a verifier of your own."
)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
    return found


def _network(source: str) -> nn.Module:
    path = Path(source)
    if path.is_file():
        return _from_file(path)
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise TrainingError(
            f"{source} is not a file, a folder or a hub id (owner/name): name one of a speaker network."
        )
    weights = path / _PUBLISHED if path.is_dir() else _from_hub(source)
    if not weights.is_file():
        raise TrainingError(f"{source} does not hold a speaker network: it needs SpeechBrain's {_PUBLISHED}.")
    return _from_file(weights)


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, _PUBLISHED))
    except Exception as error:  # the hub library's http errors are of another package in each of its versions
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise TrainingError(
            f"{source} is not here and could not be fetched from the hub ({why}); check the id and the "
            "connection, or name a folder."
        ) from None


def _from_file(path: Path) -> nn.Module:
    """SpeechBrain's ECAPA, or a verifier of ours, which is one of another size."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            state = _flat(loaded) if isinstance(loaded, Mapping) else {}
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError):
        raise TrainingError(
            f"{path} is not a file of plain tensors (safetensors, or a state dict of torch.save): it is cut "
            "short, or holds objects that are not read for safety; name another file."
        ) from None
    refuse_resemblyzer(state)
    try:
        return EcapaTdnn.from_state(state)
    except (KeyError, IndexError, RuntimeError, ZeroDivisionError, ValueError):
        raise TrainingError(
            f"{path} does not hold a known speaker network: name SpeechBrain's ECAPA-TDNN "
            "(embedding_model.ckpt) or a verifier made by train_verifier."
        ) from None
