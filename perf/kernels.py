"""Every native op beside this machine's own ceilings: GOP/s, GB/s, and what a second thread gives.

python -m perf.kernels --threads 1,2

Ceilings come from a small native probe (byte, bfloat16 and float products, reading from memory).
Weights and caches are cold: many copies take turns, more than the processor's caches hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from kernels.backend import CacheDType, CacheLayout
from kernels.batch import Batch
from kernels.cpu.native_backend import CACHE_FORMATS, native_module, unavailable_reason
from kernels.cpu.native_program import run
from kernels.cpu.native_weights import BF16, F32, Q4, Q4_EVEN, Q8, TERNARY
from kernels.ops import Heads

# SmolLM2-135M's: rows and columns of a linear, and its attention.
SHAPES = {"qkv": (960, 576), "out": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
HEADS, KV_HEADS, DIM, PAGE = 9, 3, 64, 16
FORMATS = {
    "q4": Q4,
    "q4_0": Q4_EVEN,
    "q8": Q8,
    "ternary": TERNARY,
    "bfloat16": BF16,
    "float32": F32,
}
# The probe's kinds, and which of them bounds a format's products.
PROBES = {"int8": 0, "bfloat16": 1, "float32": 2}
PRODUCTS = {"bfloat16": "bfloat16", "float32": "float32"}
READ = 3
COLD_BYTES = 96 << 20


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes a second that this many threads reach at best."""

    operations: dict[str, float]
    read: float

    def seconds(self, work: Work) -> float:
        """The least time for the work: whichever of computing and reading takes longer."""
        return max(work.operations / self.operations[work.product], work.bytes / self.read)


@dataclass(frozen=True)
class Work:
    """One measured case: what an op does once, and which products it is made of."""

    op: str
    shape: str
    format: str
    rows: int
    operations: float
    bytes: float
    product: str = "int8"


def decode_batch(rows: int, context: int) -> Batch:
    """One token for each of `rows` sequences of `context` tokens."""
    pages = -(-context // PAGE)
    table = np.arange(rows * pages, dtype=np.int32).reshape(rows, pages)
    position = np.full(rows, context - 1)
    slots = table[:, -1].astype(np.int64) * PAGE + (context - 1) % PAGE
    return Batch(
        np.arange(rows) % 16, position, slots, np.arange(rows + 1, dtype=np.int32),
        np.full(rows, context, np.int32), np.arange(rows, dtype=np.int32), table, np.arange(rows),
    )  # fmt: skip


def prefill_batch(rows: int) -> Batch:
    """One prompt of `rows` tokens."""
    pages = -(-rows // PAGE)
    table = np.arange(pages, dtype=np.int32)[None]
    return Batch(
        np.arange(rows) % 16, np.arange(rows), np.arange(rows), np.array([0, rows], np.int32),
        np.array([rows], np.int32), np.zeros(1, np.int32), table, np.array([rows - 1]),
    )  # fmt: skip


def shape_of(batch: Batch, context: int) -> str:
    """How the table calls a batch of attention: decodes that see `context` tokens, or a prompt."""
    rows, sequences = len(batch.token_ids), len(batch.context_lengths)
    return f"{rows} x {context}" if sequences == rows else f"prompt of {rows}"


class Bench:
    """Runs single ops through native programs on one device."""

    def __init__(self, native: ModuleType, instructions: str, threads: int) -> None:
        self.native = native
        self.device = native.Device(instructions, threads)
        self._arena = native.Arena()
        self._memory = np.ones(512 << 20, np.uint8)

    def ceilings(self) -> Ceilings:
        """This device's, from the probe."""
        operations = {name: self.device.probe(kind, 0, 0, 5) for name, kind in PROBES.items()}
        read = self.device.probe(READ, self._memory.ctypes.data, self._memory.nbytes, 3)
        return Ceilings(operations, read)

    def seconds(self, program: Any, op: str, count: int, batch: Batch) -> float:
        """Median time of one `op` of a program that holds `count` of them."""
        run(program, batch)
        times = []
        for _ in range(7):
            program.profile(True)
            run(program, batch)
            times.append(program.nanoseconds()[op] / count / 1e9)
        return float(np.median(times))

    def program(self, rows: int, width: int) -> tuple[Any, int]:
        """A program that begins with a buffer of random activations, in every form."""
        program = self.native.Program(self.device, rows)
        values = np.random.default_rng(0).normal(size=(16, width)).astype(np.float32)
        table = self.native.make_weight(self._arena, F32, 16, width)
        self.native.pack_f32(table, 0, values.ctypes.data, 16)
        grouped = width % 32 == 0
        x = program.add_buffer(width, floats=True, groups=grouped, whole=True, bf16=True)
        program.add("embed", out=x, weight=table, scalar=1.0)
        return program, x

    def linear(self, name: str, format_name: str, rows: int) -> tuple[Work, float]:
        """One linear with cold weights."""
        out, columns = SHAPES[name]
        self._arena = self.native.Arena()
        program, x = self.program(rows, columns)
        y = program.add_buffer(out, floats=True, groups=False, whole=False, bf16=False)
        first = self.native.make_weight(self._arena, FORMATS[format_name], out, columns)
        copies = max(2, COLD_BYTES // first.bytes)
        for _ in range(copies):
            weight = self.native.make_weight(self._arena, FORMATS[format_name], out, columns)
            program.add("linear", in_=x, out=y, weight=weight)
        seconds = self.seconds(program, "linear", copies, decode_batch(rows, 1))
        product = PRODUCTS.get(format_name, "int8")
        operations = 2.0 * out * columns * rows
        return Work(
            "linear", name, format_name, rows, operations, float(first.bytes), product
        ), seconds

    def attention(
        self, cache: CacheDType, batch: Batch, context: int, pages: int
    ) -> tuple[Work, float]:
        """One layer's attention over cold pages; `context` counts what all rows see together."""
        rows = len(batch.token_ids)
        program, q = self.program(rows, HEADS * DIM)
        y = program.add_buffer(HEADS * DIM, floats=True, groups=False, whole=False, bf16=False)
        heads = Heads(HEADS, KV_HEADS, DIM)
        layout = CacheLayout((heads,), PAGE, cache)
        vectors = pages * PAGE * KV_HEADS
        size = vectors * layout.vector_bytes(heads)
        layers = max(2, min(400, COLD_BYTES // (2 * size)))
        memory = []
        for layer in range(layers):
            # Written, since untouched zeros would all be one page of the system's.
            blocks = [np.full(size + 128, 0x3C, np.uint8) for _ in range(2)]
            scales = [
                np.ones(vectors * max(4, layout.scale_bytes(heads)) // 2, np.float16) for _ in "kv"
            ]
            memory += [*blocks, *scales]
            starts = [b.ctypes.data + -b.ctypes.data % 64 for b in blocks]
            addresses = [*starts, *(s.ctypes.data for s in scales)]
            program.add_cache(
                self.native.LayerCache(CACHE_FORMATS[cache], *addresses, PAGE, KV_HEADS, DIM)
            )
            program.add("attention", in_=q, out=y, layer=layer, heads=HEADS, scalar=0.125)
        seconds = self.seconds(program, "attention", layers, batch)
        del memory
        operations = 4.0 * context * HEADS * DIM
        product = cache if cache in PROBES else "int8"
        return Work(
            "attention",
            shape_of(batch, context // rows),
            cache,
            rows,
            operations,
            2.0 * (size + vectors * layout.scale_bytes(heads)),
            product,
        ), seconds

    def rowwise(self, rows: int) -> Iterator[tuple[Work, float]]:
        """The ops on one row at a time, on warm activations."""
        width, wide, repeat = 576, 1536, 20
        norm = np.ones(wide, np.float32)
        batch = decode_batch(rows, 1)

        def case(op: str, width: int, moved: int, emit: Callable[[Any, int], None]) -> Any:
            program, x = self.program(rows, width)
            for _ in range(repeat):
                emit(program, x)
            work = Work(op, str(width), "-", rows, 0.0, 4.0 * moved * rows)
            return work, self.seconds(program, op, repeat, batch)

        def buffer(program: Any, width: int) -> int:
            made: int = program.add_buffer(width, floats=True, groups=True, whole=False, bf16=False)
            return made

        yield case(
            "rms_norm", width, 2 * width,
            lambda p, x: p.add(
                "rms_norm", in_=x, out=buffer(p, width), vector=norm.ctypes.data, window=width,
            ),
        )  # fmt: skip
        yield case(
            "add_rms_norm", width, 4 * width,
            lambda p, x: p.add(
                "add_rms_norm", in_=x, in2=x, out=buffer(p, width), out2=buffer(p, width),
                vector=norm.ctypes.data,
            ),
        )  # fmt: skip
        yield case(
            "gated", 2 * wide, 3 * wide,
            lambda p, x: p.add("gated", in_=x, out=buffer(p, wide), activation=0),
        )  # fmt: skip


def cases(bench: Bench, rows: list[int], context: int, only: str) -> Iterator[tuple[Work, float]]:
    """Everything whose line contains `only`; ops on rows, which are quick, come whole."""
    for format_name in FORMATS:
        for name in SHAPES:
            if only in f"linear {name} {format_name}":
                for count in rows:
                    yield bench.linear(name, format_name, count)
    for cache in CACHE_FORMATS:
        for count in rows:
            pages = count * -(-context // PAGE)
            batch = decode_batch(count, context)
            if only in f"attention {shape_of(batch, context)} {cache}":
                yield bench.attention(cache, batch, count * context, pages)
        for count in (256, 1024):
            seen = count * (count + 1) // 2
            batch = prefill_batch(count)
            if only in f"attention {shape_of(batch, count)} {cache}":
                yield bench.attention(cache, batch, seen, -(-count // PAGE))
    for count in (1, 32):
        yield from bench.rowwise(count)


def together(probed: list[Ceilings]) -> Ceilings:
    """The ceilings of several rounds: the best of what is computed, which the machine's moods only
    hide, and the median of what is read, which they change."""
    best = {name: max(one.operations[name] for one in probed) for name in PROBES}
    return Ceilings(best, float(np.median([one.read for one in probed])))


def result(work: Work, ceilings: Ceilings, seconds: float, threads: int) -> dict[str, Any]:
    """One line of the table."""
    return {
        "op": work.op,
        "shape": work.shape,
        "format": work.format,
        "rows": work.rows,
        "threads": threads,
        "us": round(seconds * 1e6, 1),
        "gops": round(work.operations / seconds / 1e9, 1),
        "of_products": round(work.operations / seconds / ceilings.operations[work.product], 3),
        "gbs": round(work.bytes / seconds / 1e9, 1),
        "of_read": round(work.bytes / seconds / ceilings.read, 3),
        "allowed_us": round(ceilings.seconds(work) * 1e6, 1),
    }


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """All figures; with two or more numbers of threads also the speed-up beside the allowed one."""
    table = Table("op", "shape", "format", "rows", "threads", "µs", "GOP/s", "GB/s", "speed-up")
    fewest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["op"], row["shape"], row["format"], row["rows"])
        base = fewest.setdefault(key, row)
        speed = ""
        if base is not row:
            allowed = base["allowed_us"] / row["allowed_us"] if row["allowed_us"] else float("nan")
            speed = f"{base['us'] / row['us']:.2f} of {allowed:.2f}"
        table.add_row(
            *(str(row[k]) for k in ("op", "shape", "format", "rows", "threads", "us")),
            f"{row['gops']:g} ({row['of_products']:.0%})" if row["gops"] else "",
            f"{row['gbs']:g} ({row['of_read']:.0%})",
            speed,
        )
    console.print(table)


app = App(name="perf.kernels", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    threads: Annotated[str, Parameter(help="Numbers of threads, with commas.")] = "1,2",
    rows: Annotated[str, Parameter(help="Rows a step, with commas.")] = "1,4,16,32,64,128",
    context: Annotated[int, Parameter(help="Tokens each decode sees.")] = 192,
    instructions: Annotated[str, Parameter(help="A set by name; auto: the best.")] = "auto",
    only: Annotated[str, Parameter(help="Ops whose line contains this.")] = "",
    rounds: Annotated[int, Parameter(help="How often everything, for the medians.")] = 1,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure the ceilings, then every op, and print one table."""
    native = native_module()
    reason = unavailable_reason(instructions)
    if native is None or reason is not None:
        raise SystemExit(f"the native kernels cannot run: {reason}")
    name = native.instruction_sets()[0] if instructions == "auto" else instructions
    console = Console(width=120)
    counts = [int(count) for count in rows.split(",")]
    benches = {number: Bench(native, name, number) for number in map(int, threads.split(","))}
    measured: dict[tuple[Work, int], list[float]] = {}
    probed: dict[int, list[Ceilings]] = {}
    for number, bench in [*benches.items()] * rounds:
        ceilings = bench.ceilings()
        probed.setdefault(number, []).append(ceilings)
        shown = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in ceilings.operations.items())
        console.print(
            f"{name}, {number} threads: {shown} GOP/s, reading {ceilings.read / 1e9:.1f} GB/s"
        )
        for work, seconds in cases(bench, counts, context, only):
            if only in f"{work.op} {work.shape} {work.format}":
                measured.setdefault((work, number), []).append(seconds)
    allowed = {number: together(rounds_of) for number, rounds_of in probed.items()}
    found = [
        result(work, allowed[number], float(np.median(times)), number)
        for (work, number), times in measured.items()
    ]
    found.sort(key=lambda r: (r["op"], r["format"], r["shape"], r["rows"], r["threads"]))
    print_table(found, console)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    app()
