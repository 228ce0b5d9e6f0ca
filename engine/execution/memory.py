"""How many tokens of KV cache there is room for."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace

import msgspec

from engine.config import CacheSection, SchedulerSection
from engine.errors import ConfigError
from engine.scheduling.controller import Readings
from engine.scheduling.window_pages import least_window_pages, most_window_pages

# What the machine has, in bytes by their names.
MEMORY_TABLE = "/proc/meminfo"

# Limit, usage and statistics of the control group, in version 2 and version 1.
MEMORY_FILES = (
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)

# Pages for each window page where all layers see a window only.
NAMED = 16

# Stalls for memory, of the control group and of the machine (pressure stall information).
PRESSURE_FILES = ("/sys/fs/cgroup/memory.pressure", "/proc/pressure/memory")

# The system's files are read in one piece, for which all of them are short enough.
MOST_BYTES = 65536


def available_memory() -> int | None:
    """Bytes of memory that can still be used here: free memory, or less under a cgroup limit.

    None where the system does not say.
    """
    available = _field(MEMORY_TABLE, "MemAvailable")
    if available is None:
        return None
    for limit, usage, statistics in MEMORY_FILES:
        bound, used = _number(limit), _number(usage)
        if bound is not None:
            used = max(0, (used or 0) - _reclaimable(statistics))
            available = min(available, max(0, bound - used))
    return available


def _reclaimable(file: str) -> int:
    """Bytes of files that the system holds in memory and can drop at any time."""
    for line in (_text(file) or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def read_pressure() -> Readings | None:
    """What is left, and whether anybody waits for memory; None where the system does not say."""
    available = available_memory()
    if available is None:
        return None
    stalled = 0.0
    for file in PRESSURE_FILES:
        with suppress(OSError):  # a kernel may have the file and refuse to read it
            stalled = max(stalled, _stalled(_text(file) or ""))
    return Readings(available, stalled)


def _stalled(text: str) -> float:
    """The ten-second average of PSI's line `some`, as a share."""
    for line in text.splitlines():
        kind, *fields = line.split()
        if kind == "some":
            return float(dict(f.split("=", 1) for f in fields)["avg10"]) / 100
    return 0.0


@dataclass(frozen=True)
class Budget:
    """Bytes by what they are for. Nothing else grows with use: all pages of a kind are of one size,
    so any free one serves any sequence and the pool cannot fragment; activations and staging are
    allocated once, for the largest step."""

    program: int
    weights: int
    activations: int
    cache: int
    headroom: int

    @property
    def total(self) -> int:
        """All but the headroom, which is left to the system."""
        return self.program + self.weights + self.activations + self.cache

    def lines(self) -> list[tuple[str, int]]:
        """Names and bytes, to print."""
        return [
            ("interpreter and libraries", self.program),
            ("weights", self.weights),
            ("activations and logits", self.activations),
            ("KV cache, when full", self.cache),
            ("left to the system", self.headroom),
        ]


def device_memory() -> tuple[int, int] | None:
    """Bytes of the current GPU's memory that are taken, and all of them; None without one."""
    torch = sys.modules.get("torch")  # a GPU that is used is used through it
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free, total


def private_memory() -> int:
    """Bytes of memory that are this process's own (files that it has mapped are not)."""
    return _field("/proc/self/status", "RssAnon") or 0


def _field(file: str, name: str) -> int | None:
    """Bytes that one of /proc's tables gives under a name; None if there is no such file."""
    text = _text(file)
    if text is None:
        return None
    _, found, rest = text.partition(f"{name}:")
    if not found:
        raise LookupError(f"{file} has no line {name}")
    return int(rest.split(None, 1)[0]) * 1024


def _number(file: str) -> int | None:
    """A file's number; None if there is no such file, or it says `max`."""
    text = (_text(file) or "").strip()
    return int(text) if text.isdigit() else None


def _text(file: str) -> str | None:
    """What is in one of the system's files; None if there is no such file. Not through the layers
    of `open`: this is called on the event loop, over and over."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(descriptor, MOST_BYTES).decode()
    finally:
        os.close(descriptor)


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a model keeps of what it has read: of a `page` in all layers, `window_page` of
    them in layers that see the last `window` tokens only; and of a sequence's `state`."""

    page: int
    window_page: int = 0
    window: int = 0
    state: int = 0


@dataclass(frozen=True)
class CacheSize:
    """Pages of the pool, states that are kept beside those of who runs, and window pages, if layers
    that see a window have some of their own."""

    pages: int
    snapshots: int = 0
    window_pages: int = 0

    def bytes(self, footprint: Footprint) -> int:
        """Bytes of all pages, and one more that takes what is written for nobody."""
        if not self.window_pages:
            return (self.pages + 1) * footprint.page
        rest = footprint.page - footprint.window_page
        return (self.pages + 1) * rest + (self.window_pages + 1) * footprint.window_page


def cache_size(
    section: CacheSection,
    footprint: Footprint,
    max_context: int,
    batch: SchedulerSection,
    device_bytes: int | None = None,
) -> CacheSize:
    """How large the cache is: as configured, or in a fraction of the free memory (the device's, if
    it has its own), and no more than every slot at full context could use.

    Raises ConfigError if not even one page fits.
    """
    free = available_memory() if device_bytes is None else device_bytes
    budget = whole = int((free or 4 << 30) * section.memory_fraction)
    snapshots, running, page_bytes = 0, batch.max_running, footprint.page
    if footprint.state:
        # States of who runs are taken as they are needed on the host, at once on a device.
        held = running * footprint.state
        budget -= min(held, budget // 4) if device_bytes is None else held
        snapshots = _snapshots(section, running, budget // 2 // footprint.state)
        budget -= snapshots * footprint.state
        if budget < page_bytes and not (section.tokens and device_bytes is None):
            raise ConfigError(
                f"cache.memory_fraction leaves {whole} bytes, too little for {running} states "
                f"of {footprint.state} bytes (scheduler.max_running) and {snapshots} more "
                "(cache.snapshots) beside the KV cache; lower these, or raise the fraction"
            )
    if section.tokens:
        pages = -(-section.tokens // section.page_size)
        found = _held_windows(section, footprint, batch)
        counts = (2 * found[1], found[1]) if found is not None else ()
        windows = next((count for count in counts if count < pages), 0)
        return CacheSize(pages, snapshots, windows)
    needed = -(-max_context // section.page_size)
    most = running * needed
    pages = min(budget // page_bytes, most)
    if pages < 1:
        raise ConfigError(
            f"cache.memory_fraction leaves {budget} bytes for the KV cache, "
            f"but one page needs {page_bytes}; free memory or raise the fraction"
        )
    size = CacheSize(pages, snapshots)
    if pages < most:
        size = _split(section, footprint, batch, budget, size, needed)
    return replace(size, pages=min(size.pages, most))


def _held_windows(
    section: CacheSection, footprint: Footprint, batch: SchedulerSection
) -> tuple[int, int] | None:
    """Window pages that one sequence alone needs, and that all who may run hold at most; None if
    layers that see a window are to have no pages of their own."""
    if section.windows == "whole" or not footprint.window_page or footprint.state:
        return None
    size, tokens = section.page_size, batch.max_batch_tokens
    least = least_window_pages(footprint.window, tokens, size)
    most = batch.max_running * most_window_pages(footprint.window, size) + -(-2 * tokens // size)
    return least, max(least, most)


def _split(
    section: CacheSection,
    footprint: Footprint,
    batch: SchedulerSection,
    budget: int,
    shared: CacheSize,
    needed: int,
) -> CacheSize:
    """Pages and window pages within a budget; or what is `shared` by all layers, if no fewer whole
    contexts fit there. Half of it is for windows, but no more than all who run can hold twice, so
    that others can begin there, and less if that leaves the `needed` pages of a whole context."""
    held = _held_windows(section, footprint, batch)
    if held is None:
        return shared
    (least, most), each = held, footprint.window_page
    if least * each > budget:
        return shared
    rest = footprint.page - each
    windows = max(least, min((budget // 2 if rest else budget) // each, 2 * most))
    # Names take memory, too, where pages themselves take none.
    pages = (budget - windows * each) // rest if rest else NAMED * windows
    room = (budget - needed * rest) // each
    if pages < needed and room >= least:
        windows, pages = min(windows, room), needed
    # Contexts that fit: of short ones window pages hold no less than pages do.
    window = min(needed, most_window_pages(footprint.window, section.page_size))
    fit = min(pages / needed, windows / window)
    return CacheSize(pages, 0, windows) if fit > shared.pages / needed else shared


def _snapshots(section: CacheSection, max_running: int, fitting: int) -> int:
    """States that are kept beside those of who runs, of which so many would fit."""
    if not section.prefix_caching:
        return 0
    if section.snapshots != "auto":
        return section.snapshots
    return min(max_running, max(0, fitting))
