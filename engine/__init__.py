"""Ryzanstein's engine: an asyncio streaming engine with continuous batching.

    from engine import AsyncEngine, SamplingParams

The names below are the public API.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import kernels

if Path(kernels.__file__ or "").resolve().parents[1] != Path(__file__).resolve().parents[1]:
    raise ImportError(
        f"'kernels' was imported from {kernels.__file__}, which is not Ryzanstein's; another "
        "package has that name: uninstall it, or use a virtual environment of its own"
    )

from engine.config import Config, load_config
from engine.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineClosed,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    RyzansteinError,
)
from engine.scheduling.tenants import Tenant
from engine.streams import TokenStream
from engine.types import (
    Allowance,
    Decision,
    Delta,
    Grammar,
    QueueProgress,
    RequestStats,
    SamplingParams,
    StepStats,
    Terms,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from engine.engine import AsyncEngine


def __getattr__(name: str) -> Any:
    # With it comes torch, whose import takes two seconds: not for a command's help.
    if name == "AsyncEngine":
        from engine.engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Allowance",
    "AsyncEngine",
    "Config",
    "ConfigError",
    "DeadlineExceeded",
    "Decision",
    "Delta",
    "EngineClosed",
    "EngineFailed",
    "Grammar",
    "InvalidRequest",
    "Overloaded",
    "QueueProgress",
    "RequestStats",
    "RyzansteinError",
    "SamplingParams",
    "StepStats",
    "Tenant",
    "Terms",
    "TokenLogprob",
    "TokenStream",
    "Usage",
    "load_config",
]
