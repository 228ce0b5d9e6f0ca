"""The log: lines for people, or JSON in the Elastic Common Schema, that never hold anything up.

A line is put into a queue; a thread formats and writes it. What comes faster than it can be
written, or cannot be written at all (a full disk, a closed pipe), is dropped and counted. The same
line again and again is written a few times, then counted. Requests' and traces' ids come with every
line that is logged on their behalf. Prompts and answers are logged only where that was asked for.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import ecs_logging
import structlog

from engine import AsyncEngine, RequestStats, StepStats
from engine.config import LoggingSection
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger("ryzanstein.requests")

MOST_WAITING = 10_000
# Of one and the same line, in so many seconds.
MOST_ALIKE, ALIKE_SECONDS = 10, 10.0
# How long an exit waits for what is still to be written.
EXIT_SECONDS = 1.0
PROMPT, ANSWERS = "ryzanstein.prompt", "ryzanstein.answers"
# Kinds of lines that are remembered for this.
MOST_KINDS = 1000


class Journal(logging.Handler):
    """A handler that writes to a descriptor from a thread of its own."""

    def __init__(self, formatter: logging.Formatter, descriptor: int = 2) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.dropped = 0
        """Lines that were lost."""
        self._descriptor = descriptor
        self._kinds: dict[tuple[str, int, str], tuple[float, int]] = {}
        self._lines: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ryzanstein-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, unless it is one too many."""
        if not self._passes(record):
            return
        if self._lines.qsize() >= MOST_WAITING:
            self.dropped += 1
            return
        # Of whoever logs this, which the thread that writes it cannot know.
        record.__dict__.update(structlog.contextvars.get_contextvars())
        self._lines.put(record)

    def close(self) -> None:
        """Write what is there, as far as that can be done in a moment."""
        self._lines.put(None)
        self._thread.join(EXIT_SECONDS)
        super().close()

    def _passes(self, record: logging.LogRecord) -> bool:
        """Whether a line is not the same again and again; says how many were left out."""
        if record.name == logger.name:
            return True
        kind, now = (record.name, record.levelno, str(record.msg)), time.monotonic()
        since, count = self._kinds.get(kind, (now, 0))
        if now - since > ALIKE_SECONDS:
            if count > MOST_ALIKE:
                record.msg = f"{record.getMessage()} (and {count - MOST_ALIKE} more like it)"
                record.args = ()
            since, count = now, 0
        if len(self._kinds) >= MOST_KINDS and kind not in self._kinds:
            self._kinds.clear()
        self._kinds[kind] = (since, count + 1)
        return count < MOST_ALIKE

    def _work(self) -> None:
        while (record := self._lines.get()) is not None:
            try:
                line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except (OSError, ValueError, TypeError):
                self.dropped += 1


class Lines(logging.Formatter):
    """For people: level, name, message, and the request's id if there is one."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if PROMPT in record.__dict__:
            text += f", prompt {record.__dict__[PROMPT]!r}, answers {record.__dict__[ANSWERS]!r}"
        request_id = record.__dict__.get("http.request.id")
        return text if request_id is None else f"{text} [{request_id}]"


class Text:
    """Tokens that become text when they are written, on the journal's thread."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = ids

    def __str__(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)

    def __repr__(self) -> str:
        return repr(str(self))

    def __structlog__(self) -> str:
        """What it is in JSON."""
        return str(self)


class RequestLog:
    """A listener that logs a line for each request that has ended; given the `engine`, with its
    prompt and answers as the model read and wrote them."""

    def __init__(self, engine: AsyncEngine | None = None) -> None:
        self._engine = engine

    def on_step(self, stats: StepStats) -> None:
        """Steps are not logged."""

    def on_request(self, stats: RequestStats) -> None:
        """Say what it took."""
        first = None if stats.first_token is None else stats.first_token - stats.arrival
        more: dict[str, Any] = {}
        if self._engine is not None:
            tokenizer = self._engine.parts.tokenizer
            prompt, answers = self._engine.delivery.tokens(stats.id)
            more[PROMPT] = Text(tokenizer, prompt)
            more[ANSWERS] = [Text(tokenizer, answer) for answer in answers]
        logger.info(
            "%s ended: %s, %d tokens in, %d out, %.3f s",
            stats.id,
            stats.finish_reason,
            stats.prompt_tokens,
            stats.completion_tokens,
            stats.finished - stats.arrival,
            extra={
                "http.request.id": stats.id,
                "trace.id": stats.trace.split("-")[1] if stats.trace else None,
                "event.duration": round(1e9 * (stats.finished - stats.arrival)),
                "ryzanstein.tenant": stats.tenant,
                "ryzanstein.finish_reason": stats.finish_reason,
                "ryzanstein.prompt_tokens": stats.prompt_tokens,
                "ryzanstein.cached_tokens": stats.cached_tokens,
                "ryzanstein.output_tokens": stats.completion_tokens,
                "ryzanstein.preemptions": stats.preemptions,
                "ryzanstein.first_token_seconds": first,
                **more,
            },
        )


def open_journal(settings: LoggingSection) -> Journal:
    """Send all that is logged from now on through a journal, to standard error."""
    formatter: logging.Formatter = Lines()
    if settings.format == "json":
        formatter = ecs_logging.StdlibFormatter(
            exclude_fields=["log.original"], extra={"service.name": "ryzanstein"}
        )
    journal = Journal(formatter)
    logging.basicConfig(handlers=[journal], level=settings.level.upper(), force=True)
    if settings.prompts:
        logger.warning(
            "PROMPTS AND ANSWERS ARE LOGGED: whoever can read this log can read all that users say "
            "to the model and it to them. Set logging.prompts = false unless they know that."
        )
    return journal


def bind(request_id: str, trace: str) -> None:
    """Whatever this task logs is on behalf of a request."""
    ids: dict[str, Any] = {"http.request.id": request_id}
    if trace:
        ids["trace.id"] = trace.split("-")[1]
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**ids)
