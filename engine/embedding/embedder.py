"""Batches texts of several requests for an encoder, on a thread of its own."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.config import EmbeddingSection
from engine.errors import EngineClosed, EngineFailed, InvalidRequest, Overloaded
from engine.weights.sources import KNOWN_MODELS, Progress, resolve

if TYPE_CHECKING:
    from engine.embedding.encoder import Encoder, Vectors

# Rows times the longest row's length: longer batches are not faster, and hold up the others.
BATCH_TOKENS = 2048


@dataclass(eq=False)
class Job:
    """One request: its sequences, those that wait to be encoded, whether they come after all that
    somebody waits for, and the vectors so far."""

    sequences: Sequence[Sequence[int]]
    waiting: deque[int]
    later: bool
    vectors: Vectors
    future: Future[Vectors] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        """Tokens that still wait."""
        return sum(len(self.sequences[n]) for n in self.waiting)


class Embedder:
    """An encoder and its queue. Tenants take turns, batch by batch."""

    def __init__(self, section: EmbeddingSection) -> None:
        self._section = section
        self._encoder: Encoder | None = None
        # By whether they come later, and by tenant.
        self._queues: OrderedDict[tuple[bool, str], deque[Job]] = OrderedDict()
        self._waiting = {False: 0, True: 0}  # tokens, of either
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="ryzanstein-embed", daemon=True)

    @property
    def name(self) -> str:
        """What clients call it."""
        model = self._section.model
        if self._section.served_name or model in KNOWN_MODELS:
            return self._section.served_name or model
        return Path(model.split(":", 1)[-1]).name

    @property
    def encoder(self) -> Encoder:
        """The loaded model."""
        if self._encoder is None:
            raise EngineFailed("the embedding model has not been loaded")
        return self._encoder

    def load(
        self,
        *,
        accept_terms: Callable[[str], bool] = lambda _: False,
        progress: Progress = lambda *_: None,
    ) -> None:
        """Find and read the model, and start. Raises ConfigError in one sentence."""
        path = resolve(self._section.model, accept_terms=accept_terms, progress=progress)
        # With it comes torch, whose import takes two seconds.
        from engine.embedding.encoder import Encoder

        self._encoder = Encoder(path)
        self._thread.start()

    def submit(
        self, sequences: Sequence[Sequence[int]], tenant: str, *, later: bool = False
    ) -> Future[Vectors]:
        """Queue token ids; the future has fp32 `[sequences, width]`. Cancelling it takes them out.
        Those that can come `later` come after all others.

        Raises InvalidRequest for ids that cannot be encoded, Overloaded if too much waits.
        """
        self._check(sequences)
        encoder = self.encoder
        # Rows of about one length share a batch.
        order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]), reverse=True)
        vectors = np.empty((len(sequences), encoder.width), np.float32)
        job = Job(sequences, deque(order), later, vectors)
        with self._changed:
            if self._closed:
                raise EngineClosed("the server is shutting down and takes no new requests")
            waiting = self._waiting[later]
            if waiting and waiting + job.tokens > self._section.max_waiting_tokens:
                raise Overloaded(
                    f"{waiting} tokens wait to be embedded; try again later", retry_after=1.0
                )
            self._waiting[later] += job.tokens
            self._queues.setdefault((later, tenant), deque()).append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Refuse what waits, and end."""
        with self._changed:
            self._closed = True
            jobs = [job for queue in self._queues.values() for job in queue]
            self._queues.clear()
            self._changed.notify()
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(EngineClosed("the server shut down"))
        if self._thread.is_alive():
            self._thread.join()

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        encoder = self.encoder
        for number, sequence in enumerate(sequences):
            if not sequence or not all(0 <= token < encoder.vocab_size for token in sequence):
                raise InvalidRequest(
                    f"input {number} is empty, or has a token outside 0..{encoder.vocab_size - 1}",
                    param="input",
                )
            if len(sequence) > encoder.max_tokens:
                raise InvalidRequest(
                    f"input {number} has {len(sequence)} tokens; {self.name} reads at most "
                    f"{encoder.max_tokens}. Shorten it, or set truncate_prompt_tokens to -1",
                    param="input",
                    code="context_length_exceeded",
                )

    def _loop(self) -> None:
        while (taken := self._take()) is not None:
            job, rows = taken
            try:
                found = self.encoder.encode([job.sequences[n] for n in rows])
            except Exception as error:  # noqa: BLE001  (handed to whoever waits)
                self._fail(job, error)
                continue
            job.vectors[rows] = found
            if not job.waiting and job.future.set_running_or_notify_cancel():
                job.future.set_result(job.vectors)

    def _take(self) -> tuple[Job, list[int]] | None:
        """The next batch; None at the end."""
        while True:
            with self._changed:
                while not self._queues:
                    if self._closed:
                        return None
                    self._changed.wait()
                job, rows = self._next_rows()
            if rows:
                return job, rows

    def _next_rows(self) -> tuple[Job, list[int]]:
        """Rows of the first job of the tenant whose turn it is; none if nobody waits for them."""
        # Keys sort by whether they come later; of equals the first is the one whose turn it is.
        turn = min(self._queues, key=lambda key: key[0])
        queue = self._queues[turn]
        job, rows = queue[0], list[int]()
        longest = len(job.sequences[job.waiting[0]])
        most = 0 if job.future.cancelled() else max(1, BATCH_TOKENS // longest)
        while job.waiting and len(rows) < most:
            rows.append(job.waiting.popleft())
        self._waiting[job.later] -= sum(len(job.sequences[n]) for n in rows)
        if not rows:
            self._waiting[job.later] -= job.tokens
            job.waiting.clear()
        if not job.waiting:
            queue.popleft()
        self._queues.move_to_end(turn)
        if not queue:
            del self._queues[turn]
        return job, rows

    def _fail(self, job: Job, error: Exception) -> None:
        with self._changed:
            self._waiting[job.later] -= job.tokens
            for turn, queue in list(self._queues.items()):
                if job in queue:
                    queue.remove(job)
                if not queue:
                    del self._queues[turn]
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(EngineFailed(f"embedding failed: {type(error).__name__}"))
