"""Configuration keys as values of a type."""

from __future__ import annotations

import math
from typing import Any

from engine.errors import ConfigError


class Values:
    """Typed access to configuration keys; every complaint names the key."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def known(self, names: tuple[str, ...]) -> str:
        """The one of several names for a key that the configuration has; else the first."""
        there = [name for name in names if name in self.raw]
        said = (name for name in there if self.raw[name] is not None)
        return next(said, (*there, names[0])[0])

    def text(self, key: str) -> str:
        value = self.raw.get(key)
        if not isinstance(value, str):
            raise ConfigError(f"the model's configuration lacks {key!r}")
        return value

    def integer(self, key: str, default: int | None = None, *, most: int = 1 << 31) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"the model's configuration has {key} = {value!r}, not a count")
        if value > most:
            raise ConfigError(f"the model's configuration has {key} = {value}, above {most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"the model's configuration has {key} = {value!r}, not above zero")
        return float(value)
