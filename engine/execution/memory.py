"""How many tokens of KV cache there is room for."""

from __future__ import annotations

from pathlib import Path

from engine.config import CacheSection
from engine.errors import ConfigError
from kernels.backend import CacheLayout

# Limit and usage of the control group, in version 2 and version 1.
MEMORY_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_memory() -> int | None:
    """Bytes of memory that can still be used here: free memory, or less under a cgroup limit.

    None where the system does not say.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, usage in MEMORY_FILES:
        bound, used = _number(Path(limit)), _number(Path(usage))
        if bound is not None:
            available = min(available, max(0, bound - (used or 0)))
    return available


def _number(file: Path) -> int | None:
    """A file's number; None if there is no such file, or it says `max`."""
    if not file.exists():
        return None
    text = file.read_text().strip()
    return int(text) if text.isdigit() else None


def cache_pages(
    section: CacheSection, layout: CacheLayout, max_context: int, max_running: int
) -> int:
    """Pages of the pool: as configured, or a fraction of the free memory, and no more than every
    slot at full context could use. Raises ConfigError if not even one page fits."""
    if section.tokens:
        return -(-section.tokens // section.page_size)
    budget = int((available_memory() or 4 << 30) * section.memory_fraction)
    pages = min(budget // layout.bytes_per_page, max_running * -(-max_context // section.page_size))
    if pages < 1:
        raise ConfigError(
            f"cache.memory_fraction leaves {budget} bytes for the KV cache, "
            f"but one page needs {layout.bytes_per_page}; free memory or raise the fraction"
        )
    return pages
