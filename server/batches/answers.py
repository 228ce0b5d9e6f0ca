"""Answers one body as its endpoint would, whole, without a connection."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from engine import AsyncEngine
from engine.embedding.embedder import Embedder
from server.embeddings import EmbeddingRequest, embedder_named, embedding_body
from server.openai import complete, prepare_chat, prepare_completion
from server.protocol import ChatRequest, CompletionRequest, decode
from server.tenants import Client

# Below whatever anybody asks for at once.
PRIORITY = -1000
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS)


class Answers:
    """What a batch's worker calls."""

    def __init__(self, engine: AsyncEngine, embedder: Embedder | None) -> None:
        self._engine = engine
        self._embedder = embedder

    async def __call__(
        self, endpoint: str, body: bytes, tenant: str, request_id: str, seed: int
    ) -> Any:
        """The answer's body; `seed` is taken if the body names none. Raises what the endpoint
        would answer with an error."""
        client = Client(tenant, {})
        if endpoint == EMBEDDINGS:
            request, _ = decode(body, EmbeddingRequest, {})
            embedder = embedder_named(self._embedder, request.model)
            wait = asyncio.wrap_future
            return await embedding_body(self._engine, embedder, request, tenant, wait, later=True)
        if endpoint == CHAT:
            chat = _seeded(decode(body, ChatRequest)[0], seed)
            generation = await prepare_chat(self._engine, chat, client)
        else:
            plain = _seeded(decode(body, CompletionRequest)[0], seed)
            generation = await prepare_completion(self._engine, plain, client)
        terms = msgspec.structs.replace(generation.terms, priority=PRIORITY)
        generation = msgspec.structs.replace(generation, terms=terms)
        return await complete(self._engine, generation, request_id)


def _seeded(body: Any, seed: int) -> Any:
    """The body as it is answered here: whole, and alike if it is answered again."""
    changes = {"stream": None, "stream_options": None}
    if body.seed is None:
        changes["seed"] = seed  # type: ignore[assignment]
    return msgspec.structs.replace(body, **changes)
