"""Semantic codes that an encoder finds likely and the language model too: a beam over its best few.

An encoder is often unsure between a few codes, of which one is right, and the language model knows which of
them says the words of the clip. A path of codes c_1..c_F has the score

    sum_f log q(c_f) + weight * log p(c_f | text, voice, c_1..c_f-1)

with q the encoder's posterior and p the language model, which reads the posterior's own voice, and each past
frame with the posterior's acoustic codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revox.coding.regularizers import Posterior
from revox.metrics.likelihood import Continuations
from revox.model.voxtral import Voxtral
from revox.synthesis.prompt import Prompter

CHOICES = 5
"""Codes of each frame that are tried: those of the original encoder on decoded sound hold the right one in
94 % of the frames."""
WEIGHT = 0.5


@torch.no_grad()
def beam_search(
    model: Voxtral,
    prompter: Prompter,
    text: str,
    posterior: Posterior,
    beam: int,
    *,
    weight: float = WEIGHT,
) -> Tensor:
    """Codes `[37, frames]`, on the CPU, of the best path that a beam of so many paths finds.

    Acoustic codes are the posterior's. `text` is what the clip says.
    """
    codes = posterior.codes(model.config.codec.acoustic_codebook_size).to(model.device)
    voice = model.mm_audio_embeddings.voice_embedding(codes)
    tokens = torch.tensor(prompter.tokens(text, len(voice)), device=model.device)
    prompt = model.embed_prompt(tokens, prompter.audio_token, voice)
    likeliest = posterior.log_probabilities.to(model.device).topk(CHOICES, dim=1)
    continuations = Continuations(model, prompt, codes.shape[1])
    totals = torch.zeros(1, device=model.device)
    paths = torch.zeros((1, 0), dtype=torch.long, device=model.device)
    for frame, (costs, choices) in enumerate(zip(*likeliest, strict=True)):
        scores = totals[:, None] + costs + weight * continuations.scores[:, choices].float()
        totals, best = scores.flatten().topk(min(beam, scores.numel()))
        parents, chosen = best // CHOICES, choices[best % CHOICES]
        paths = torch.cat((paths[parents], chosen[:, None]), dim=1)
        acoustic = codes[1:, frame].expand(len(chosen), -1)
        continuations.extend(parents, torch.cat((chosen[:, None], acoustic), dim=1))
    return torch.cat((paths[totals.argmax()][None], codes[1:])).cpu()
