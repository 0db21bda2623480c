"""A voice's codes from its rows: which table rows, one from each codebook, were added up?

A row is the float32 sum of one embedding-table row per codebook, rounded once to bf16. At the release's sizes
(dim 3072, 36 acoustic codebooks of 21 levels) the differences between acoustic rows span few enough
dimensions that the semantic row shows in the others. At the lab's (dim 256) they span them all, and finding
the 37 terms is decoding a sparse superposition code (Barron and Joseph, arXiv 1006.3780). One method does
both: every codebook is judged while the other 36, as far as they are unknown, count as Gaussian noise of
known covariance (linear-MMSE soft interference cancellation; Wang and Poor 1999), and what that teaches
sharpens the next round. Two or three rounds are enough.

A row whose found terms add up to within half a unit in the last place of bf16 in *every* dimension is marked
exact: a wrong term misses by a hundred times that in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from revox.checkpoint.errors import CheckpointError, VoiceError
from revox.checkpoint.release import EMBEDDING_TABLE
from revox.checkpoint.tensors import folder_tensors, open_weights
from revox.model.config import EMPTY_AUDIO_ID, END_AUDIO_ID, N_SPECIAL_CODES, VoxtralConfig

ROUNDS = 24
NOISE_SCALES = (1.0, 100.0)
SETTLED_ROUNDS = 3
SEARCH_MOVES = 12
PAIR_CANDIDATES = 192
PRIOR_NATS = 60.0


@dataclass(frozen=True)
class RecoveredCodes:
    """What `recover_codes` found.

    codes: `[n_codebooks, frames]` int64, counted from 0 (the special ids taken off).
    residual: `[frames]`, length of row minus the sum of the found table rows.
    rounding: `[frames]`, the length that bf16 rounding alone is expected to leave.
    exact: `[frames]` bool, the sum rounds to the row in every dimension.
    ended: whether the rows closed with the end frame (not part of `codes`).
    """

    codes: Tensor
    residual: Tensor
    rounding: Tensor
    exact: Tensor
    ended: bool

    def summary(self) -> str:
        """One line about how sure this is."""
        frames = self.codes.shape[1]
        if not frames:
            return "no frames"
        ratio = (self.residual / self.rounding.clamp_min(1e-30)).median().item()
        return (
            f"{int(self.exact.sum())} of {frames} frames explained exactly; "
            f"residual {self.residual.median().item():.2g}, {ratio:.2g} times the rounding of bf16 (medians)"
        )


def recover_codes(rows: Tensor, table: Tensor, config: VoxtralConfig) -> RecoveredCodes:
    """The codes behind a voice's rows.

    rows: `[N, dim]` bf16, the end frame included or not. table: `[audio_embedding_rows, dim]`, the
    checkpoint's `mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight`. Deterministic; 200 rows
    take under a second at the lab's sizes and some seconds at the release's. Raises VoiceError when the
    shapes do not fit together.
    """
    sizes = config.codebook_rows
    if rows.ndim != 2 or table.ndim != 2 or rows.shape[1] != table.shape[1] or table.shape[0] < sum(sizes):
        raise VoiceError(
            f"rows {list(rows.shape)} and embedding table {list(table.shape)} do not belong together: "
            f"expected [N, {config.backbone.dim}] and [{config.audio_embedding_rows}, {config.backbone.dim}]"
        )
    target = rows.detach().cpu().to(torch.float64)
    if not torch.isfinite(target).all():
        raise VoiceError(
            "the voice's rows hold values that are not numbers: the file is damaged, copy it again"
        )
    books = [book.detach().cpu().to(torch.float64) for book in table[: sum(sizes)].split(sizes)]

    end = books[0][END_AUDIO_ID] + torch.stack([book[EMPTY_AUDIO_ID] for book in books[1:]]).sum(0)
    ended = bool(len(target)) and bool(((target[-1] - end).abs() <= _tolerance(target[-1:])[0]).all())
    if ended:
        target = target[:-1]
    books = [book[N_SPECIAL_CODES:] for book in books]

    found = torch.zeros(len(target), len(books), dtype=torch.int64)
    error = torch.full((len(target),), torch.inf, dtype=torch.float64)
    exact = torch.zeros(len(target), dtype=torch.bool)
    for scale in NOISE_SCALES:
        left = (~exact).nonzero()[:, 0]
        if not len(left):
            break
        candidates = _cancel(target[left], books, scale)
        if scale == NOISE_SCALES[-1]:
            better = _residual(target[left], books, candidates) < error[left]
            candidates = torch.where(better[:, None], candidates, found[left])
            candidates = _local_search(target[left], books, candidates)
        residual = _residual(target[left], books, candidates)
        better = residual <= error[left]
        found[left[better]], error[left[better]] = candidates[better], residual[better]
        exact[left] = _exact(target[left], books, found[left])
    return RecoveredCodes(found.T.contiguous(), error.float(), _rounding(target).float(), exact, ended)


def read_table(folder: str | Path) -> Tensor:
    """The audio embedding table `[audio_embedding_rows, dim]` of a checkpoint, without loading anything else.

    Raises CheckpointError when no weight file of the folder has it.
    """
    tensors = folder_tensors(folder)
    if EMBEDDING_TABLE in tensors:
        with open_weights({EMBEDDING_TABLE: tensors[EMBEDDING_TABLE]}) as get:
            return get(EMBEDDING_TABLE)
    raise CheckpointError(f"{folder} has no tensor {EMBEDDING_TABLE}; copy or download the checkpoint again.")


def embedding_of_codes(codes: Tensor, table: Tensor, config: VoxtralConfig) -> Tensor:
    """A voice's rows `[frames + 1, dim]` bf16 from its codes `[n_codebooks, frames]`, the end frame appended.

    As `revox.model.embedding.Embeddings.voice_embedding`, for who has only the table.
    """
    return _sum_of_codes(codes, table, config).to(torch.bfloat16)


def is_sum_of_codes(embedding: Tensor, codes: Tensor, table: Tensor, config: VoxtralConfig) -> bool:
    """Whether `embedding` `[frames + 1, dim]` is what `codes` `[n_codebooks, frames]` sum to, up to the
    rounding to bf16: not so if the voice was tuned, mapped or mixed, or is of another table."""
    wanted = _sum_of_codes(codes, table, config)
    rows = embedding.float()
    return wanted.shape == rows.shape and bool(((rows - wanted).abs() <= _tolerance(rows)).all())


def _sum_of_codes(codes: Tensor, table: Tensor, config: VoxtralConfig) -> Tensor:
    offsets = torch.tensor((0, *config.codebook_rows[:-1])).cumsum(0)[:, None]
    end = torch.full_like(codes[:, :1], EMPTY_AUDIO_ID)
    end[0] = END_AUDIO_ID
    ids = torch.cat((codes + N_SPECIAL_CODES, end), dim=1)
    return table[ids + offsets].float().sum(0)


def _half_ulp(rows: Tensor) -> Tensor:
    """Half a unit in the last place of bf16 (8 bits of significand) at every entry."""
    return torch.exp2(torch.floor(torch.log2(rows.abs().clamp_min(2.0**-126))) - 8)


def _rounding(rows: Tensor) -> Tensor:
    """Expected length `[N]` of the rounding error: each entry is uniform over its unit in the last place."""
    return (_half_ulp(rows).square().sum(1) / 3).sqrt()


def _tolerance(rows: Tensor) -> Tensor:
    # The table's float32 sum was taken in an order that is not known: some float32 units beside the half ulp.
    return _half_ulp(rows) * (1 + 1e-6) + 4e-6 * rows.abs().amax(1, keepdim=True)


def _sum(books: Sequence[Tensor], codes: Tensor) -> Tensor:
    total = books[0][codes[:, 0]].clone()
    for k in range(1, len(books)):
        total += books[k][codes[:, k]]
    return total


def _residual(rows: Tensor, books: Sequence[Tensor], codes: Tensor) -> Tensor:
    return (rows - _sum(books, codes)).norm(dim=1)


def _exact(rows: Tensor, books: Sequence[Tensor], codes: Tensor) -> Tensor:
    return ((rows - _sum(books, codes)).abs() <= _tolerance(rows)).all(1)


def _cancel(rows: Tensor, books: Sequence[Tensor], noise_scale: float) -> Tensor:
    """Codes `[N, n_codebooks]` by soft interference cancellation; noise is relative to the rounding's."""
    full_rows, full_books = rows, books
    noise = float(_half_ulp(rows).square().mean() / 3) * noise_scale
    noise = max(noise, 1e-14 * float(rows.square().mean()), 1e-60)
    # Means out, so that covariances are small differences of small numbers.
    means = [book.mean(0) for book in books]
    rows = rows - torch.stack(means).sum(0)
    books = [book - mean for book, mean in zip(books, means, strict=True)]
    semantic, acoustic = books[0], torch.stack(list(books[1:]))
    n_acoustic, levels, dim = acoustic.shape
    prior = rows.new_zeros(len(rows), len(semantic))
    if n_acoustic * levels < dim:
        # Where no acoustic row reaches, only the semantic row and the rounding are left: a sure vote.
        basis = torch.linalg.qr(acoustic.reshape(-1, dim).T).Q
        rows_in, semantic_in = rows @ basis, semantic @ basis
        outside = torch.cdist(rows, semantic).square() - torch.cdist(rows_in, semantic_in).square()
        prior = -outside / (2 * noise)
        prior = prior - prior.amax(1, keepdim=True)
        rows, semantic, acoustic = rows_in, semantic_in, acoustic @ basis
        dim = basis.shape[1]
    candidates = (prior > -PRIOR_NATS).any(0).nonzero()[:, 0]
    prior, semantic = prior[:, candidates], semantic[candidates]

    found = torch.zeros(len(rows), 1 + n_acoustic, dtype=torch.int64)
    live = torch.arange(len(rows))
    p_semantic = torch.softmax(prior, 1)
    p_acoustic = rows.new_full((len(rows), n_acoustic, levels), 1 / levels)
    identity = torch.eye(dim, dtype=rows.dtype)
    settled = 0
    for step in range(ROUNDS):
        # Covariance of what each codebook adds, over the rows still open.
        mean_semantic = p_semantic @ semantic
        mean_acoustic = torch.einsum("nkl,kld->nkd", p_acoustic, acoustic)
        spread = torch.diag_embed(p_acoustic.mean(0))
        spread = spread - torch.einsum("nkl,nkm->klm", p_acoustic, p_acoustic) / len(live)
        of_semantic = (
            semantic * p_semantic.mean(0)[:, None]
        ).T @ semantic - mean_semantic.T @ mean_semantic / len(live)
        total = of_semantic + noise * identity
        of_acoustic = []
        for k in range(n_acoustic):
            of_acoustic.append(acoustic[k].T @ spread[k] @ acoustic[k])
            total = total + of_acoustic[k]
        surprise = rows[live] - mean_semantic - mean_acoustic.sum(1)

        new_acoustic = torch.empty_like(p_acoustic)
        for k in range(n_acoustic):
            logits = _logits(surprise + mean_acoustic[:, k], acoustic[k], total - of_acoustic[k], identity)
            new_acoustic[:, k] = torch.softmax(logits, 1)
        if len(candidates) > 1:
            logits = _logits(surprise + mean_semantic, semantic, total - of_semantic, identity)
            new_semantic = torch.softmax(logits + prior[live], 1)
        else:
            new_semantic = p_semantic

        likeliest = torch.cat((candidates[new_semantic.argmax(1)][:, None], new_acoustic.argmax(2)), 1)
        settled = settled + 1 if torch.equal(likeliest, found[live]) else 0
        found[live] = likeliest
        open_ = ~_exact(full_rows[live], full_books, likeliest)
        live = live[open_]
        if not len(live) or settled == SETTLED_ROUNDS or step == ROUNDS - 1:
            break
        # Damping: an over-confident wrong round can be taken back.
        p_semantic = (0.3 * p_semantic + 0.7 * new_semantic)[open_]
        p_acoustic = (0.3 * p_acoustic + 0.7 * new_acoustic)[open_]
    return found


def _logits(observed: Tensor, book: Tensor, covariance: Tensor, identity: Tensor) -> Tensor:
    """Log-likelihood `[N, size]` of each row of `book` under Gaussian noise, up to a constant."""
    jitter = 1e-12 * float(covariance.diagonal().max())
    for _ in range(6):
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter * identity)
        if not failed:
            break
        jitter *= 100
    whitened = torch.cholesky_solve(book.T, factor)
    return observed @ whitened - 0.5 * (book.T * whitened).sum(0)


def _local_search(rows: Tensor, books: Sequence[Tensor], codes: Tensor) -> Tensor:
    """Codes improved by changing one or two codebooks at a time for as long as that lowers the residual.

    The residual is weighed by the unit in the last place of each entry: small entries were rounded less.
    """
    options = torch.cat(list(books))
    book_of = torch.cat([torch.full((len(book),), k) for k, book in enumerate(books)])
    code_of = torch.cat([torch.arange(len(book)) for book in books])
    starts = torch.tensor([0, *[len(book) for book in books[:-1]]]).cumsum(0)
    codes = codes.clone()
    for n in range(len(rows)):
        weight = 1 / _half_ulp(rows[n : n + 1])[0].clamp_min(1e-3 * float(_half_ulp(rows[n : n + 1]).max()))
        rest = (rows[n] - _sum(books, codes[n : n + 1])[0]) * weight
        for _ in range(SEARCH_MOVES):
            change = (options - options[starts + codes[n]][book_of]) * weight
            gain = change.square().sum(1) - 2 * change @ rest
            few = gain.topk(min(PAIR_CANDIDATES, len(gain)), largest=False).indices
            pairs = gain[few][:, None] + gain[few][None] + 2 * change[few] @ change[few].T
            pairs[book_of[few][:, None] == book_of[few][None]] = torch.inf
            single, pair = int(gain.argmin()), int(pairs.argmin())
            if min(float(gain[single]), float(pairs.flatten()[pair])) >= -1e-9 * float(rest.square().sum()):
                break
            if gain[single] <= pairs.flatten()[pair]:
                moves = [single]
            else:
                moves = [int(few[pair // len(few)]), int(few[pair % len(few)])]
            for option in moves:
                codes[n, book_of[option]] = code_of[option]
                rest = rest - change[option]
    return codes
