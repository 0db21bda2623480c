"""Checks of the files on disk: the inventory, the tokenizer, and whether the weights were ever trained."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from revox.checkpoint.inspect import inspect
from revox.checkpoint.params import read_json
from revox.checkpoint.release import ENCODER_PREFIXES, PRESETS, TEXT_TABLE
from revox.checkpoint.tensors import open_tensors, read_header, weight_files
from revox.doctor.checkpoint_under_test import CheckpointUnderTest
from revox.doctor.findings import CheckResult, Figure, Value, Verdict

LARGE_VOCABULARY = 16384
CHANCE = 2
"""So many of the codec's hundred matrices may look random by chance."""
_BLOCK = 512  # rows and columns of a matrix that are checked: enough to distinguish trained from random


def inventory(subject: CheckpointUnderTest) -> CheckResult:
    """Files, tensors and voices against what params.json asks for, from headers."""
    report = inspect(subject.folder)
    core = [part for part in report.components if part.name != "codec_encoder"]
    found, expected = sum(c.found for c in core), sum(c.expected for c in core)
    encoder = report.component("codec_encoder")
    figures = [
        Figure("tensors", found, str(expected)),
        Figure("parameters, millions", round(report.parameters / 1e6, 2)),
        Figure("encoder tensors", encoder.found, f"0 or {encoder.expected}"),
        Figure("voices", sum(v.rows is not None and v.rows == v.tekken_rows for v in report.voices)),
        Figure("unknown tensors", len(report.unknown), "0"),
        Figure("sizes", "the release's" if subject.is_release_sized else "another model's of the same kind"),
    ]
    rows: list[dict[str, Value]] = [
        {"component": c.name, "found": c.found, "expected": c.expected, "missing": ", ".join(c.missing[:4])}
        for c in report.components
    ]
    exchanged = exchanged_voices(subject, {v.name: (v.rows, v.tekken_rows) for v in report.voices})
    missing = [f"{c.name}: {', '.join(c.missing[:6])}" for c in core if c.missing]
    if exchanged:
        sentence = (
            f"The voices {exchanged[0]} and {exchanged[1]} are swapped: each file has the other's number of "
            "frames in tekken.json or in the release. Rename them back, or copy both again."
        )
        return CheckResult(Verdict.FAIL, sentence, figures, rows)
    if report.unreadable:
        return CheckResult(Verdict.FAIL, report.unreadable, figures, rows)
    if missing:
        is_half = any(m.startswith(("codec_decoder", "quantizer")) for m in missing)
        names = f"{'half-loaded codec: ' if is_half else ''}{'; '.join(missing)}"
        sentence = f"Tensors are missing ({names}). Copy or download the weights again."
        return CheckResult(Verdict.FAIL, sentence, figures, rows)
    if report.problems:
        return CheckResult(Verdict.FAIL, " ".join(report.problems[:3]), figures, rows)
    if report.notes:
        return CheckResult(Verdict.WARN, " ".join(report.notes[:3]), figures, rows)
    return CheckResult(Verdict.PASS, "Every file and tensor is there.", figures, rows)


def exchanged_voices(
    subject: CheckpointUnderTest, voices: dict[str, tuple[int | None, int | None]]
) -> tuple[str, str] | None:
    """Two voices of which each has the other's number of frames, by tekken.json or by the release."""
    expected = {name: rows for name, (_, rows) in voices.items() if rows is not None}
    for known in (expected, PRESETS if subject.is_release_sized else {}):
        wrong = [n for n, (rows, _) in voices.items() if n in known and rows is not None and rows != known[n]]
        pairs = [
            (a, b)
            for i, a in enumerate(wrong)
            for b in wrong[i + 1 :]
            if voices[a][0] == known[b] and voices[b][0] == known[a]
        ]
        if len(pairs) == 1:
            return pairs[0]
    return None


def tokenizer(subject: CheckpointUnderTest) -> CheckResult:
    """Is tekken.json the tokenizer that this model was trained with?

    Its special tokens' ids and its size against params.json; and whether the embeddings of one word's
    spellings ("the", " the", "The") are alike, as they are in any trained table.
    """
    from revox.synthesis.prompt import Prompter

    data = read_json(subject.folder / "tekken.json")
    config, audio = data.get("config") or {}, subject.params.multimodal.audio_model_args
    size, vocabulary = int(config.get("default_vocab_size") or 0), subject.params.vocab_size
    figures = [Figure("tokens", size, str(vocabulary))]
    wrong = []
    if size > vocabulary:
        wrong.append(f"it has {size} tokens and the model's table {vocabulary} rows")
    elif size < 0.98 * vocabulary:
        wrong.append(f"it has only {size} tokens for the model's table of {vocabulary} rows")
    ids = _special_ids(data)
    # mistral-common must be able to read it; else its sentence is the finding.
    ids["[AUDIO]"] = Prompter(subject.folder).audio_token
    for token, wanted in (
        ("[AUDIO]", audio.audio_token_id),
        ("[BEGIN_AUDIO]", audio.begin_audio_token_id),
        ("<s>", subject.params.multimodal.bos_token_id),
    ):
        if token in ids:
            figures.append(Figure(f"id of {token}", ids[token], str(wanted)))
            if ids[token] != wanted:
                wrong.append(f"{token} is {ids[token]} and params.json says {wanted}")
    alike, random, error, structured = spelling_likeness(data, subject.tensor(TEXT_TABLE))
    expected = "clearly above that of random pairs, in a large trained table"
    figures += [
        Figure("likeness of one word's spellings", alike, expected),
        Figure("likeness of random pairs", random, "about 0"),
        Figure("table has structure", structured, "yes in a large trained model"),
    ]
    # A small table may have learned each word in one spelling only.
    large = structured and vocabulary >= LARGE_VOCABULARY
    if large and alike is not None and random is not None and error is not None:
        if alike - random < 3 * error:
            wrong.append("spellings of one word are no more alike than any two tokens")
        elif alike - random < 0.05:
            sentence = "Ids and sizes agree, but spellings of one word are hardly alike in the text table."
            return CheckResult(Verdict.WARN, sentence, figures)
    if wrong:
        sentence = (
            f"tekken.json is the wrong tokenizer for these weights: {'; '.join(wrong)}. Use the tekken.json "
            "that was released with the weights."
        )
        return CheckResult(Verdict.FAIL, sentence, figures)
    if size < vocabulary:
        sentence = f"The tokenizer has {vocabulary - size} tokens fewer than the model's table has rows."
        return CheckResult(Verdict.WARN, sentence, figures)
    sentence = "Ids and sizes agree with the model" + (
        ", and spellings of one word are alike." if large and alike is not None else "."
    )
    return CheckResult(Verdict.PASS, sentence, figures)


def _special_ids(data: dict[str, Any]) -> dict[str, int]:
    listed = data.get("special_tokens")
    if isinstance(listed, list):
        return {str(t.get("token_str")): int(t.get("rank", -1)) for t in listed if isinstance(t, dict)}
    return {}


def spelling_likeness(
    tekken: dict[str, Any], table: Tensor | None, most: int = 4000
) -> tuple[float | None, float | None, float | None, bool]:
    """Are spellings of one word neighbors in the text table `[vocabulary, dim]`?

    Gives the mean cosine of such pairs (" word", "word", "Word"; the table's mean subtracted), that of the
    same tokens paired at random, the standard error of their difference, and whether the table has
    structure at all (an untrained table has none, and then nothing follows). None without pairs.
    """
    if table is None:
        return None, None, None, False
    config = tekken.get("config") or {}
    offset, size = int(config.get("default_num_special_tokens") or 0), len(table)
    ids: dict[bytes, int] = {}
    for entry in tekken.get("vocab") or []:
        at = int(entry["rank"]) + offset
        if at < size:
            ids[base64.b64decode(entry["token_bytes"])] = at
    pairs = []
    for piece, at in ids.items():
        bare = piece.strip()
        if len(bare) < 3 or not bare.isalpha():
            continue
        for other in (b" " + piece, bare.capitalize(), b" " + bare.capitalize()):
            if other != piece and other in ids:
                pairs.append((at, ids[other]))
    if len(pairs) < 30:
        return None, None, None, False
    step = max(1, len(pairs) // most)
    first, second = torch.tensor(pairs[::step]).T
    used = torch.cat((first, second)).unique()
    mean = table[used].float().mean(0)
    a, b = table[first].float() - mean, table[second].float() - mean
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
    alike = torch.cosine_similarity(a, b, dim=1)
    random = torch.cosine_similarity(a, b[order], dim=1)
    error = float((alike.var() / len(alike) + random.var() / len(random)).sqrt())
    structured = abs(noise_likeness(table[used])[0] - 1) > 0.15
    return float(alike.mean()), float(random.mean()), error, structured


def weights(subject: CheckpointUnderTest) -> CheckResult:
    """Tensors that are zero, constant, or still at their random initialization."""
    stuck: list[str] = []
    noise: list[str] = []
    broken: list[str] = []
    scales: dict[str, bool] = {}
    count = encoder_matrices = 0
    for tensor_name, tensor in _blocks(subject):
        count += 1
        if not bool(tensor.isfinite().all()):
            broken.append(tensor_name)
            continue
        constant = tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
        if tensor_name.endswith(("attention_scale", "ffn_scale")):
            scales[tensor_name] = constant
        elif constant and (tensor.dim() > 1 or float(tensor.flatten()[0]) == 0.0):
            stuck.append(tensor_name)
        elif tensor.dim() > 1 and min(tensor.shape) >= 32:
            encoder_matrices += tensor_name.startswith(ENCODER_PREFIXES)
            if _is_noise(tensor):
                noise.append(tensor_name)
    left = [n for n, constant in scales.items() if constant]
    codec = [n for n in (*broken, *stuck, *noise, *left) if n.startswith("audio_tokenizer.")]
    subject.suspects = [n for n in codec if not n.startswith(ENCODER_PREFIXES)]
    figures = (
        Figure("tensors checked", count),
        Figure("with values that are not numbers", len(broken), "0"),
        Figure("all zero or constant", len(stuck), "0"),
        Figure("LayerScale all one value", len(left), "0"),
        Figure("matrices like fresh random numbers", len(noise), "0 in a trained model (tables excepted)"),
    )
    rows: tuple[dict[str, Value], ...] = tuple(
        {"tensor": n, "what": what}
        for what, names in (
            ("not numbers", broken),
            ("zero or constant", stuck),
            ("LayerScale all one value", left),
            ("like fresh random numbers", noise),
        )
        for n in names[:12]
    )
    dead = [*broken, *stuck, *(left if len(left) < len(scales) or stuck else [])]
    fresh = [n for n in noise if n.startswith("audio_tokenizer.") and "quantizer" not in n]
    # An encoder may have learned for minutes only.
    young = [n for n in fresh if n.startswith(ENCODER_PREFIXES)]
    if len(young) <= encoder_matrices / 2:
        fresh = [n for n in fresh if n not in young]
    if dead or len(fresh) > CHANCE:
        part = "The codec is half-loaded" if codec else "Part of the model was never loaded"
        sentence = (
            f"{part}: {len(dead) + len(fresh)} tensors are untrained ({_some([*dead, *fresh])}). "
            "Copy or download the weights again."
        )
        return CheckResult(Verdict.FAIL, sentence, figures, rows)
    if len(young) > CHANCE:
        sentence = (
            f"The encoder is hardly trained: {len(young)} of its {encoder_matrices} matrices are like fresh "
            f"random numbers ({_some(young)}). Train it longer; the rest of the model is whole."
        )
        return CheckResult(Verdict.WARN, sentence, figures, rows)
    matrices = [n for n in noise if n != TEXT_TABLE]
    if matrices or left:
        sentence = f"Some tensors look hardly trained ({_some([*matrices, *left])}); listen to the speech."
        return CheckResult(Verdict.WARN, sentence, figures, rows)
    sentence = "No tensor is zero, constant or untrained."
    if noise:
        sentence = "No tensor of the network is zero, constant or untrained; the text table is nearly random."
    return CheckResult(Verdict.PASS, sentence, figures, rows)


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _blocks(subject: CheckpointUnderTest) -> Iterator[tuple[str, Tensor]]:
    """Every tensor's name and a block of it, float32: whole vectors, up to 512 x 512 of a matrix."""
    for path in weight_files(subject.folder):
        header = read_header(path)
        with open_tensors(path) as file:
            for i, name in enumerate(sorted(header)):
                if i % 40 == 0:
                    subject.update(f"{i} of {len(header)} tensors")
                if not header[name].dtype.startswith(("BF", "F")):
                    continue
                part = file.get_slice(name)[:_BLOCK].float()
                if part.dim() > 1:
                    part = part.flatten(1)[:, :_BLOCK]
                yield name, part


def noise_likeness(matrix: Tensor) -> tuple[float, float, float]:
    """How far a matrix is from independent random entries, for which all three are 1.

    The largest singular value over the Marchenko-Pastur edge, and the spread of row norms and of column
    norms over that of independent entries of the same kurtosis. Training adds directions and makes some rows
    and columns larger than others.
    """
    x = matrix[:_BLOCK, :_BLOCK].float()
    x = x - x.mean()
    deviation = float(x.std())
    if deviation == 0.0:
        return 0.0, 0.0, 0.0
    rows, columns = x.shape
    edge = deviation * (math.sqrt(rows) + math.sqrt(columns))
    tail = float(x.pow(4).mean()) / deviation**4 - 1

    def spread(norms: Tensor, entries: int) -> float:
        return float(norms.std() / norms.mean()) / math.sqrt(max(tail, 0.1) / (4 * entries))

    largest = float(torch.linalg.matrix_norm(x, 2))
    return largest / edge, spread(x.norm(dim=1), columns), spread(x.norm(dim=0), rows)


def _is_noise(matrix: Tensor) -> bool:
    edge, rows, columns = noise_likeness(matrix)
    # A few per cent each way is chance at these sizes: about 1 + 0.7 n^(-2/3) for the edge, 1 +- 1/sqrt(2n)
    # for the spreads.
    slack = 3 / math.sqrt(2 * min(matrix.shape))
    return 0.93 < edge < 1.06 and abs(rows - 1) < slack and abs(columns - 1) < slack
