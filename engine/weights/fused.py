"""Projections that a file holds in one tensor, as Phi's, under the names that they have apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.weights.views import Renamed
from kernels.backend import HostTensor

QKV, GATE_UP = "qkv_proj", "gate_up_proj"


@dataclass(frozen=True)
class Part:
    """Which rows of the tensor `whole`: shares [first, first + length) of `total`."""

    whole: str
    first: int
    length: int
    total: int


class FusedTensors:
    """The parts of a file's stacked tensors."""

    def __init__(self, names: Iterable[str], config: dict[str, Any]) -> None:
        self._parts: dict[str, Part] = {}
        self._wholes: set[str] = set()
        for name in names:
            module, _, kind = name.rpartition(".")
            block, _, projection = module.rpartition(".")
            if kind not in ("weight", "bias") or projection not in (QKV, GATE_UP):
                continue
            self._wholes.add(name)
            shares = _shares(projection, config)
            first, total = 0, sum(shares.values())
            for part, length in shares.items():
                self._parts[f"{block}.{part}.{kind}"] = Part(name, first, length, total)
                first += length

    def names(self, names: Iterable[str]) -> set[str]:
        """A file's names, with those of parts in place of those of wholes."""
        return (set(names) - self._wholes) | set(self._parts)

    def tensor(self, name: str, open_tensor: Callable[[str], HostTensor]) -> HostTensor | None:
        """A part by its name, if it is one, of what `open_tensor` gives. Raises ConfigError if
        there are not so many rows."""
        part = self._parts.get(name)
        if part is None:
            return None
        whole = open_tensor(part.whole)
        if whole.shape[0] % part.total:
            raise ConfigError(
                f"tensor {part.whole!r} has {whole.shape[0]} rows, which cannot be shared out "
                f"to {part.total}"
            )
        unit = whole.shape[0] // part.total
        return Renamed(whole.narrow(0, part.first * unit, part.length * unit), name)


def _shares(projection: str, config: dict[str, Any]) -> dict[str, int]:
    if projection == GATE_UP:
        return {"gate_proj": 1, "up_proj": 1}
    query = config.get("num_attention_heads")
    kv = config.get("num_key_value_heads") or query
    if not isinstance(query, int) or not isinstance(kv, int) or query < 1 or kv < 1:
        raise ConfigError(f"the model's configuration has {query!r} and {kv!r} attention heads")
    return {"q_proj": query, "k_proj": kv, "v_proj": kv}
