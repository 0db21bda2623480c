from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from conftest import TINY
from revox.coding import invert as module
from revox.coding.invert import InversionConfig, _Search, invert
from revox.coding.objective import SpectralTarget
from revox.coding.prior import CodePrior, _cheapest_path, starting_codes
from revox.coding.regularizers import Posterior, Regularizers
from revox.losses.spectral import mel_distance
from revox.model.codec import Codec
from revox.model.config import CodecConfig
from revox.progress import Progress, ProgressCallback

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = CodecConfig(
    semantic_codebook_size=64, semantic_dim=8, dim=24, hidden_dim=32, head_dim=6, n_heads=4, n_kv_heads=4,
    decoder_transformer_lengths=(1, 1, 1, 1), layer_scale_init=0.3,
)  # fmt: skip
RATE = SMALL.sampling_rate
SHORT = InversionConfig(steps=24, local_search_rounds=3, prior_weight=0.0, scales=((512, 80), (1024, 160)))


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    codec = Codec(SMALL, with_encoder=False).eval().requires_grad_(False)
    codec.quantizer.semantic_codebook.embedding_sum.normal_()
    codec.output_proj.conv.parametrizations.weight.original0.mul_(3)
    return codec


def random_codes(frames: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    semantic = torch.randint(SMALL.semantic_codebook_size, (1, frames), generator=generator)
    return torch.cat((semantic, torch.randint(21, (36, frames), generator=generator)))


@torch.no_grad()
def decode(codec: Codec, codes: Tensor) -> Tensor:
    return codec.decode(codes[None])[0]


def objective_of(codec: Codec, codes: Tensor, target: Tensor, config: InversionConfig) -> float:
    objective = SpectralTarget(target, RATE, config.scales, config.stft_weight)
    return float(objective.distance(decode(codec, codes)[None])[0])


def test_inversion_comes_nearer_to_a_sound_that_the_decoder_made(codec: Codec):
    target = decode(codec, random_codes(12, seed=1))
    config = dataclasses.replace(SHORT, steps=60)
    result = invert(codec, target, config=config, seed=0)
    assert result.codes.shape == (37, 12)
    assert result.codes.dtype == torch.int64
    assert result.codes[0].max() < SMALL.semantic_codebook_size
    assert result.codes[1:].min() >= 0
    assert result.codes[1:].max() <= 20
    assert result.loss < 0.85 * result.losses[0]
    # The loss reported is that of the codes returned, and they are as good by the score too.
    assert objective_of(codec, result.codes, target, config) == pytest.approx(result.loss, rel=1e-4)
    others = [mel_distance(decode(codec, random_codes(12, seed)), target, RATE) for seed in range(2, 7)]
    assert mel_distance(decode(codec, result.codes), target, RATE) < 0.8 * min(others)


def test_the_same_seed_gives_the_same_codes_and_another_seed_others(codec: Codec):
    target = decode(codec, random_codes(6, seed=2))
    first, again, other = (invert(codec, target, config=SHORT, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.codes, again.codes)
    assert first.losses == again.losses
    assert not torch.equal(first.codes, other.codes)


def test_the_best_loss_never_rises(codec: Codec):
    result = invert(codec, decode(codec, random_codes(6, seed=5)), config=SHORT)
    assert all(later <= sooner for sooner, later in zip(result.losses, result.losses[1:], strict=False))


def test_without_steps_the_starting_codes_are_the_result(codec: Codec):
    target = decode(codec, random_codes(6, seed=5))
    result = invert(codec, target, config=InversionConfig(steps=0, local_search_rounds=0), seed=7)
    start = starting_codes(codec, target, None, torch.Generator().manual_seed(7))
    assert result.steps == 0
    assert torch.equal(result.codes, start)


def test_the_local_search_alone_improves_codes_that_are_one_level_off(codec: Codec):
    codes = random_codes(8, seed=6)
    codes[1:] = codes[1:].clamp(1, 19)
    off = codes.clone()
    off[1:] += torch.randint(-1, 2, off[1:].shape, generator=torch.Generator().manual_seed(0))
    prior = CodePrior.from_codes([off], codec)
    config = InversionConfig(steps=0, local_search_rounds=10, prior_weight=0.0)
    result = invert(codec, decode(codec, codes), config=config, regularizers=Regularizers(prior))
    assert result.loss < result.losses[0]


def stop_after(steps: int) -> tuple[ProgressCallback, Callable[[], bool]]:
    seen: list[Progress] = []

    def interrupt(at: Progress) -> None:
        seen.append(at)
        if len(seen) == steps:
            raise KeyboardInterrupt

    return interrupt, lambda: len(seen) >= steps


@pytest.mark.parametrize("steps", [1, 15, 26])
def test_ctrl_c_keeps_the_best_codes_so_far(codec: Codec, steps: int):
    # 24 steps of descent, then the local search: the last one falls into it.
    target = decode(codec, random_codes(6, seed=8))
    interrupt, _ = stop_after(steps)
    result = invert(codec, target, config=SHORT, progress=interrupt)
    assert result.stopped
    assert result.steps == min(steps, 24)
    assert result.loss <= result.losses[0]
    assert objective_of(codec, result.codes, target, SHORT) == pytest.approx(result.loss, rel=1e-4)


def test_should_stop_ends_the_search_where_it_stands(codec: Codec):
    seen: list[Progress] = []
    result = invert(
        codec,
        decode(codec, random_codes(6, seed=8)),
        config=SHORT,
        progress=seen.append,
        should_stop=lambda: len(seen) >= 9,
    )
    assert result.stopped
    assert [at.done for at in seen] == list(range(1, 10))
    assert {at.total for at in seen} == {24}
    assert seen[-1].facts["best"] == result.loss


def test_a_budget_that_is_spent_ends_the_search_unstopped_with_fewer_steps(codec: Codec):
    target = decode(codec, random_codes(6, seed=8))
    result = invert(codec, target, config=dataclasses.replace(SHORT, steps=100_000, seconds=0.3))
    assert not result.stopped
    assert 0 < result.steps < 1000
    assert result.seconds < 20


def test_a_budget_is_shared_with_the_language_model_and_leaves_time_for_the_local_search(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
):
    now, seen = [0.0], []
    decode_latents = _Search._decode

    def slow_decode(search: _Search, latents: Tensor) -> Tensor:
        now[0] += 0.1
        return decode_latents(search, latents)

    def slow_guidance(probabilities: Tensor, values: Tensor) -> Tensor:
        now[0] += 1.0
        return values.square().mean()

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(_Search, "_decode", slow_decode)
    target = decode(codec, random_codes(2, seed=8))
    config = dataclasses.replace(SHORT, steps=1000, seconds=30.0)
    result = invert(
        codec, target, config=config, regularizers=Regularizers(guidance=slow_guidance), progress=seen.append
    )
    descent = [at for at in seen if at.what == module.DESCENT]
    assert descent[-1].done == descent[-1].total == result.steps, "the schedule is not cut off"
    assert 20 < result.steps < 60
    assert [at.done for at in seen if at.what == module.LOCAL_SEARCH]


def test_every_level_of_a_start_begins_as_itself(codec: Codec):
    for levels in (3, 8, 21):
        config = dataclasses.replace(SMALL, acoustic_codebook_size=levels)
        some = Codec(config, with_encoder=False).eval().requires_grad_(False)
        some.quantizer.semantic_codebook.embedding_sum.normal_()
        start = torch.zeros((37, levels), dtype=torch.long)
        start[1:] = torch.arange(levels)
        posterior = Posterior(
            torch.eye(SMALL.semantic_codebook_size)[start[0]].log_softmax(dim=1),
            some.quantizer.acoustic_codebook.decode(start[None, 1:])[0],
        )
        none = torch.zeros((37, 0), dtype=torch.long)
        terms = Regularizers(posterior=posterior)
        search = _Search(some, torch.zeros(levels * 1920), none, SHORT, terms, torch.Generator())
        assert torch.equal(search._relax(1.0, soft=False).codes, start)


def test_the_gradient_reaches_every_latent_through_rounding_and_codebook(codec: Codec):
    from revox.coding.invert import _Search

    target = decode(codec, random_codes(6, seed=9))
    none = torch.zeros((37, 0), dtype=torch.long)
    search = _Search(codec, target, none, SHORT, Regularizers(), torch.Generator().manual_seed(0))
    for soft in (True, False):
        relaxed = search._relax(1.0, soft)
        search.objective.distance(search._decode(relaxed.latents)).sum().backward()
        for latents in (search.acoustic, search.semantic):
            assert latents.grad is not None
            assert latents.grad.isfinite().all()
            assert (latents.grad != 0).float().mean() > 0.95
            latents.grad = None
    # On hard codes the decoder is given exactly what the quantizer makes of those codes.
    assert torch.allclose(relaxed.latents, codec.quantizer.decode(relaxed.codes[None]), atol=1e-5)


def test_a_long_clip_in_pieces_is_as_near_as_in_one(codec: Codec):
    target = decode(codec, random_codes(12, seed=10))
    whole = invert(codec, target, config=SHORT)
    pieces = invert(codec, target, config=dataclasses.replace(SHORT, chunk_frames=5))
    assert pieces.codes.shape == (37, 12)
    assert pieces.steps == 72
    in_one = objective_of(codec, whole.codes, target, SHORT)
    assert objective_of(codec, pieces.codes, target, SHORT) < 1.15 * in_one


def test_with_a_prior_codes_stay_nearer_to_those_of_the_presets(codec: Codec):
    bank = random_codes(60, seed=11)
    bank[1:] = 9 + bank[1:] % 3  # presets that only use the levels 9, 10 and 11
    bank[0] %= 20
    prior = CodePrior.from_codes([bank], codec)
    target = decode(codec, random_codes(6, seed=12))
    free, held = (
        invert(
            codec,
            target,
            config=dataclasses.replace(SHORT, prior_weight=weight),
            regularizers=Regularizers(prior),
        ).codes
        for weight in (0.0, 1.0)
    )
    assert (held[1:] - 10).abs().float().mean() < 0.5 * (free[1:] - 10).abs().float().mean()


def test_the_prior_is_the_gaussian_and_the_frequency_of_its_codes(codec: Codec):
    bank = random_codes(40, seed=13)
    prior = CodePrior.from_codes([bank[:, :15], bank[:, 15:]], codec)
    values = bank[1:].double() / 10 - 1
    assert torch.allclose(prior.acoustic_mean.double(), values.mean(1), atol=1e-6)
    assert torch.allclose(prior.acoustic_std.double(), values.std(1, correction=0), atol=1e-6)
    assert float(prior.semantic_log_frequency.exp().sum()) == pytest.approx(1, abs=1e-5)
    # The mean level costs nothing, a standard deviation away half a nat; a code seen more often costs less.
    hard = torch.nn.functional.one_hot(bank[0], 64).float()
    at_mean = prior.cost(hard, prior.acoustic_mean[:, None].expand(-1, 40))
    away = prior.cost(hard, (prior.acoustic_mean + prior.acoustic_std)[:, None].expand(-1, 40))
    assert float(away - at_mean) == pytest.approx(0.5, abs=1e-5)
    both = prior.cost_of_codes(bank[None, 0], codec.quantizer.acoustic_codebook.decode(bank[None, 1:]))
    assert float(both) == pytest.approx(float(prior.cost(hard, values.float())), abs=1e-5)


def test_a_preset_of_its_own_bank_is_found_again_as_the_start(codec: Codec):
    bank = [random_codes(20, seed=seed) for seed in (20, 21, 22)]
    prior = CodePrior.from_codes(bank, codec)
    target = decode(codec, bank[1])
    assert torch.equal(starting_codes(codec, target, prior, torch.Generator()), bank[1])


def test_the_path_prefers_to_stay_where_a_jump_saves_less_than_it_costs():
    distance = torch.tensor([[0.0, 9, 9, 9], [9, 0.3, 0.0, 9], [9, 9, 0.3, 0.0]])
    follows = torch.tensor([False, True, True, False])
    assert _cheapest_path(distance, follows, join=0.0).tolist() == [0, 2, 3]
    assert _cheapest_path(distance, follows, join=0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "config",
    [CodecConfig(), TINY.codec, CodecConfig(decoder_transformer_lengths=(1, 1, 2, 2))],
    ids=["release", "tiny", "lab"],
)
def test_the_decoder_is_given_all_the_context_it_hears(config: CodecConfig):
    small = dataclasses.replace(
        config, dim=16, hidden_dim=16, head_dim=4, n_heads=4, n_kv_heads=4,
        semantic_codebook_size=8, semantic_dim=4, layer_scale_init=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    codec = Codec(small, with_encoder=False).double().eval()
    reach = codec.left_context
    latents = torch.randn(1, small.latent_dim, reach + 4, dtype=torch.float64)
    whole = codec.decode_latents(latents)[:, -small.samples_per_frame :]
    for kept in (reach + 1, reach + 2):
        part = codec.decode_latents(latents[:, :, -kept:])[:, -small.samples_per_frame :]
        assert torch.allclose(part, whole, atol=1e-12, rtol=0)


def test_the_distance_is_zero_at_the_target_and_each_batch_item_its_own():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4800, generator=generator) * 0.1
    others = torch.randn(2, 4800, generator=generator) * 0.1
    objective = SpectralTarget(target, RATE)
    together = objective.distance(torch.cat((target[None], others)))
    assert float(together[0]) == pytest.approx(0, abs=1e-9)
    for item, alone in zip(together[1:], others, strict=True):
        assert float(item) == pytest.approx(float(objective.distance(alone[None])[0]), rel=1e-5)
    in_time = objective.distance_in_time(torch.cat((target[:2400], others[0, 2400:]))[None], 2)
    assert float(in_time[0, 1]) > 3 * float(in_time[0, 0])


@pytest.mark.parametrize(
    "target",
    [torch.zeros(0), torch.zeros(1919), torch.zeros(2, 1920), torch.full((1920,), float("nan"))],
    ids=["empty", "no whole frame", "two channels", "nan"],
)
def test_a_target_that_cannot_be_inverted_is_refused(codec: Codec, target: Tensor):
    with pytest.raises(ValueError, match="whole number of frames"):
        invert(codec, target)


def test_silence_can_be_inverted(codec: Codec):
    result = invert(codec, torch.zeros(1920 * 2), config=SHORT)
    assert result.loss <= result.losses[0] < float("inf")


def test_noisy_steps_round_half_dither_a_quarter_and_pass_a_quarter(codec: Codec):
    frames = 400
    target = decode(codec, random_codes(frames, seed=3))
    context = torch.zeros((37, 0), dtype=torch.long)
    search = _Search(codec, target, context, SHORT, Regularizers(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        search.acoustic.add_(0.2 * torch.randn(search.acoustic.shape, generator=search.generator))
        search.semantic.add_(0.2 * torch.randn(search.semantic.shape, generator=search.generator))
        given = search._relax(0.5, soft=True).latents[0]
        sure = search._relax(0.5, soft=False).latents[0]
    dim = SMALL.semantic_dim
    off = (given[dim:] - torch.tanh(search.acoustic)).abs().amax(dim=0)
    rounded = (given[dim:] - sure[dim:]).abs().amax(dim=0) < 1e-6
    passed = off < 1e-6
    dithered = ~rounded & ~passed
    assert 0.42 < rounded.float().mean() < 0.58
    assert 0.18 < passed.float().mean() < 0.32
    assert 0.18 < dithered.float().mean() < 0.32
    assert 0.8 / 21 < off[dithered].max() <= 1 / 21 + 1e-6
    hard = (given[:dim] - sure[:dim]).abs().amax(dim=0) < 1e-6
    assert 0.42 < hard.float().mean() < 0.58


def test_a_posterior_costs_nats_and_deviations_and_no_code_more_than_six_nats():
    sure = torch.tensor([[0.0, -8.0], [-1.0, -0.5]])
    posterior = Posterior(sure, torch.tensor([[0.0, 0.5], [-1.0, 1.0]]))
    values = torch.tensor([[0.1, 0.5], [-1.0, 0.6]])  # 21 levels lie 0.1 apart: off by 0.5 and 2 deviations
    strayed = 0.5 * (0.5**2 + 2**2) / 4
    for codes, nats in (((0, 0), 0.0 + 1.0), ((1, 1), 6.0 + 0.5)):
        expected = pytest.approx(nats / 2 / 2 + strayed, rel=1e-5)
        hard = torch.tensor(codes)
        assert float(posterior.cost_of_codes(hard[None], values[None], 21)[0]) == expected
        assert float(posterior.cost(torch.eye(2)[hard], values, 21)) == expected
    half = float(posterior.cost(torch.full((2, 2), 0.5), values, 21))
    assert half == pytest.approx((3.0 + 0.75) / 2 / 2 + strayed, rel=1e-5)
