"""The lab's tekken.json, as mistral-common reads it."""

import io
import json

import numpy as np
import pytest

from lab.sources import SPEECH
from lab.speech.plan import read_plan
from lab.tokenizer import domain_pieces, learn_pieces, minimal_vocab_size, write_tekken

mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")


def load(tmp_path, **settings):
    vocab_size = write_tekken(tmp_path / "tekken.json", {"neutral_male": 5, "casual_female": 3}, **settings)
    return mistral.MistralTokenizer.from_file(tmp_path / "tekken.json"), vocab_size


def expected(text, rows):
    return [1, 25] + [24] * rows + [36] + [1000 + byte for byte in text.encode()] + [35, 25]


def test_a_preset_request_is_the_releases_prompt_with_one_token_a_byte(tmp_path):
    from mistral_common.protocol.speech.request import SpeechRequest

    tokenizer, vocab_size = load(tmp_path)
    text = "Half past nine, für 3 €."
    encoded = tokenizer.encode_speech_request(SpeechRequest(input=text, voice="neutral_male"))
    assert encoded.tokens == expected(text, 5)
    assert max(encoded.tokens) < vocab_size == 1256


def test_reference_audio_counts_its_frames_and_the_end(tmp_path):
    import av
    from mistral_common.protocol.speech.request import SpeechRequest

    tokenizer, _ = load(tmp_path)
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=24000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1920 * 4), np.int16), format="s16", layout="mono")
        frame.sample_rate = 24000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    encoded = tokenizer.encode_speech_request(SpeechRequest(input="ten", ref_audio=file.getvalue()))
    assert encoded.tokens == expected("ten", 5)
    assert len(encoded.audios[0].audio_array) == 1920 * 4


def test_the_special_tokens_have_the_releases_ids(tmp_path):
    tokenizer, _ = load(tmp_path)
    tekken = tokenizer.instruct_tokenizer.tokenizer
    names = ["<s>", "</s>", "[AUDIO]", "[BEGIN_AUDIO]", "[REPEAT_AUDIO_TEXT]", "[NEXT_AUDIO_TEXT]"]
    assert [tekken.get_special_token(name) for name in names] == [1, 2, 24, 25, 35, 36]


def test_words_become_one_token_and_the_declared_size_is_filled(tmp_path):
    words = [" seven", " past"]
    tokenizer, vocab_size = load(tmp_path, words=words, vocab_size=70000)
    tekken = tokenizer.instruct_tokenizer.tokenizer
    assert vocab_size == tekken.n_words == 70000
    assert tekken.encode("x seven", bos=False, eos=False) == [1000 + ord("x"), 1256]
    assert tekken.decode(tekken.encode("a seven past b", bos=False, eos=False)) == "a seven past b"


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least"):
        write_tekken(tmp_path / "tekken.json", {}, vocab_size=minimal_vocab_size() - 1)


TEXTS = [
    "Half past nine, at seven o'clock.", "The seventh of March was cold and windy; the ninth is warm.",
    "Call me back at half past seven.", "It's the last train to the coast, isn't it?",
]  # fmt: skip


def test_learned_pieces_give_the_tokens_of_the_byte_pair_encoding_they_come_from(tmp_path):
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    pieces = learn_pieces(TEXTS, 60)
    assert len(pieces) == 60
    tokenizer, vocab_size = load(tmp_path, words=pieces)
    assert vocab_size == minimal_vocab_size(pieces) == 1000 + 256 + len(pieces)
    tekken = tokenizer.instruct_tokenizer.tokenizer

    pattern = json.loads((tmp_path / "tekken.json").read_text())["config"]["pattern"]
    reference = Tokenizer(BPE())
    split = Split(Regex(pattern), "isolated")
    reference.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=len(alphabet) + 60, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(TEXTS, trainer)
    for text in [*TEXTS, "Nine seventy o'clocks at 12, past the windy coast!"]:
        ids = tekken.encode(text, bos=False, eos=False)
        bounds = np.cumsum([len(tekken.id_to_byte_piece(i)) for i in ids])
        expected = np.cumsum([len(token) for token in reference.encode(text).tokens])  # a character a byte
        assert bounds.tolist() == expected.tolist(), text


def test_pieces_are_of_ascii_so_that_each_is_a_text():
    assert all(piece.isascii() for piece in learn_pieces(["caf\u00e9 \u20ac"] * 9, 60))


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "\u4f60\u597d \U0001f600",
        "a\nb\t  c\u0000",
        "\u0120 \u00c3\u00a9",
        "caf\u00e9 CAF\u00c9",
        "",
    ],
    ids=ascii,
)
def test_any_text_comes_back_from_its_tokens(tmp_path, text):
    tokenizer, _ = load(tmp_path, words=domain_pieces())
    tekken = tokenizer.instruct_tokenizer.tokenizer
    assert tekken.decode(tekken.encode(text, bos=False, eos=False)) == text


def test_the_committed_pieces_are_distinct_and_shorten_the_plans_sentences(tmp_path):
    pieces = domain_pieces()
    assert len(set(pieces)) == len(pieces)
    tokenizer, _ = load(tmp_path, words=pieces)
    tekken = tokenizer.instruct_tokenizer.tokenizer
    texts = [item.written for item in read_plan(SPEECH / "plan.tsv")[::50]]
    tokens = sum(len(tekken.encode(text, bos=False, eos=False)) for text in texts)
    assert tokens < 2 * sum(len(text.split()) for text in texts)
