"""Which part of a model one of several ranks holds (tensor parallelism as in Megatron-LM,
arXiv 1909.08053).

Attention is split by key/value heads with the query heads that share them, or, where there are
more ranks than those, by query heads whose key/value head several ranks then hold. Feed-forward
layers are split by width, tables and output heads by vocabulary. Nothing has to divide evenly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from engine.errors import ConfigError
from kernels.ops import DeltaHeads, Heads


@dataclass(frozen=True)
class Span:
    """Part of a dimension: `length` of it from `start` on."""

    start: int
    length: int

    def times(self, size: int) -> Span:
        """The same part, counted in things of which `size` make one."""
        return Span(self.start * size, self.length * size)


@dataclass(frozen=True)
class HeadSpan:
    """One rank's attention heads."""

    query: Span
    kv: Span

    def of(self, heads: Heads) -> Heads:
        """They alone."""
        return replace(heads, query=self.query.length, kv=self.kv.length)


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1

    def spans(self, total: int, unit: int = 1) -> list[Span] | None:
        """Every rank's part of a dimension, cut at multiples of `unit`; None if some would get
        nothing."""
        units = -(-total // unit)
        cuts = [min(total, units * r // self.ranks * unit) for r in range(self.ranks + 1)]
        spans = [Span(a, b - a) for a, b in pairwise(cuts)]
        return spans if all(span.length for span in spans) else None

    def own_heads(self, heads: Heads) -> Heads:
        """This rank's attention heads."""
        return self.head_spans(heads)[self.rank].of(heads)

    def own_delta(self, heads: DeltaHeads) -> DeltaHeads:
        """This rank's heads of delta nets, shared out by key heads, or channels of short
        convolutions."""
        shared = heads.key or heads.value
        spans = self.spans(shared)
        if spans is None:
            raise ConfigError(f"layers that keep states have {shared} heads for {self.ranks} ranks")
        own = spans[self.rank].length
        return replace(heads, key=own if heads.key else 0, value=own * (heads.value // shared))

    def head_spans(self, heads: Heads) -> list[HeadSpan]:
        """Every rank's heads. Raises ConfigError if there are fewer than ranks."""
        share = heads.query // heads.kv
        groups = self.spans(heads.kv)
        if groups is not None:
            return [HeadSpan(kv.times(share), kv) for kv in groups]
        spans = []
        for head in range(heads.kv):
            # The ranks that hold this head, and their query heads.
            mine = [r for r in range(self.ranks) if r * heads.kv // self.ranks == head]
            parts = Shard(0, len(mine)).spans(share)
            if parts is None:
                raise ConfigError(
                    f"{heads.query} attention heads over {heads.kv} key/value heads cannot be "
                    f"split among {self.ranks} ranks; use fewer"
                )
            spans += [
                HeadSpan(Span(head * share + p.start, p.length), Span(head, 1)) for p in parts
            ]
        return spans
