"""The lab's tekken.json, as mistral-common reads it."""

import io

import numpy as np
import pytest

from lab.tokenizer import minimal_vocab_size, word_pieces, write_tekken

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


def test_the_words_of_a_text_make_it_one_token_a_word(tmp_path):
    text = "Half past nine, at seven o'clock."
    words = word_pieces([text])
    assert words == sorted(["Half", " past", " nine", " at", " seven", "'clock", " o"])
    tokenizer, _ = load(tmp_path, words=words)
    tekken = tokenizer.instruct_tokenizer.tokenizer
    assert len(tekken.encode(text, bos=False, eos=False)) == len(words) + len(",.")
