"""Embedding sums and the whole reference path, clip to rows, are the published ones."""

from __future__ import annotations

import pytest
import torch
from oracle import oracle_latents, relative_error
from subject import Pair, random_codes, speechlike


def test_a_frames_row_is_the_oracles_sum_of_37_rows(small: Pair):
    ids = random_codes(small.config, 2, 40, seed=1) + 2
    theirs = torch.stack(small.their_codec.encode_tokens([ids[:1], ids[1:]]))
    assert relative_error(small.embeddings.frames(ids), theirs) < 1e-6


def test_special_ids_index_the_table_as_the_oracle_does(small: Pair):
    ids = torch.zeros(1, 37, 4, dtype=torch.long)
    ids[0, 0] = torch.tensor([0, 1, 1, 513])
    ids[0, 1:, 2:] = torch.tensor([2, 22])
    theirs = small.their_codec.encode_tokens([ids])[0]
    assert relative_error(small.embeddings.frames(ids)[0], theirs) < 1e-6


def test_the_table_is_padded_to_a_multiple_of_128_rows(small: Pair):
    # 514 + 36 * 23 = 1342 rows.
    table = small.embeddings.audio_codebook_embeddings.embeddings.weight
    assert table.shape == small.their_codec.audio_token_embedding.embeddings.weight.shape == (1408, 256)


@pytest.mark.parametrize("samples", [1920, 6 * 1920, 6 * 1920 + 1, 13 * 1920 - 700, 300])
def test_the_reference_path_in_float32_is_the_oracles_from_clip_to_rows(small: Pair, samples: int):
    clip = speechlike(samples, seed=samples)
    # encode_waveforms with its autocast taken out: codes, +2, end frame, sum of rows.
    ids = small.their_codec.quantizer.encode(oracle_latents(small.their_codec, clip)) + 2
    end = torch.zeros(1, 37, 1, dtype=torch.long)
    end[0, 0] = 1
    theirs = small.their_codec.encode_tokens([torch.cat((ids, end), dim=-1)])[0]
    ours = small.embeddings.voice_embedding(small.codec.encode(clip[None])[0])
    assert ours.shape == (-(-samples // 1920) + 1, small.config.backbone.dim)
    assert relative_error(ours, theirs) < 1e-5
