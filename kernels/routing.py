"""Which experts a row goes through, in plain torch."""

from __future__ import annotations

import torch

from kernels.ops import Experts


def route(
    scores: torch.Tensor,
    experts: Experts,
    preference: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's experts and their shares, int64 and fp32 `[rows, places]`, the likeliest first."""
    scores = scores.float()
    scores, gates = scores[:, : experts.count], scores[:, experts.count :]
    likely = scores.sigmoid() if experts.sigmoid else scores.softmax(-1)
    liked = likely if preference is None else likely + preference
    if experts.groups > 1:
        groups = liked.view(len(liked), experts.groups, experts.count // experts.groups)
        worth = groups.topk(2 if experts.sigmoid else 1).values.sum(-1)
        best = worth.sort(dim=-1, descending=True, stable=True).indices[:, : experts.kept]
        lost = torch.ones_like(worth, dtype=torch.bool).scatter(1, best, False)
        liked = groups.masked_fill(lost[..., None], float("-inf")).flatten(1)
    chosen = liked.sort(dim=-1, descending=True, stable=True).indices[:, : experts.used]
    shares = likely.gather(1, chosen)
    if experts.normalized:
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-20)
    if factors is not None:
        shares = shares * factors[chosen]
    always = torch.arange(experts.count, experts.total, device=scores.device)
    always = always.expand(len(scores), -1)
    whole = gates.sigmoid() if experts.gated else torch.ones_like(always, dtype=shares.dtype)
    return torch.cat((chosen, always), 1), torch.cat((shares * experts.scale, whole), 1)
