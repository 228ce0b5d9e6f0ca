"""A step's inputs on the device: one buffer, filled on the host, copied once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kernels.batch import Batch


class Mirror:
    """int32 numbers that are filled in on the host (`numbers`) and sent to the `device`'s copy."""

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = host.pin_memory() if pinned else host
        self.numbers: npt.NDArray[np.int32] = self._host.numpy()
        self.device = self._host.to(device, copy=True)
        self._sent = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until what was sent last has left the host: a step may still run before it."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, end: int | None = None) -> None:
        """Start copying, up to `end` of the first dimension."""
        self.device[:end].copy_(self._host[:end], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Staging:
    """Fixed places for the batch's arrays, all int32, so that captured launches find them.

    What a batch does not fill is harmless: rows behind it write to `trash`, the cache's last slot,
    and chunks behind it are empty. A chunk's row of `window_table` lies behind its row of
    `page_table`; the rows of both are `table_stride` apart. `last_ids` int64 `[slots]` is each
    slot's last token; the first `fed` rows of a step read theirs from there, at `slots`. `states`
    are the chunks' table rows.
    """

    def __init__(
        self,
        rows: int,
        sequences: int,
        table_width: int,
        trash: int,
        device: torch.device,
        window_trash: int = 0,
    ) -> None:
        # Both tables of a chunk together, so that one copy takes those of all chunks there are.
        table_width = -(-table_width // 4) * 4
        tables = 2 if window_trash > 0 else 1
        self.table_stride = tables * table_width
        sizes = {
            "token_ids": rows,
            "positions": rows,
            "kv_slots": rows,
            "sample_rows": rows,
            "slots": rows,
            "query_starts": sequences + 1,
            "context_lengths": sequences,
            "fed": 1,
            "states": sequences,
            "kept_rows": sequences,
            "kept_at": sequences,
            "window_slots": rows if window_trash > 0 else 0,
            "page_table": sequences * self.table_stride,
        }
        # Every array starts at 16 bytes, as the kernels are compiled for.
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += -(-size // 4) * 4
        host = torch.zeros(total, dtype=torch.int32)
        self._trash = {"kv_slots": trash, "window_slots": window_trash}
        for name, slot in self._trash.items():
            host[starts[name] : starts[name] + sizes[name]] = slot
        host[starts["kept_rows"] : starts["kept_rows"] + sequences] = -1
        self._mirror = Mirror(host, device)
        places = {name: slice(starts[name], starts[name] + size) for name, size in sizes.items()}
        self._arrays = {name: self._mirror.numbers[place] for name, place in places.items()}
        for name, place in places.items():
            setattr(self, name, self._mirror.device[place])
        self._tables = starts["page_table"]
        self._width = table_width
        table = self.page_table.view(sequences, tables, table_width)
        self.page_table, self.window_table = table[:, 0], table[:, -1]
        self.last_ids = torch.zeros(max(sequences, 1), dtype=torch.int64, device=device)

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    sample_rows: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lengths: torch.Tensor
    fed: torch.Tensor
    states: torch.Tensor
    kept_rows: torch.Tensor
    kept_at: torch.Tensor
    window_slots: torch.Tensor
    page_table: torch.Tensor
    window_table: torch.Tensor

    def copy(self, batch: Batch, fed: int = 0) -> None:
        """Fill in a batch and send it."""
        self._mirror.wait()
        arrays, rows = self._arrays, len(batch.token_ids)
        sequences, samples = len(batch.context_lengths), len(batch.sample_rows)
        for name, values in (
            ("token_ids", batch.token_ids),
            ("positions", batch.positions),
            ("kv_slots", batch.kv_slots),
            ("sample_rows", batch.sample_rows),
            ("query_starts", batch.query_starts),
            ("context_lengths", batch.context_lengths),
        ):
            arrays[name][: len(values)] = values
        if batch.window_slots is not None:
            arrays["window_slots"][:rows] = batch.window_slots
        for name, slot in self._trash.items():
            arrays[name][rows:] = slot
        arrays["token_ids"][rows:] = 0
        arrays["positions"][rows:] = 0
        arrays["sample_rows"][samples:] = 0
        arrays["query_starts"][sequences + 1 :] = rows
        arrays["context_lengths"][sequences:] = 0
        arrays["fed"][0] = fed
        arrays["slots"][:fed] = batch.table_rows[:fed]
        arrays["states"][:sequences] = batch.table_rows
        arrays["kept_rows"][:sequences] = -1 if batch.kept_rows is None else batch.kept_rows
        arrays["kept_at"][:sequences] = 0 if batch.kept_at is None else batch.kept_at
        width = min(self._width, batch.page_table.shape[1])
        rows_of = arrays["page_table"].reshape(-1, self.table_stride // self._width, self._width)
        for n, table in enumerate((batch.page_table, batch.window_table)):
            if table is not None:
                np.take(table[:, :width], batch.table_rows, 0, rows_of[:sequences, n, :width])
        # The tables come last: those of chunks that are not there stay behind.
        self._mirror.send(self._tables + sequences * self.table_stride)
