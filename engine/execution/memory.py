"""How many tokens of KV cache there is room for."""

from __future__ import annotations

from pathlib import Path

from engine.config import CacheSection
from engine.errors import ConfigError
from kernels.backend import CacheLayout

MEMORY_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory() -> int | None:
    """Bytes of memory that can still be used here: free memory, or less under a cgroup limit.

    None where the system does not say.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for name in MEMORY_FILES:
        limit = Path(name)
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            available = min(available, int(text))
    return available


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
