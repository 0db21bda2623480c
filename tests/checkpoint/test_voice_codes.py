"""Codes found again from rows, against codes that were drawn: the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revox.checkpoint.errors import VoiceError
from revox.checkpoint.voice_codes import embedding_of_codes, recover_codes
from revox.model.config import AcousticConfig, BackboneConfig, CodecConfig, VoxtralConfig
from revox.model.embedding import Embeddings


def sizes(dim: int, semantic: int) -> VoxtralConfig:
    backbone = BackboneConfig(dim=dim, vocab_size=8)
    return VoxtralConfig(backbone, AcousticConfig(), CodecConfig(semantic_codebook_size=semantic))


LAB = sizes(256, 512)
RELEASE = sizes(3072, 8192)


def random_table(config: VoxtralConfig, seed: int) -> Tensor:
    """Every row drawn on its own, as at the start of training."""
    generator = torch.Generator().manual_seed(seed)
    dim = config.backbone.dim
    return (torch.randn(config.audio_embedding_rows, dim, generator=generator) * dim**-0.5).bfloat16()


def smooth_table(config: VoxtralConfig, seed: int, curvature: float = 0.1, noise: float = 0.05) -> Tensor:
    """Acoustic rows a + level * b + a little curvature + a little noise, as training makes them."""
    generator = torch.Generator().manual_seed(seed)
    # Its own seed: slopes equal to semantic rows would make the sums ambiguous.
    table = random_table(config, seed + 1000).float()
    dim, levels = config.backbone.dim, config.codec.acoustic_codebook_size
    level = torch.linspace(-1, 1, levels)[:, None]
    at = config.codebook_rows[0]
    for rows in config.codebook_rows[1:]:
        start, slope, bend = (torch.randn(1, dim, generator=generator) * dim**-0.5 for _ in range(3))
        table[at + 2 : at + rows] *= noise
        table[at + 2 : at + rows] += start + level * slope + curvature * level.square() * bend
        at += rows
    return table.bfloat16()


def random_codes(config: VoxtralConfig, frames: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randint(rows - 2, (frames,), generator=generator) for rows in config.codebook_rows]
    )


@pytest.mark.parametrize(
    ("table", "frames"),
    [
        pytest.param(random_table(LAB, 1), 300, id="random rows"),
        pytest.param(smooth_table(LAB, 2), 300, id="rows smooth in the level"),
        pytest.param(smooth_table(LAB, 3, curvature=0.3, noise=0.3), 100, id="bent and noisy"),
        pytest.param(smooth_table(LAB, 4, curvature=0.0, noise=0.0), 100, id="straight lines"),
    ],
)
def test_every_code_is_found_at_the_labs_sizes(table, frames):
    codes = random_codes(LAB, frames, seed=frames)
    found = recover_codes(embedding_of_codes(codes, table, LAB), table, LAB)
    assert torch.equal(found.codes, codes)
    assert found.ended
    assert found.exact.all()
    # Rounding to bf16 is all that is left.
    assert ((found.residual / found.rounding) < 1.3).all()


@pytest.mark.parametrize("make_table", [random_table, smooth_table], ids=["random rows", "smooth rows"])
def test_every_code_is_found_at_the_releases_sizes(make_table):
    table, codes = make_table(RELEASE, 5), random_codes(RELEASE, 6, seed=6)
    found = recover_codes(embedding_of_codes(codes, table, RELEASE), table, RELEASE)
    assert torch.equal(found.codes, codes)
    assert found.exact.all()


def test_embedding_of_codes_is_that_of_the_models_embedding():
    embeddings = Embeddings(LAB).bfloat16().requires_grad_(False)
    codes = random_codes(LAB, 9, seed=0)
    table = embeddings.audio_codebook_embeddings.embeddings.weight
    assert torch.equal(embedding_of_codes(codes, table, LAB), embeddings.voice_embedding(codes))


def test_rows_without_the_end_frame_lose_no_frame():
    table, codes = random_table(LAB, 7), random_codes(LAB, 12, seed=7)
    found = recover_codes(embedding_of_codes(codes, table, LAB)[:-1], table, LAB)
    assert torch.equal(found.codes, codes)
    assert not found.ended


def test_rows_of_another_model_are_reported_as_not_explained():
    rows = embedding_of_codes(random_codes(LAB, 5, seed=8), random_table(LAB, 8), LAB)
    found = recover_codes(rows, random_table(LAB, 9), LAB)
    assert not found.exact.any()
    assert not found.ended
    assert (found.residual > 30 * found.rounding).all()


def test_the_real_table_in_another_precision_is_enough():
    # Rows summed in bf16, one rounding per term: no row is exact, and still the codes are right.
    table, codes = random_table(LAB, 10), random_codes(LAB, 40, seed=10)
    offsets = torch.tensor((0, *LAB.codebook_rows[:-1])).cumsum(0)[:, None]
    rows = torch.zeros(40, 256, dtype=torch.bfloat16)
    for book in table[codes + 2 + offsets]:
        rows = rows + book
    found = recover_codes(rows, table, LAB)
    assert torch.equal(found.codes, codes)
    assert not found.exact.any()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (torch.zeros(3, 128, dtype=torch.bfloat16), "do not belong together"),
        (torch.zeros(256, dtype=torch.bfloat16), "do not belong together"),
        (torch.full((3, 256), torch.nan, dtype=torch.bfloat16), "not numbers"),
    ],
)
def test_rows_that_cannot_be_a_voice_are_refused_with_a_sentence(rows, sentence):
    with pytest.raises(VoiceError, match=sentence):
        recover_codes(rows, random_table(LAB, 1), LAB)
