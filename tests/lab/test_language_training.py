"""What the lab's language model learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lab.language_data import LanguageData, PromptTokens, TokenizedText, TokenizedUtterance, TrainingItem
from lab.language_training import (
    SYMBOLS,
    LanguageTraining,
    Readout,
    code_neighbors,
    initialize_language,
    language_losses,
    place_semantic_rows,
    predicted_codes,
)
from revox.model.config import END_AUDIO_ID, N_SPECIAL_CODES, VoxtralConfig
from revox.model.voxtral import Voxtral

AUDIO = 24
PLAIN = LanguageTraining(
    flow_draws=1, guidance=0.0, own_share=0.0, token_noise=0.0, drop_hidden=0.0, acoustic_frames=1000
)


@pytest.fixture
def model(tiny_config: VoxtralConfig) -> Voxtral:
    model = Voxtral(tiny_config, with_encoder=False)
    initialize_language(model, 0)
    return model


def items(model: Voxtral, count: int = 2, frames: int = 6) -> list[TrainingItem]:
    """Prompts with references of 4 frames, and codes to say: all drawn."""
    rng = np.random.default_rng(0)
    codec = model.config.codec

    def codes(n: int) -> np.ndarray:
        semantic = rng.integers(0, codec.semantic_codebook_size, (1, n))
        acoustic = rng.integers(0, codec.acoustic_codebook_size, (codec.acoustic_dim, n))
        return np.concatenate((semantic, acoustic)).astype(np.int16)

    prompt = [1, 25, *[AUDIO] * 5, 36, 40, 41, 35, 25]
    made = []
    for i in range(count):
        at = np.linspace(8.0, 9.5, frames + i + 1)  # the text is positions 8 and 9
        symbols = rng.integers(1, SYMBOLS, frames + i).astype(np.int16)
        made.append(TrainingItem(codes(4), prompt, codes(frames + i), np.stack((at, np.ceil(at))), symbols))
    return made


def losses(model: Voxtral, settings: LanguageTraining, training: bool = True) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return language_losses(model, items(model), AUDIO, settings, rng, training)


def test_its_losses_fall_on_what_it_is_shown(model: Voxtral):
    settings = LanguageTraining(own_share=0.5, token_noise=0.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for _ in range(40):
        now = losses(model, settings)
        optimizer.zero_grad()
        (now["semantic"] + now["flow"]).backward()
        optimizer.step()
        found.append((float(now["semantic"].detach()), float(now["flow"].detach())))
    assert found[-1][0] < 0.5 * found[0][0]
    assert found[-1][1] < 0.9 * found[0][1]


def test_guidance_moves_the_goal_by_what_the_hidden_state_adds(
    model: Voxtral, monkeypatch: pytest.MonkeyPatch
):
    """With velocities a of the conditional and b of the blind branch the goal u becomes u + w (a - b)."""
    a, b, w = 0.3, -0.2, 0.4

    def velocity(x: Tensor, times: Tensor, hidden: Tensor) -> Tensor:
        return torch.where((hidden == 0).all(dim=-1, keepdim=True), b, a).expand_as(x)

    monkeypatch.setattr(model.acoustic_transformer, "velocity", velocity)
    plain = losses(model, PLAIN)["flow"]
    guided = losses(model, replace(PLAIN, guidance=w))["flow"]
    # mean (a - u - d)^2 = mean (a - u)^2 - 2 d mean (a - u) + d^2, d = w (a - b); a shift of a tells mean u.
    monkeypatch.setattr(
        model.acoustic_transformer, "velocity", lambda x, times, hidden: velocity(x, times, hidden) + 1
    )
    shifted = losses(model, PLAIN)["flow"]
    mean = (shifted - plain - 1) / 2
    d = w * (a - b)
    assert guided == pytest.approx(float(plain - 2 * d * mean + d * d), abs=1e-5)
    # Frames whose hidden state was dropped learn the plain velocity.
    dropped = replace(PLAIN, drop_hidden=1.0)
    assert losses(model, replace(dropped, guidance=w))["flow"] == losses(model, dropped)["flow"]


def test_the_alignment_loss_is_two_heads_attention_away_from_their_places_in_the_text(model: Voxtral):
    settings = replace(PLAIN, alignment=1.0, aligned_layers=(1,), alignment_width=0.7)
    found = losses(model, settings)["alignment"]
    weights = []

    def attention(module, given, _made):
        x, (cos, sin) = given[0], given[1][..., 1::2]
        heads, shared = module.n_heads, module.n_kv_heads
        q, k = module.wq(x).unflatten(-1, (heads, -1)), module.wk(x).unflatten(-1, (shared, -1))
        turn = torch.complex(cos, sin)[:, :, None]
        q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn for t in (q, k))
        k = k.repeat_interleave(heads // shared, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k.conj()).real / (2 * q.shape[-1]) ** 0.5
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1)[:, [0, heads // 2]])

    hook = model.backbone.layers[1].attention.register_forward_hook(attention)
    losses(model, PLAIN)
    hook.remove()
    means = []
    for i, item in enumerate(items(model)):
        for head in range(2):
            terms = []
            for t in range(item.codes.shape[1] + 1):
                row = weights[0][i, head, len(item.prompt) - 1 + t]
                near = [
                    float(w) * np.exp(-(((p - item.places[head, t]) / 0.7) ** 2) / 2)
                    for p, w in enumerate(row.detach())
                ]
                terms.append(-np.log(sum(near) + 1e-6))
            means.append(np.mean(terms))
    assert float(found.detach()) == pytest.approx(np.mean(means), rel=1e-4)


def test_an_item_without_places_has_no_part_in_the_alignment_loss(model: Voxtral):
    settings = replace(PLAIN, alignment=1.0, aligned_layers=(1,))
    both, rng = items(model), torch.Generator()
    blind = replace(both[1], places=None)
    alone = language_losses(model, both[:1], AUDIO, settings, rng)["alignment"]
    found = language_losses(model, [both[0], blind], AUDIO, settings, rng)["alignment"]
    assert float(found.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)
    assert float(language_losses(model, [blind], AUDIO, settings, rng)["alignment"].detach()) == 0


def test_semantic_codes_that_are_alike_begin_alike(model: Voxtral):
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    head = model.acoustic_transformer.semantic_codebook_output.weight
    before = float(head.detach()[N_SPECIAL_CODES:].std())
    others = table[N_SPECIAL_CODES + model.config.codec.semantic_codebook_size :].clone()
    book = torch.randn(
        model.config.codec.semantic_codebook_size, 8, generator=torch.Generator().manual_seed(1)
    )
    book[1] = book[0]
    place_semantic_rows(model, book, 0)
    for rows in (table, head):
        first, same, other = rows[N_SPECIAL_CODES : N_SPECIAL_CODES + 3]
        assert (first - same).norm() < 0.3 * (first - other).norm()
    assert float(head.detach()[N_SPECIAL_CODES:].std()) == pytest.approx(before, rel=0.2)
    assert torch.equal(table[N_SPECIAL_CODES + len(book) :], others)


def readout(model: Voxtral) -> Readout:
    return Readout(model.config.backbone.dim, model.config.codec)


def test_without_temperature_the_flow_leads_to_what_is_expected(
    model: Voxtral, monkeypatch: pytest.MonkeyPatch
):
    read, point = readout(model), 0.3
    with torch.no_grad():
        read.expected[-1].weight.zero_()
        read.expected[-1].bias.fill_(point)

    def velocity(x: Tensor, times: Tensor, _hidden: Tensor) -> Tensor:
        return (point - x) / (1 - times[:, None])

    monkeypatch.setattr(model.acoustic_transformer, "velocity", velocity)
    found = []
    for temperature in (0.0, 0.5, 0.999):
        rng = torch.Generator().manual_seed(3)
        settings = replace(PLAIN, temperature=temperature)
        found.append(language_losses(model, items(model), AUDIO, settings, rng, readout=read))
    # Beside the straight line to the point, the loss is the square of how far the goal is from it.
    assert float(found[0]["flow"].detach()) == pytest.approx(0, abs=1e-8)
    error = float(found[0]["expected"].detach())
    values = np.concatenate([item.codes[1:].T / 10 - 1 for item in items(model)])
    levels = model.config.codec.acoustic_codebook_size - 1
    values = (values + 1) * 10 * 2 / levels - 1
    assert error == pytest.approx(np.mean((values - point) ** 2), rel=1e-5)
    assert found[1]["flow"] > 0
    assert found[2]["flow"] > found[1]["flow"]


def test_the_flow_leads_to_what_goes_with_the_semantic_code_that_is_taken(
    model: Voxtral, monkeypatch: pytest.MonkeyPatch
):
    read = readout(model)
    codes, width = read.book.shape
    with torch.no_grad():
        read.book.copy_(torch.linspace(-1, 1, codes)[:, None].expand(codes, width))
        for part in (read.expected[0], read.expected[2], read.semantic):
            torch.nn.init.normal_(part.weight, std=0.3)
    seen: list[tuple[Tensor, Tensor]] = []
    acoustic = read.acoustic

    def noted(states: Tensor, taken: Tensor) -> Tensor:
        seen.append((taken, acoustic(states, taken)))
        return seen[-1][1]

    monkeypatch.setattr(read, "acoustic", noted)
    logits: list[Tensor] = []
    semantic_logits = model.acoustic_transformer.semantic_logits
    monkeypatch.setattr(
        model.acoustic_transformer,
        "semantic_logits",
        lambda states: logits.append(semantic_logits(states)) or logits[-1],
    )
    goals: list[Tensor] = []

    def velocity(x: Tensor, times: Tensor, _hidden: Tensor) -> Tensor:
        # Straight to where the flow should lead, if that is what goes with the likeliest code.
        goals.append((seen[1][1] - x) / (1 - times[:, None]))
        return goals[-1]

    monkeypatch.setattr(model.acoustic_transformer, "velocity", velocity)
    given, rng = items(model), torch.Generator().manual_seed(3)
    found = language_losses(model, given, AUDIO, replace(PLAIN, temperature=0.0), rng, readout=read)
    assert float(found["flow"].detach()) == pytest.approx(0, abs=1e-7)
    spoken = np.concatenate([item.codes[0] for item in given]).tolist()
    frames = [row for part, item in zip(logits[0].split([7, 8]), given, strict=True)
              for row in part[: item.codes.shape[1]]]  # fmt: skip
    likeliest = [int(row[N_SPECIAL_CODES:].argmax()) for row in frames]
    assert seen[0][0].tolist() == spoken
    assert seen[1][0].tolist() == likeliest != spoken
    assert (seen[0][1] - seen[1][1]).abs().mean() > 0.01


def test_a_predicted_frame_has_the_acoustic_codes_that_go_with_the_semantic_code_it_has(model: Voxtral):
    read, given, rng = readout(model), items(model), torch.Generator().manual_seed(3)
    torch.nn.init.normal_(read.expected[2].weight, std=0.3)
    states: list[Tensor] = []
    hook = model.backbone.register_forward_hook(lambda *call: states.append(call[-1]))
    found = predicted_codes(model, given, AUDIO, rng, replace(PLAIN, temperature=0.5), read)
    hook.remove()
    for i, (item, codes) in enumerate(zip(given, found, strict=True)):
        true = torch.from_numpy(item.codes[0].astype(np.int64))
        assert codes[0].tolist() == true.tolist()
        start = len(item.prompt) - 1
        values = read.acoustic(states[0][i, start : start + len(true)], true).detach().clamp(-1, 1)
        levels = model.config.codec.acoustic_codebook_size - 1
        assert codes[1:].T.tolist() == ((values + 1) / 2 * levels).round().long().tolist()


def test_a_readout_that_has_not_learned_what_is_expected_is_not_asked(
    model: Voxtral, monkeypatch: pytest.MonkeyPatch
):
    read = readout(model)
    monkeypatch.setattr(read, "acoustic", lambda *given: pytest.fail("asked"))
    found = [
        predicted_codes(model, items(model), AUDIO, torch.Generator().manual_seed(3), PLAIN, one)
        for one in (read, None)
    ]
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)


def test_the_phonemes_are_read_from_the_state_that_predicts_their_frame(model: Voxtral):
    read, given = readout(model), items(model)
    given[0].symbols[2] = 0  # unknown
    given.append(replace(given[1], symbols=None))
    rng = torch.Generator().manual_seed(3)
    found = language_losses(model, given, AUDIO, PLAIN, rng, readout=read)["symbols"]
    seen: list[Tensor] = []
    hook = model.backbone.register_forward_hook(lambda *call: seen.append(call[-1]))
    losses(model, PLAIN)
    hook.remove()
    terms = []
    for i, item in enumerate(given[:2]):
        for t, symbol in enumerate(item.symbols):
            if symbol:
                logits = read.symbols(seen[0][i, len(item.prompt) - 1 + t])
                terms.append(-float(logits.log_softmax(-1)[int(symbol)].detach()))
    assert float(found.detach()) == pytest.approx(np.mean(terms), rel=1e-4)


def test_more_draws_of_the_flow_are_the_same_loss_with_less_chance(model: Voxtral):
    def spread(draws: int) -> tuple[float, float]:
        found = []
        for seed in range(40):
            rng = torch.Generator().manual_seed(seed)
            settings = replace(PLAIN, flow_draws=draws)
            found.append(float(language_losses(model, items(model), AUDIO, settings, rng)["flow"].detach()))
        return float(np.mean(found)), float(np.std(found))

    one, many = spread(1), spread(8)
    assert many[0] == pytest.approx(one[0], rel=0.03)
    assert many[1] < 0.6 * one[1]


def test_at_times_it_reads_acoustic_codes_of_its_own_in_the_place_of_the_true_ones(
    model: Voxtral, monkeypatch: pytest.MonkeyPatch
):
    read: list[Tensor] = []
    frames = model.mm_audio_embeddings.frames

    def noted(ids: Tensor) -> Tensor:
        read.append(ids[0])
        return frames(ids)

    monkeypatch.setattr(model.mm_audio_embeddings, "frames", noted)
    given = items(model)

    def spoken() -> Sequence[Tensor]:
        return read[-1].split([item.codes.shape[1] for item in given], dim=1)

    for share in (0.0, 1.0):
        read.clear()
        losses(model, replace(PLAIN, own_share=share))
        for ids, item in zip(spoken(), given, strict=True):
            true = torch.from_numpy(item.codes.astype(np.int64)) + N_SPECIAL_CODES
            assert torch.equal(ids[0], true[0])
            assert torch.equal(ids[1:], true[1:]) == (share == 0)
            assert ids[1:].min() >= N_SPECIAL_CODES
            assert ids[1:].max() < N_SPECIAL_CODES + model.config.codec.acoustic_codebook_size
    read.clear()
    losses(model, replace(PLAIN, own_share=1.0, token_noise=0.5), training=False)
    for ids, item in zip(spoken(), given, strict=True):
        assert torch.equal(ids, torch.from_numpy(item.codes.astype(np.int64)) + N_SPECIAL_CODES)


TOKENS = PromptTokens(bos=1, audio=AUDIO, begin_audio=25, next_audio_text=36, repeat_audio_text=35)


def utterances(per_speaker: int = 3) -> list[TokenizedUtterance]:
    """Two presets, two other synthetic speakers, a human one, and one with a single utterance.

    All codes of an utterance are its own number; its texts are told apart by their tokens.
    """
    made = []
    for speaker, preset, human in (
        ("p", "casual_female", False), ("q", "casual_male", False), ("a", None, False), ("b", None, False),
        ("h", None, True), ("alone", None, True),
    ):  # fmt: skip
        for _ in range(1 if speaker == "alone" else per_speaker):
            number = len(made)
            codes = np.full((37, 4 + number), number, np.int16)
            tokens = ((100 + number,), (200 + number, 200 + number))
            texts = tuple(TokenizedText(t, np.empty((0, 2), int)) for t in tokens)
            made.append(TokenizedUtterance(codes, texts, speaker, preset, human))
    return made


def draws(settings: LanguageTraining, count: int = 2000) -> list[TrainingItem]:
    references = {"casual_female": np.full((37, 5), 98), "casual_male": np.full((37, 6), 99)}
    data, rng = LanguageData(utterances(), references, TOKENS, settings), np.random.default_rng(0)
    return [data.draw(rng) for _ in range(count)]


def test_a_batch_is_of_about_one_length_and_every_length_has_its_turn():
    references = {"casual_female": np.full((37, 5), 98), "casual_male": np.full((37, 6), 99)}
    data = LanguageData(utterances(), references, TOKENS, LanguageTraining(reference_frames=(4, 40)))
    lengths = [[item.positions for item in data.batch(8, np.random.default_rng(seed))] for seed in range(40)]
    every = [length for batch in lengths for length in batch]
    assert np.mean([np.ptp(batch) for batch in lengths]) < 0.5 * np.ptp(every)
    assert len({round(np.mean(batch) / 10) for batch in lengths}) > 2


def test_presets_humans_and_others_are_drawn_by_their_shares():
    speakers = [one.speaker for one in utterances()]
    found = draws(LanguageTraining(preset_share=0.2, human_share=0.5))
    drawn = [speakers[item.codes[0, 0]] for item in found]
    shares = {name: drawn.count(name) / len(drawn) for name in set(speakers)}
    assert shares["p"] + shares["q"] == pytest.approx(0.2, abs=0.03)
    assert shares["h"] == pytest.approx(0.5, abs=0.03)
    assert shares["a"] + shares["b"] == pytest.approx(0.3, abs=0.03)
    assert shares["alone"] == 0  # nothing else of this voice could be its reference


def test_a_reference_is_other_speech_of_the_speaker_or_the_presets_own():
    made = utterances()
    for item in draws(LanguageTraining(reference_frames=(3, 12)), 300):
        reference, one = item.reference, made[item.codes[0, 0]]
        numbers = set(reference[0].tolist())
        if numbers <= {98, 99}:
            assert numbers == {98 if one.preset == "casual_female" else 99}
        else:
            assert {made[n].speaker for n in numbers} == {one.speaker}
            assert item.codes[0, 0] not in numbers
            assert reference.shape[1] <= 12
        audio = [AUDIO] * (reference.shape[1] + 1)
        assert item.prompt in [[1, 25, *audio, 36, *text.tokens, 35, 25] for text in one.texts]


def test_both_forms_of_a_text_are_learned():
    lengths = [len(item.prompt) - item.reference.shape[1] for item in draws(LanguageTraining(), 400)]
    assert 0.4 < np.mean(np.array(lengths) == min(lengths)) < 0.6


def test_a_codes_neighbors_are_the_nearest_and_itself_has_the_largest_share():
    book = torch.randn((40, 6), generator=torch.Generator().manual_seed(0))
    codes, shares = code_neighbors(book, 5)
    distances = (book[:, None] - book).square().sum(-1)
    torch.testing.assert_close(codes[:, 0], torch.arange(40))
    torch.testing.assert_close(shares.sum(-1), torch.ones(40))
    width = distances.masked_fill(torch.eye(40, dtype=torch.bool), torch.inf).min(-1).values.mean()
    for code in (0, 7, 39):
        nearest = distances[code].argsort()[:5]
        assert codes[code].tolist() == nearest.tolist()
        expected = torch.exp(-distances[code][nearest] / width / 2)
        torch.testing.assert_close(shares[code], expected / expected.sum(), rtol=1e-3, atol=1e-4)


def test_neighbors_of_a_code_are_right_in_part_and_the_end_is_the_end(model: Voxtral):
    count = model.config.codec.semantic_codebook_size
    codes = torch.stack((torch.arange(count), (torch.arange(count) + 1) % count), dim=1)
    shares = torch.tensor([0.7, 0.3]).expand(count, 2)
    logits: list[Tensor] = []
    head = model.acoustic_transformer.semantic_logits
    model.acoustic_transformer.semantic_logits = lambda x: logits.append(head(x)) or logits[-1]
    rng = torch.Generator().manual_seed(3)
    found = language_losses(model, items(model), AUDIO, PLAIN, rng, neighbors=(codes, shares))
    told = logits[-1].log_softmax(-1)
    wanted = []
    for item in items(model):
        wanted += [
            (0.7, int(code) + N_SPECIAL_CODES, 0.3, (int(code) + 1) % count + N_SPECIAL_CODES)
            for code in item.codes[0]
        ]
        wanted.append((1.0, END_AUDIO_ID, 0.0, END_AUDIO_ID))
    expected = [-(a * row[i] + b * row[j]) for row, (a, i, b, j) in zip(told, wanted, strict=True)]
    torch.testing.assert_close(found["around"], torch.stack(expected).mean())
