"""`/v1/stream`: send a chat or completion body as JSON, get deltas; `{"type": "cancel"}` stops it.

Requests of one connection are answered in turn. A cancel ends every request sent before it, the
running and the queued; each still gets its `done`. A message that cannot be served gets one `error`
event and the connection stays. Leaving the connection aborts its requests.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.websockets import WebSocket

from engine import AsyncEngine, InvalidRequest, TokenStream
from server.errors import HTTPError, describe
from server.format import usage_body
from server.openai import Generation, prepare_chat, prepare_completion
from server.protocol import ChatRequest, CompletionRequest, decode
from server.streams import ClientLeft, logger, reading, receive_text, send_text
from server.tenants import client_of

# Requests that may wait on a connection behind the one being answered.
QUEUE = 8


class Connection:
    """One socket: a reader that takes messages, and a writer that answers requests in turn."""

    def __init__(self, socket: WebSocket, engine: AsyncEngine) -> None:
        self._socket = socket
        self._engine = engine
        self._current: TokenStream | None = None
        self._sent = 0
        self._cancelled = 0  # requests up to this number are cancelled
        self._lock = anyio.Lock()

    async def serve(self) -> None:
        """Until the client leaves."""
        await self._socket.accept()
        send, receive = anyio.create_memory_object_stream[tuple[int, str]](QUEUE)
        async with anyio.create_task_group() as group:
            group.start_soon(self._answer_all, receive)
            with suppress(ClientLeft):
                await self._read_all(send)
            group.cancel_scope.cancel()

    async def _read_all(self, queue: MemoryObjectSendStream[tuple[int, str]]) -> None:
        with queue:
            while True:
                message = await receive_text(self._socket)
                if message is None:
                    await self._fail(InvalidRequest("send text messages, not binary ones"))
                    continue
                if _is_cancel(message):
                    self._cancelled = self._sent
                    if self._current is not None:
                        self._engine.abort(*self._current.request_ids)
                    continue
                try:
                    queue.send_nowait((self._sent + 1, message))
                    self._sent += 1
                except anyio.WouldBlock:
                    error = f"{QUEUE} requests are already waiting on this connection"
                    await self._fail(HTTPError(429, error, code="rate_limit_exceeded"))

    async def _answer_all(self, queue: MemoryObjectReceiveStream[tuple[int, str]]) -> None:
        with queue:
            async for number, message in queue:
                try:
                    await self._answer_or_fail(number, message)
                except ClientLeft:
                    return

    async def _answer_or_fail(self, number: int, message: str) -> None:
        try:
            await self._answer(number, message)
        except ClientLeft:
            raise
        except Exception as error:  # noqa: BLE001  (told to the client, who may go on)
            await self._fail(error)

    async def _answer(self, number: int, message: str) -> None:
        generation = await self._prepare(message.encode("utf-8", errors="surrogatepass"))
        request_id = f"stream-{uuid.uuid4().hex}"
        stream = await generation.submit(self._engine, request_id)
        self._current = stream
        if number <= self._cancelled:
            self._engine.abort(*stream.request_ids)
        usages = []
        try:
            await self._send({"type": "start", "id": request_id})
            with reading(self._engine, stream):
                while batch := await stream.receive():
                    for delta in batch:
                        if delta.usage is not None:
                            usages.append(delta.usage)
                        if delta.text:
                            event = {"type": "delta", "index": delta.index, "text": delta.text}
                            await self._send(event)
                        if delta.finish_reason is not None:
                            reason = delta.finish_reason.replace("abort", "cancelled")
                            event = {"type": "finish", "index": delta.index, "reason": reason}
                            await self._send(event)
        finally:
            self._current = None
            self._engine.abort(*stream.request_ids)
        total = usage_body(usages)
        usage = {
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
        }
        await self._send({"type": "done", "id": request_id, "usage": usage})

    async def _prepare(self, body: bytes) -> Generation:
        """A chat request if it has messages, else a completion; the model may be left out."""
        client = client_of(self._socket)
        if not self._socket.app.state.directory.knows(client):
            raise HTTPError(401, "the key is not valid any more", code="invalid_api_key")
        if self._engine.health() == "loading":
            raise HTTPError(503, "the model is still loading", code="model_loading")
        try:
            fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            fields = {}
        model = self._engine.parts.model_name
        if "messages" in fields:
            chat, _ = decode(body, ChatRequest)
            _refuse(chat)
            chat = msgspec.structs.replace(chat, model=chat.model or model, stream_options=None)
            return await prepare_chat(self._engine, chat, client)
        plain, _ = decode(body, CompletionRequest)
        _refuse(plain)
        plain = msgspec.structs.replace(plain, model=plain.model or model, stream_options=None)
        return await prepare_completion(self._engine, plain, client)

    async def _fail(self, error: Exception) -> None:
        status, body, _ = describe(error)
        if status == 500:
            logger.error("WebSocket request failed", exc_info=error)
        await self._send({"type": "error", "status": status, "error": body.error})

    async def _send(self, event: dict[str, Any]) -> None:
        """One event; the reader may have to complain while the writer writes."""
        async with self._lock:
            await send_text(self._socket, msgspec.json.encode(event).decode())


def _refuse(body: ChatRequest | CompletionRequest) -> None:
    """This connection carries text; what would need more is refused, not dropped."""
    for name in ("echo", "logprobs", "top_logprobs", "prompt_logprobs"):
        if getattr(body, name, None):
            raise InvalidRequest(
                f"{name} is not available on this connection; use the HTTP endpoints", param=name
            )


def _is_cancel(message: str) -> bool:
    """Whether a message is `{"type": "cancel"}`; anything long is a request."""
    if len(message) > 256:
        return False
    try:
        value = msgspec.json.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return isinstance(value, dict) and value.get("type") == "cancel"


async def stream_endpoint(socket: WebSocket) -> None:
    """The WebSocket endpoint."""
    await Connection(socket, socket.app.state.engine).serve()
