"""Changes of a frozen model that can be scaled, switched off and merged: of its matrices, or of voices.

Each chosen weight W is read as W + s D: D is a full matrix, or of low rank (LoRA, arXiv 2106.09685: D = B A,
with A random and B zero at first). W itself never changes, so s = 0 is the untouched model. The part "map"
changes no matrix: D maps the voice embeddings that the model reads (`revox.checkpoint.voice_map`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from revox.checkpoint.adapter import Adapter
from revox.checkpoint.voice_map import map_embedding
from revox.metrics.voice_embeddings import table_deviation
from revox.model.voxtral import Voxtral, tensor_name

Part = Literal["map", "lora", "attention", "embeddings", "layers"]
PARTS: tuple[Part, ...] = ("map", "lora", "attention", "embeddings", "layers")
_MAP = "voice_map"


class Delta(nn.Module):
    """W + s D for one weight `[rows, columns]`; D has full rank if `rank` is 0. Learned in float32."""

    def __init__(self, weight: Tensor, rank: int, scale: list[float], rng: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = scale
        if rank:
            down = torch.randn((rank, columns), generator=rng) * columns**-0.5
            factors = [torch.zeros(rows, rank), down]
        else:
            factors = [torch.zeros(rows, columns)]
        self.factors = nn.ParameterList(nn.Parameter(factor.to(weight.device)) for factor in factors)

    def change(self) -> Tensor:
        """D `[rows, columns]`, float32."""
        first, *second = self.factors
        return first @ second[0] if second else first

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the model computes with."""
        scale = self.scale[0]
        return weight if scale == 0 else weight + (scale * self.change()).to(weight.dtype)


@dataclass(frozen=True)
class Deltas:
    """The changes of a model by the release's names of their tensors; all share one scale.

    `deviation` `[dim]` is the unit of a map of voice embeddings, None for changes of matrices.
    """

    modules: dict[str, Delta]
    scale: list[float]
    deviation: Tensor | None = None

    @classmethod
    def on(cls, model: Voxtral, part: Part, rank: int, seed: int = 0) -> Deltas:
        """Changes of `part` of `model`, all zero.

        "lora": the acoustic transformer's layers and two backbone layers, a third and two thirds of the way
        up. "attention": wq, wk, wv and wo of every backbone layer. Both are of rank `rank`. "embeddings": the
        table of audio codes; "layers": the first and the last backbone layer; of full rank. "map": a map of
        voice embeddings of rank `rank`, in standard deviations of the table's sums.
        """
        if part == "map":
            deviation = table_deviation(model).clamp_min(1e-8)
            square, scale = deviation.expand(len(deviation), -1), [1.0]
            delta = Delta(square, rank, scale, torch.Generator().manual_seed(seed))
            return cls({_MAP: delta}, scale, deviation)
        chosen = _weights_of(part, len(model.backbone.layers))
        low_rank = part in ("lora", "attention")
        rng, scale = torch.Generator().manual_seed(seed), [1.0]
        modules: dict[str, Delta] = {}
        for name, module in list(model.named_modules()):
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2 or not chosen.fullmatch(name):
                continue
            delta = Delta(weight, rank if low_rank else 0, scale, rng)
            parametrize.register_parametrization(module, "weight", delta)
            modules[tensor_name(f"{name}.weight")] = delta
        return cls(modules, scale)

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within: the model computes with the changes at `scale`; 0 is the untouched model."""
        before, self.scale[0] = self.scale[0], scale
        try:
            yield
        finally:
            self.scale[0] = before

    def parameters(self) -> list[nn.Parameter]:
        """What is learned."""
        return [p for delta in self.modules.values() for p in delta.parameters()]

    def state(self) -> dict[str, Tensor]:
        """The factors, by tensor and number."""
        return {
            f"{name}/{i}": factor.detach()
            for name, delta in self.modules.items()
            for i, factor in enumerate(delta.factors)
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        for name, delta in self.modules.items():
            for i, factor in enumerate(delta.factors):
                factor.copy_(state[f"{name}/{i}"])

    def remove(self, model: Voxtral) -> None:
        """Take the changes off `model`, which is then as it was."""
        for _, module in self._changed(model):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight.requires_grad_(False)

    def _changed(self, model: Voxtral) -> list[tuple[str, nn.Module]]:
        """The modules that are changed, by the release's names of their weights."""
        found = [(tensor_name(f"{name}.weight"), module) for name, module in model.named_modules()]
        return [(n, m) for n, m in found if n in self.modules and parametrize.is_parametrized(m, "weight")]

    @torch.no_grad()
    def merged(self, model: Voxtral, scale: float) -> dict[str, Tensor]:
        """The changed tensors at `scale`, summed in float32, in bf16, by the release's names."""
        found = {}
        for name, module in self._changed(model):
            weight = cast(Any, module).parametrizations.weight.original.float()
            found[name] = (weight + scale * self.modules[name].change()).to("cpu", torch.bfloat16)
        return found

    def voice_map(self, scale: float) -> tuple[Tensor, Tensor] | None:
        """`up` `[dim, rank]` and `down` `[rank, dim]` of the map at `scale`; None where matrices change."""
        if self.deviation is None:
            return None
        up, down = self.modules[_MAP].factors
        return scale * self.deviation[:, None] * up, down / self.deviation

    def mapped(self, embedding: Tensor) -> Tensor:
        """A voice embedding `[N, dim]` as it is read at the present scale: mapped and rounded to bf16, as it
        is stored, with the gradient of what was not rounded."""
        factors = self.voice_map(self.scale[0])
        if factors is None or self.scale[0] == 0:
            return embedding
        exact = map_embedding(embedding, *factors)
        return exact + (exact.to(torch.bfloat16).float() - exact).detach()

    def adapter(self, scale: float) -> Adapter | None:
        """The factors of matrices at `scale`; None for changes of full rank and for a map."""
        factors = {
            name: (delta.factors[0].detach().cpu().clone(), delta.factors[1].detach().cpu().clone())
            for name, delta in self.modules.items()
            if len(delta.factors) == 2 and self.deviation is None
        }
        return Adapter(scale, factors) if factors else None


def _weights_of(part: Part, layers: int) -> re.Pattern[str]:
    """The modules of a part that changes matrices, by their names in `Voxtral`."""
    two = f"{layers // 3}|{2 * layers // 3}"
    return re.compile(
        {
            "lora": rf"(acoustic_transformer\.layers\.\d+|backbone\.layers\.({two}))\..*w[qkvo123]",
            "attention": r"backbone\.layers\.\d+\.attention\.w[qkvo]",
            "embeddings": r"mm_audio_embeddings\.audio_codebook_embeddings\.embeddings",
            "layers": rf"backbone\.layers\.(0|{layers - 1})\..*w[qkvo123]",
        }[part]
    )
