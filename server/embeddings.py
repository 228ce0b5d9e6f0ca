"""`POST /v1/embeddings`: OpenAI's form, with an encoder beside the chat model."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import anyio
import msgspec
import numpy as np
from starlette.requests import Request
from starlette.types import ASGIApp

from engine import AsyncEngine, InvalidRequest
from engine.embedding.embedder import Embedder
from server.errors import HTTPError, json_response
from server.openai import read_body, ready_engine
from server.streams import race_disconnect
from server.tenants import client_of

if TYPE_CHECKING:
    from engine.embedding.encoder import Vectors

MAX_INPUTS = 2048


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body. `input` is text, token ids, or a list of either; `dimensions` keeps the first ones
    of each vector; `truncate_prompt_tokens` cuts inputs, -1 to what the model reads."""

    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None


async def create(request: Request) -> ASGIApp:
    """`POST /v1/embeddings`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, EmbeddingRequest, {})
    embedder = embedder_named(request.app.state.embedder, body.model)

    def wait(future: Future[Vectors]) -> Awaitable[Vectors]:
        async def vectors() -> Vectors:
            return await asyncio.wrap_future(future)

        return race_disconnect(request, vectors)

    answer = await embedding_body(engine, embedder, body, client_of(request).tenant, wait)
    return json_response(answer, headers=headers)


async def embedding_body(
    engine: AsyncEngine,
    embedder: Embedder,
    body: EmbeddingRequest,
    tenant: str,
    wait: Callable[[Future[Vectors]], Awaitable[Vectors]],
    *,
    later: bool = False,
) -> dict[str, Any]:
    """The whole answer; `wait` is how the vectors are waited for, `later` if nobody else waits.
    Raises Overloaded if the tenant's rate, which `engine` counts, is used up."""
    sequences = await tokenized(embedder, body)
    width = embedder.encoder.width
    if body.dimensions is not None and not 1 <= body.dimensions <= width:
        raise InvalidRequest(
            f"dimensions must be between 1 and {width}, which {embedder.name} has",
            param="dimensions",
        )
    tokens = sum(map(len, sequences))
    charge = engine.admission.charging(tenant, engine.parts.clock.now(), patient=later)
    submitted = embedder.submit(sequences, tenant, later=later)
    charge(tokens)
    vectors = shortened(await wait(submitted), body.dimensions)
    data = [
        {"object": "embedding", "index": number, "embedding": shown}
        for number, shown in enumerate(encoded(vectors, body.encoding_format or "float"))
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": embedder.name, "usage": usage}


def embedder_named(embedder: Embedder | None, model: str | None) -> Embedder:
    """The encoder, if it is the one that a request names. Raises HTTPError or InvalidRequest."""
    if embedder is None:
        raise HTTPError(
            404,
            "this server has no embedding model; start it with --embedding-model",
            param="model",
            code="model_not_found",
        )
    if model is None:
        raise InvalidRequest(f"model is missing; embeddings are {embedder.name!r}'s", param="model")
    if model != embedder.name:
        raise HTTPError(
            404,
            f"the model {model[:100]!r} embeds nothing here; {embedder.name!r} does",
            param="model",
            code="model_not_found",
        )
    return embedder


async def tokenized(embedder: Embedder, body: EmbeddingRequest) -> list[list[int]]:
    """The inputs as token ids. Raises InvalidRequest unless they are of one kind."""
    given = body.input
    if isinstance(given, str) or (isinstance(given, list) and given and _is_ids(given)):
        given = [given]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INPUTS:
        raise InvalidRequest(
            f"input must be text, token ids, or a list of 1 to {MAX_INPUTS} of either",
            param="input",
        )
    if all(isinstance(item, str) for item in given):
        try:
            sequences = await anyio.to_thread.run_sync(embedder.encoder.tokenize, given)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest(
                "a text holds half of a surrogate pair, which is no character", param="input"
            ) from error
    elif all(isinstance(item, list) and _is_ids(item) for item in given):
        sequences = given
    else:
        raise InvalidRequest("input mixes kinds; give texts only, or ids only", param="input")
    keep = body.truncate_prompt_tokens
    if keep is None:
        return sequences
    most = embedder.encoder.max_tokens
    if keep != -1 and not 1 <= keep <= most:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1, or between 1 and {most}",
            param="truncate_prompt_tokens",
        )
    cut = most if keep == -1 else keep
    # The end token stays, as it does where the model was trained.
    return [s if len(s) <= cut else [*s[: cut - 1], s[-1]] for s in sequences]


def _is_ids(item: list[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in item)


def shortened(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first dimensions of vectors, of length 1 again."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    kept: Vectors = cut / np.maximum(lengths, 1e-12)
    return kept


def encoded(vectors: Vectors, form: str) -> list[Any]:
    """Vectors as lists of numbers, or little-endian fp32 in base64."""
    if form == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    rows: list[Any] = vectors.tolist()
    return rows
