"""The same comparisons once at the release's sizes, module by module: minutes and up to 6 GB.

Run with `pytest tests/parity/test_full_size.py -m slow -s`; prints the errors found.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from oracle import (
    codes_equal_up_to_ties,
    load_into_oracle,
    noise_injected,
    oracle_latents,
    oracle_velocity,
    random_acoustic_state,
    random_backbone_state,
    random_codec_state,
    relative_error,
    release_params,
)
from subject import config_of, load_ours, noise_of, random_codes, speechlike
from test_backbone_parity import hidden_of, our_backbone, their_backbone

from revox.model.acoustic import AcousticTransformer
from revox.model.backbone import KVCache
from revox.model.codec import Codec
from revox.model.embedding import AudioCodebookEmbeddings

pytestmark = pytest.mark.slow
TABLE = "mm_audio_embeddings.audio_codebook_embeddings."


@pytest.fixture(autouse=True)
def _memory_given_back():
    yield
    gc.collect()


def report(what: str, figure: object) -> None:
    print(f"\nfull size: {what}: {figure}", end="")


def test_codec_and_reference_path_at_full_size(oracle):
    params = release_params()
    config = config_of(params)
    theirs = oracle.audio_tokenizer(params)
    state = random_codec_state(theirs, seed=1)
    load_into_oracle(theirs, state)
    ours = load_ours(Codec(config.codec, with_encoder=True), state, "audio_tokenizer.", torch.float32)
    table = load_ours(AudioCodebookEmbeddings(config), state, TABLE, torch.float32)

    clip = speechlike(2 * 24000 + 333, seed=1)
    latents = oracle_latents(theirs, clip)
    error = relative_error(ours.encode_latents(clip[None]), latents)
    report(f"encoder latents {list(latents.shape)}, relative error", f"{error:.2e}")
    assert error < 1e-5
    codes, their_codes = ours.encode(clip[None]), theirs.quantizer.encode(latents)
    report("codes that differ", f"{int((codes != their_codes).sum())} of {codes.numel()}")
    codebook = theirs.quantizer.semantic_codebook.embedding
    assert codes_equal_up_to_ties(latents, codes, their_codes, codebook, 21)

    ids = torch.cat((their_codes + 2, torch.zeros(1, 37, 1, dtype=torch.long)), dim=-1)
    ids[0, 0, -1] = 1
    error = relative_error(table(ids)[0], theirs.encode_tokens([ids])[0])
    report("rows, relative error", f"{error:.2e}")
    assert error < 1e-6

    sample = random_codes(config, 1, 30, seed=2)
    error = relative_error(ours.decode(sample), theirs.decode(sample)[:, 0])
    report("decoder waveform of 30 frames, relative error", f"{error:.2e}")
    assert error < 1e-5


def test_codec_and_reference_path_as_served_at_full_size(oracle):
    params = release_params()
    config = config_of(params)
    theirs = oracle.audio_tokenizer(params, torch.bfloat16)
    state = {k: t.bfloat16() for k, t in random_codec_state(theirs, seed=1).items()}
    load_into_oracle(theirs, state)
    ours = load_ours(Codec(config.codec, with_encoder=True), state, "audio_tokenizer.", torch.bfloat16)
    table = load_ours(AudioCodebookEmbeddings(config), state, TABLE, torch.bfloat16)

    clip = speechlike(2 * 24000 + 333, seed=1)
    codes = ours.encode_as_served(clip[None])
    same = (codes == theirs._tokenize_audio(clip[None, None])).float().mean()
    report("bf16 codes equal to the served ones", f"{same:.6f}")
    assert same == 1
    ids = torch.cat((codes + 2, torch.zeros(1, 37, 1, dtype=torch.long)), dim=-1)
    ids[0, 0, -1] = 1
    assert torch.equal(table(ids)[0], theirs.encode_waveforms([clip])[0])
    sample = random_codes(config, 1, 10, seed=2)
    assert torch.equal(
        ours.decode(sample)[0].float(), theirs.decode_helper_batch_async([(sample[0] + 2).T])[0]
    )
    report("bf16 rows and decoded waveform", "identical")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acoustic_transformer_at_full_size(oracle, dtype: torch.dtype):
    params = copy.deepcopy(release_params())
    config = config_of(params)
    theirs = oracle.acoustic_transformer(params, dtype)
    state = random_acoustic_state(theirs, seed=2)
    load_into_oracle(theirs, state, dtype)
    ours = load_ours(AcousticTransformer(config), state, "acoustic_transformer.", dtype)
    del state
    x, hidden = noise_of(1, 4, 36).to(dtype), noise_of(2, 4, 3072).to(dtype)
    times = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=dtype)
    error = relative_error(ours.velocity(x, times, hidden), oracle_velocity(theirs, x, times, hidden))
    report(f"velocity in {dtype}, relative error", f"{error:.2e}")
    noise = noise_of(3, 4, 36).to(dtype)
    with noise_injected(oracle, noise):
        their_ids = theirs(hidden, torch.full((4,), 1.2, dtype=dtype))
    same = (ours.frame(hidden, noise) == their_ids).float().mean()
    report(f"ids of 4 frames in {dtype} equal", f"{same:.6f}")
    assert error < (1e-5 if dtype == torch.float32 else 1e-12)
    assert same == 1


def test_two_layers_of_the_backbone_at_full_size():
    params = release_params() | {"n_layers": 2}
    state = random_backbone_state(params, seed=3)
    ours, theirs = our_backbone(params, state), their_backbone(params, state)
    del state
    embeddings = noise_of(4, 1, 48, 3072)
    expected = hidden_of(theirs, embeddings)
    error = relative_error(ours(embeddings), expected)
    report("hidden states of 2 layers, relative error", f"{error:.2e}")
    assert error < 1e-4
    cache = KVCache.empty(ours.config, 1, 48, torch.float32, "cpu")
    parts = [ours(part, cache) for part in embeddings.split([40, *[1] * 8], dim=1)]
    error = relative_error(torch.cat(parts, dim=1), expected)
    report("the same through the cache, relative error", f"{error:.2e}")
    assert error < 1e-4
