"""When the synthesizer says each phoneme: `python -m lab.speech.durations --kokoro MODEL --voices FILE`.

Kokoro decides the durations of a sentence before it makes any sound, in a small part of its network, so they
take a few hundredths of a second for speech that was made long ago and is kept as codes only. `durations.npz`
holds them for every utterance that the folders given list, with which of them each word of the text is.
Needs onnx beside what `lab.speech.kokoro` needs.
"""

from __future__ import annotations

import argparse
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from lab.errors import LabError
from lab.speech.kokoro import Kokoro, read_index
from lab.speech.plan import PlannedUtterance, Speaker, read_plan, read_speakers
from revox.speech.files import replace_file

FILE = Path(__file__).parent.parent / "spoken" / "durations.npz"
UNIT = 0.025  # seconds of one count
_NODE = "/encoder/Clip_output_0"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Durations:
    """Of one utterance: the synthesizer's token of each symbol it read, silence at both ends included, and
    how many `UNIT`s each lasts; `words` [words, 2] are where each plain word's symbols begin and end."""

    tokens: np.ndarray
    counts: np.ndarray
    words: np.ndarray


def read_durations(path: Path = FILE) -> dict[int, Durations]:
    """Durations by number in the plan; empty if there is no file. Raises LabError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            numbers, ends, word_ends = arrays["numbers"], arrays["ends"], arrays["word_ends"]
            tokens = np.split(arrays["tokens"], ends[:-1])
            counts = np.split(arrays["counts"], ends[:-1])
            words = np.split(arrays["words"], word_ends[:-1])
    except (OSError, ValueError, KeyError, EOFError, zlib.error, BadZipFile) as error:
        raise LabError(f"{path} does not hold durations: {error}") from None
    return {int(n): Durations(*of) for n, *of in zip(numbers, tokens, counts, words, strict=True)}


def write_durations(path: Path, found: dict[int, Durations]) -> None:
    """Write what `read_durations` reads."""
    every = [found[number] for number in sorted(found)]
    content = io.BytesIO()
    np.savez_compressed(
        content,
        numbers=np.array(sorted(found), np.int32),
        ends=np.cumsum([len(one.tokens) for one in every]),
        word_ends=np.cumsum([len(one.words) for one in every]),
        tokens=np.concatenate([one.tokens for one in every]).astype(np.uint8),
        counts=np.concatenate([one.counts for one in every]).astype(np.uint8),
        words=np.concatenate([one.words for one in every]).astype(np.uint16),
    )
    replace_file(path, content.getvalue())


def word_symbols(phonemes: str, alone: list[str]) -> list[tuple[int, int]]:
    """Where in `phonemes` the symbols of each word are, given each word's phonemes when said `alone`.

    The synthesizer reads some words as one ("on the"), so spaces do not tell: symbols are matched by the
    fewest edits between the sentence and its words one after the other.
    """
    symbols = [i for i, symbol in enumerate(phonemes) if symbol.isalpha() or symbol in "ˈˌː"]
    read = "".join(phonemes[i] for i in symbols)
    owner = [n for n, word in enumerate(alone) for symbol in word if symbol.isalpha() or symbol in "ˈˌː"]
    expected = "".join(s for word in alone for s in word if s.isalpha() or s in "ˈˌː")
    # Fewest edits, and the path back through them.
    cost = np.zeros((len(read) + 1, len(expected) + 1), int)
    cost[:, 0], cost[0] = np.arange(len(read) + 1), np.arange(len(expected) + 1)
    for i in range(1, len(read) + 1):
        for j in range(1, len(expected) + 1):
            change = cost[i - 1, j - 1] + (read[i - 1] != expected[j - 1])
            cost[i, j] = min(change, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    of_word: list[list[int]] = [[] for _ in alone]
    i, j = len(read), len(expected)
    while i:
        if j and cost[i, j] == cost[i - 1, j - 1] + (read[i - 1] != expected[j - 1]):
            of_word[owner[j - 1]].append(symbols[i - 1])
            i, j = i - 1, j - 1
        elif j and cost[i, j] == cost[i, j - 1] + 1:
            j -= 1
        else:
            of_word[owner[min(j, len(owner) - 1)]].append(symbols[i - 1])
            i -= 1
    spans, last = [], 0
    for found in of_word:
        spans.append((min(found), max(found) + 1) if found else (last, last))
        last = spans[-1][1]
    return spans


class DurationPredictor(Kokoro):
    """The part of the synthesizer that decides durations."""

    def __init__(self, model: Path, vocabulary: Path, voices: Path, reduced: Path):
        if not reduced.is_file():
            _write_reduced(model, reduced)
        super().__init__(reduced, vocabulary, voices)
        self._alone: dict[tuple[str, str], str] = {}

    def durations(self, item: PlannedUtterance, speaker: Speaker) -> Durations | None:
        """Those of one planned utterance; None if its words cannot be found in what is read."""
        phonemes = "".join(s for s in self.phonemes(item.written, speaker.language) if s in self._tokens)
        tokens = [self._tokens[symbol] for symbol in phonemes]
        inputs = self.inputs(speaker, tokens)
        counts = self._session.run([_NODE], inputs)[0].ravel().round().astype(int)
        alone = [self._word(word, speaker.language) for word in item.text.split()]
        spans = np.array(word_symbols(phonemes, alone)) + 1  # the first token is the silence before
        if (spans[:, 1] <= spans[:, 0]).any() or (spans[1:, 0] < spans[:-1, 1]).any() or counts.max() > 255:
            return None
        return Durations(inputs["tokens"][0], counts, spans)

    def _word(self, word: str, language: str) -> str:
        if (word, language) not in self._alone:
            self._alone[word, language] = self.phonemes(word, language)
        return self._alone[word, language]


def _write_reduced(model: Path, reduced: Path) -> None:
    """The nodes of `model` that the durations depend on, as a model of its own."""
    import onnx

    graph = (whole := onnx.load(model)).graph
    makers = {name: node for node in graph.node for name in node.output}
    wanted, seen = [_NODE], set()
    while wanted:
        name = wanted.pop()
        if name in makers and name not in seen:
            seen.add(name)
            wanted += makers[name].input
    nodes = [node for node in graph.node if seen & set(node.output)]
    used = {name for node in nodes for name in node.input}
    weights = [weight for weight in graph.initializer if weight.name in used]
    for part, content in ((graph.node, nodes), (graph.initializer, weights)):
        del part[:]
        part.extend(content)
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(_NODE, onnx.TensorProto.FLOAT, None))
    onnx.save(whole, reduced)


def main() -> None:
    """Parse the options and add the durations that are missing."""
    parser = argparse.ArgumentParser(prog="python -m lab.speech.durations", description=__doc__)
    parser.add_argument("--kokoro", type=Path, required=True, help="Kokoro-82M's ONNX file")
    parser.add_argument("--vocabulary", type=Path, help="default: vocab.json beside the ONNX file")
    parser.add_argument("--voices", type=Path, required=True, help="voices.npz with the style vectors")
    parser.add_argument(
        "--index", type=Path, action="append", required=True, help="a folder whose index lists utterances"
    )
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    if lacking := [folder for folder in args.index if not (folder / "index.jsonl").is_file()]:
        parser.error(f"{lacking[0]} has no index.jsonl: name a folder that lab.speech.kokoro wrote")
    vocabulary = args.vocabulary or args.kokoro.parent / "vocab.json"
    predictor = DurationPredictor(args.kokoro, vocabulary, args.voices, args.kokoro.parent / "durations.onnx")
    speakers, found = read_speakers(_HERE / "speakers.json"), read_durations(args.out)
    listed = {number for folder in args.index for number in read_index(folder)} - found.keys()
    items = [item for item in read_plan(_HERE / "plan.tsv") if item.number in listed]
    failed = 0
    for done, item in enumerate(items, 1):
        if (one := predictor.durations(item, speakers[item.speaker])) is None:
            failed += 1
        else:
            found[item.number] = one
        if found and (done % 500 == 0 or done == len(items)):  # an interruption loses no more than that
            write_durations(args.out, found)
            print(f"{done}/{len(items)}, words not found in {failed}", flush=True)


if __name__ == "__main__":
    main()
