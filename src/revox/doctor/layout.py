"""Are the backbone's query and key rows in the layout of Mistral's files, as revox (and vllm-omni) read them?

RoPE rotates pairs of a head's rows. Mistral's files pair rows 2i and 2i+1; Hugging Face's pair i and
i + head_dim/2, and conversion permutes the rows of wq and wk. A model that is read in the wrong layout has
wrong positions: it runs, and babbles. Two signs, which must agree:

1. In the weights. The two rows of a pair share one frequency, so their norms are correlated; those of
   different frequencies are not.
2. In the output. With right positions the speech follows its text: given another text it is less likely
   (`text_dependence`). How *certain* the model is does not help: a confused model repeats itself with great
   certainty.

The acoustic transformer has no positions: permuting its heads changes nothing, and it is not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from revox.doctor.checkpoint_under_test import CheckpointUnderTest
from revox.doctor.findings import CheckResult, Figure, Verdict
from revox.doctor.text_checks import text_dependence
from revox.model.backbone import Backbone

SIGN = 0.15
"""Least difference of pair likeness that counts. The small lab model has 0.3 and more for each layout."""
LEAST_GAIN = 0.05
"""Least gain of text dependence in nats a frame that counts."""


def interleaved_order(n_heads: int, head_dim: int) -> Tensor:
    """Where each row of Mistral's layout is found in Hugging Face's: `[n_heads * head_dim]`.

    `hugging_face_rows[interleaved_order(...)]` are in Mistral's layout.
    """
    return torch.arange(n_heads * head_dim).view(n_heads, 2, head_dim // 2).transpose(1, 2).flatten()


def pair_likeness(weight: Tensor, head_dim: int) -> tuple[float, float]:
    """Correlation of the log norms of paired rows of wq or wk `[heads * head_dim, dim]`.

    Under Mistral's pairing (2i, 2i+1) and Hugging Face's (i, i + head_dim/2), each head's mean taken off.
    """
    norms = weight.float().norm(dim=1).clamp_min(1e-12).log().view(-1, head_dim)
    norms = norms - norms.mean(1, keepdim=True)
    half = head_dim // 2
    return _correlation(norms[:, 0::2], norms[:, 1::2]), _correlation(norms[:, :half], norms[:, half:])


def layout_sign(backbone: Backbone) -> tuple[float, float]:
    """How well the weights fit Mistral's layout and Hugging Face's: each about 0.2 to 1 if right, 0 if wrong.

    In the right layout paired rows are alike and rows half a head apart are not; in the other one, neighbors
    still have similar frequencies, so the correlation of the far rows is subtracted.
    """
    head_dim, signs = backbone.config.head_dim, []
    for layer in backbone.layers:
        for weight in (getattr(layer.attention, name).weight for name in ("wq", "wk")):
            near, far = pair_likeness(weight, head_dim)
            turned = weight[interleaved_order(len(weight) // head_dim, head_dim).to(weight.device)]
            near_turned, far_turned = pair_likeness(turned, head_dim)
            signs.append((near - far, near_turned - far_turned))
    mean = torch.tensor(signs).mean(0)
    return float(mean[0]), float(mean[1])


@contextmanager
def read_as_hugging_face(backbone: Backbone) -> Iterator[None]:
    """Inside the context, wq and wk are permuted from Hugging Face's layout to Mistral's."""
    config = backbone.config
    heads = (("wq", config.n_heads), ("wk", config.n_kv_heads))

    def turn(back: bool) -> None:
        for layer in backbone.layers:
            for name, count in heads:
                order = interleaved_order(count, config.head_dim)
                parameter = getattr(layer.attention, name).weight
                parameter.data = parameter.data[(order.argsort() if back else order).to(parameter.device)]

    turn(back=False)
    try:
        yield
    finally:
        turn(back=True)


def query_key_layout(subject: CheckpointUnderTest) -> CheckResult:
    """The two signs for the rows as they are stored, and read as Hugging Face's."""
    backbone = subject.model.model.backbone
    stored_sign, turned_sign = layout_sign(backbone)
    stored = subject.text_dependence or text_dependence(subject)
    figures = [
        Figure("pairs alike, as Mistral's", stored_sign, f"above the other by {SIGN:g}"),
        Figure("pairs alike, as Hugging Face's", turned_sign),
        Figure("text dependence, as Mistral's", stored.difference, "above the other"),
    ]
    if subject.quick and stored_sign > turned_sign + SIGN and stored.difference > 2 * max(stored.error, 0.02):
        return CheckResult(Verdict.PASS, "The rows are in Mistral's layout.", figures)
    with read_as_hugging_face(backbone):
        turned = text_dependence(subject)
    figures += [
        Figure("text dependence, as Hugging Face's", turned.difference),
        Figure("frames a sentence, as Mistral's", stored.frames),
        Figure("frames a sentence, as Hugging Face's", turned.frames),
    ]
    by_weights = turned_sign - stored_sign
    by_speech = turned.difference - stored.difference
    clearly = by_weights > SIGN and by_speech > -LEAST_GAIN
    if clearly or (by_weights > 0 and by_speech > max(LEAST_GAIN, stored.difference)):
        sentence = (
            "The q/k rows of the backbone are in Hugging Face's layout: read so, paired rows are alike "
            f"({turned_sign:.2f} against {stored_sign:.2f}) and the speech follows its text better "
            f"({turned.difference:.2f} against {stored.difference:.2f} nats a frame). Convert them back "
            "(permute the rows of wq and wk of every layer), or use the weights as Mistral released them."
        )
        return CheckResult(Verdict.FAIL, sentence, figures)
    if by_weights > 0 and by_speech > 0:
        sentence = "Both signs point to Hugging Face's layout, neither clearly; compare the speech by ear."
        return CheckResult(Verdict.WARN, sentence, figures)
    if by_speech < -max(LEAST_GAIN, 2 * (stored.error + turned.error)):
        sentence = "The rows are in Mistral's layout: in the other, the speech does not follow its text."
        return CheckResult(Verdict.PASS, sentence, figures)
    if by_weights > SIGN or by_speech > max(LEAST_GAIN, 2 * (stored.error + turned.error)):
        sentence = "The two signs disagree about the layout of the q/k rows; compare the speech by ear."
        return CheckResult(Verdict.WARN, sentence, figures)
    return CheckResult(Verdict.PASS, "The rows are in Mistral's layout.", figures)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].nan_to_num())
