"""Ryzanstein's engine: an asyncio streaming engine with continuous batching.

    from engine import AsyncEngine, SamplingParams

The names below are the public API.
"""

from __future__ import annotations

from pathlib import Path

import kernels

if Path(kernels.__file__ or "").resolve().parents[1] != Path(__file__).resolve().parents[1]:
    raise ImportError(
        f"'kernels' was imported from {kernels.__file__}, which is not Ryzanstein's; another "
        "package has that name: uninstall it, or use a virtual environment of its own"
    )

from engine.config import Config, load_config
from engine.engine import AsyncEngine
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
