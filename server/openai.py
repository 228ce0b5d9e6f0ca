"""OpenAI's HTTP endpoints: chat completions, completions, models; and tokenization."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from engine import AsyncEngine, Delta, InvalidRequest, SamplingParams, Terms, TokenStream
from server.answering import for_template, prepare_answer
from server.chunk_events import ChunkEvents, asked_usages
from server.dialect import dialect_of
from server.errors import HTTPError, json_response
from server.format import Envelope, envelope, usage_body
from server.protocol import (
    HARMLESS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Harmless,
    StreamOptions,
    TokenizeRequest,
    decode,
)
from server.requests import (
    Prompt,
    prompts_of,
    sampling_of,
    template_input,
    terms_of,
    truncated,
    wishes_of,
)
from server.shapes import ChatShape, CompletionShape, Echo, Shape
from server.streams import (
    DONE,
    EventStream,
    Put,
    completed,
    race_disconnect,
    reading,
    submit_all,
)
from server.structured import asked_form
from server.tenants import Client, client_of

logger = logging.getLogger("ryzanstein.server")

R = TypeVar("R", bound=msgspec.Struct)


class Generation(msgspec.Struct, frozen=True):
    """A checked request, ready to be queued. `names` maps the engine's fields to the client's."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    shape: Shape
    terms: Terms
    names: dict[str, str] = {}
    more: dict[str, Any] = {}
    """What a whole answer, or the first chunk of a stream, has besides."""

    async def submit(self, engine: AsyncEngine, request_id: str) -> TokenStream:
        """Queue it; errors name the client's own fields."""
        try:
            return await submit_all(
                engine, self.prompts, self.params, request_id=request_id, terms=self.terms
            )
        except InvalidRequest as error:
            name = self.names.get(error.param or "")
            if name is None:
                raise
            raise InvalidRequest(str(error), param=name, code=error.code) from error


async def chat_completions(request: Request) -> ASGIApp:
    """`POST /v1/chat/completions`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, ChatRequest)
    generation = await prepare_chat(engine, body, client_of(request))
    return await _answer(request, engine, body, generation, headers)


async def completions(request: Request) -> ASGIApp:
    """`POST /v1/completions`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, CompletionRequest)
    generation = await prepare_completion(engine, body, client_of(request))
    return await _answer(request, engine, body, generation, headers)


async def list_models(request: Request) -> ASGIApp:
    """`GET /v1/models`."""
    models = _models(request)
    # OpenAI's list and Anthropic's in one.
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"], "has_more": False}
    return json_response({"object": "list", "data": models, **ends})


async def get_model(request: Request) -> ASGIApp:
    """`GET /v1/models/{id}`."""
    name = request.path_params["model"]
    for model in _models(request):
        if model["id"] == name:
            return json_response(model)
    check_model(ready_engine(request), name)
    raise AssertionError


async def tokenize(request: Request) -> ASGIApp:
    """`POST /tokenize`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    special = body.add_special_tokens
    if body.messages is not None:
        dialect = dialect_of(engine.parts.tokenizer.chat_template)
        messages, _ = for_template(dialect, template_input(body.messages))
        text, special = engine.render_chat(messages), False
    else:
        text = body.prompt or ""
    ids = await engine.encode(text, add_special_tokens=special)
    answer = {"count": len(ids), "max_model_len": engine.parts.limits.context, "tokens": ids}
    return json_response(answer, headers=headers)


async def detokenize(request: Request) -> ASGIApp:
    """`POST /detokenize`."""
    engine = ready_engine(request)
    body, headers = await read_body(request, DetokenizeRequest)
    vocabulary = engine.parts.vocab_size
    if any(not 0 <= token < vocabulary for token in body.tokens):
        raise InvalidRequest(f"a token id lies outside 0..{vocabulary - 1}", param="tokens")
    text = await engine.decode(body.tokens)
    return json_response({"prompt": text}, headers=headers)


def ready_engine(request: Request) -> AsyncEngine:
    """The engine, or HTTPError 503 while it is loading."""
    engine: AsyncEngine = request.app.state.engine
    if engine.health() == "loading":
        raise HTTPError(
            503,
            "the model is still loading; GET /health/ready tells when it is done",
            code="model_loading",
            headers={"retry-after": "2"},
        )
    return engine


async def read_body(
    request: Request, kind: type[R], harmless: Harmless = HARMLESS
) -> tuple[R, dict[str, str]]:
    """The decoded body, and headers that warn of fields nobody knows."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPError(
            415,
            f"the content type is {content_type or 'missing'!r}; send application/json",
            code="unsupported_media_type",
        )
    body, unknown = decode(await request.body(), kind, harmless)
    if not unknown:
        return body, {}
    # Field names come from the client: only plain ones are repeated.
    names = ", ".join(n for n in unknown[:8] if n.isidentifier() and len(n) < 64 and n.isascii())
    logger.debug("ignored %d unknown request fields: %s", len(unknown), names)
    return body, {"x-ryzanstein-warning": f"unknown fields ignored: {names}"}


def check_model(engine: AsyncEngine, model: str | None) -> None:
    """HTTPError unless `model` names the one that is served."""
    served = engine.parts.model_name
    if not engine.parts.generates:
        raise HTTPError(
            404,
            f"this server has only {served!r}, which embeds; nothing here generates text",
            param="model",
            code="model_not_found",
        )
    if model is None:
        raise InvalidRequest(f"model is missing; this server has {served!r}", param="model")
    if model != served:
        raise HTTPError(
            404,
            f"the model {model[:100]!r} does not exist here; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


async def prepare_chat(engine: AsyncEngine, body: ChatRequest, client: Client) -> Generation:
    """Check a chat request and make its prompt."""
    _check_generation(engine, body)
    params = sampling_of(body, engine.parts.recommended)
    messages = template_input(body.messages)
    answering = await prepare_answer(engine, messages, wishes_of(body), **_template_options(body))
    ids, params = truncated(answering.ids, body), answering.applied(params)
    show = bool(body.return_token_ids)
    shape = ChatShape(
        engine.parts.tokenizer,
        logprobs=bool(body.logprobs),
        token_ids=show,
        parser=answering.parser,
    )
    names = {"prompt": "messages", "logprobs": "top_logprobs", **answering.names}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    more = {"prompt_token_ids": ids} if show else {}
    return Generation([ids], params, shape, terms_of(client, body), names, more)


async def prepare_completion(
    engine: AsyncEngine, body: CompletionRequest, client: Client
) -> Generation:
    """Check a plain completion request and its prompts."""
    _check_generation(engine, body)
    params, names = sampling_of(body, engine.parts.recommended), dict[str, str]()
    if (form := asked_form(body)) is not None:
        params, names = msgspec.structs.replace(params, grammar=form[0]), {"grammar": form[1]}
    tokenizer = engine.parts.tokenizer
    prompts = prompts_of(body.prompt)
    encoded = iter(await engine.encode_all([p for p in prompts if isinstance(p, str)]))
    ids = [truncated(next(encoded) if isinstance(p, str) else p, body) for p in prompts]
    if body.suffix:
        ids = await _infilled(engine, body, ids)
    echoes = None
    if body.echo:
        for one in ids:
            engine.check_ids(one)
        whole = body.truncate_prompt_tokens is None
        echoes = [
            Echo(p if isinstance(p, str) and whole else await engine.decode(i), i)
            for p, i in zip(prompts, ids, strict=True)
        ]
    shape = CompletionShape(
        tokenizer,
        choices_per_prompt=params.n,
        logprobs=body.logprobs is not None,
        echoes=echoes,
        prompt_only=bool(body.echo) and body.max_tokens == 0,
        prompt_logprobs=body.prompt_logprobs is not None,
        prompt_ids=ids if body.return_token_ids else None,
    )
    return Generation(ids, params, shape, terms_of(client, body), names)


def _template_options(body: ChatRequest) -> dict[str, Any]:
    """How the prompt ends: ready for an answer, as it is, or within the assistant's message."""
    if body.continue_final_message:
        return {"continue_final": True}
    return {"add_generation_prompt": body.add_generation_prompt}


async def _infilled(
    engine: AsyncEngine, body: CompletionRequest, prompts: list[list[int]]
) -> list[list[int]]:
    """Prompts that ask for what lies between them and the suffix."""
    tokens = engine.parts.tokenizer.infill_ids
    if tokens is None:
        raise InvalidRequest(
            f"{engine.parts.model_name} was not trained to fill in text before a suffix; "
            "leave suffix out",
            param="suffix",
            code="unsupported_parameter",
        )
    if body.echo:
        raise InvalidRequest("echo cannot be combined with suffix", param="echo")
    prefix, suffix, middle = tokens
    after = await engine.encode(body.suffix or "", add_special_tokens=False)
    return [[prefix, *ids, suffix, *after, middle] for ids in prompts]


def _check_generation(engine: AsyncEngine, body: GenerationRequest) -> None:
    check_model(engine, body.model)
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs is not available while streaming", param="prompt_logprobs"
        )


async def _answer(
    request: Request,
    engine: AsyncEngine,
    body: ChatRequest | CompletionRequest,
    generation: Generation,
    headers: dict[str, str],
) -> ASGIApp:
    """Queue the generation, and answer by events or whole."""
    prefix = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
    request_id = f"{prefix}-{uuid.uuid4().hex}"
    stream = await generation.submit(engine, request_id)
    shape = generation.shape
    kind = shape.chunk_kind if body.stream else shape.kind
    wrapper = envelope(request_id, kind, engine.parts.model_name, engine.parts.fingerprint)
    if body.stream:
        prompt = sum(map(len, generation.prompts))
        options = body.stream_options or StreamOptions()

        async def produce(put: Put) -> None:
            chunks = ChunkEvents(put, wrapper, shape, prompt, generation.more, options)
            with reading(engine, stream):
                await stream.pour(chunks.pass_on)
            await completed(put(chunks.last()))

        return EventStream(
            produce,
            headers,
            lambda: engine.abort(*stream.request_ids),
            settings=request.app.state.settings,
            last=DONE,
        )
    whole = await race_disconnect(request, lambda: _whole(engine, stream, wrapper, generation))
    return json_response(whole, headers=headers)


async def complete(engine: AsyncEngine, generation: Generation, request_id: str) -> dict[str, Any]:
    """The whole answer to a generation, for nobody's connection."""
    stream = await generation.submit(engine, request_id)
    wrapper = envelope(
        request_id, generation.shape.kind, engine.parts.model_name, engine.parts.fingerprint
    )
    return await _whole(engine, stream, wrapper, generation)


async def _whole(
    engine: AsyncEngine, stream: TokenStream, wrapper: Envelope, generation: Generation
) -> dict[str, Any]:
    shape = generation.shape
    merged: dict[int, Delta] = {}
    usages = []
    with reading(engine, stream):
        while batch := await stream.receive():
            for delta in batch:
                if delta.usage is not None:
                    usages.append(delta.usage)
                if delta.index in merged:
                    merged[delta.index].merge(delta)
                else:
                    merged[delta.index] = delta
    choices = [shape.whole(merged[index]) for index in sorted(merged)]
    return wrapper.body(choices, usage=usage_body(asked_usages(usages, shape)), **generation.more)


def _models(request: Request) -> list[dict[str, Any]]:
    """The model that generates, and the encoder, as far as they are there."""
    engine, embedder = ready_engine(request), request.app.state.embedder
    lengths = {engine.parts.model_name: engine.parts.limits.context}
    if embedder is not None:
        lengths[embedder.name] = embedder.encoder.max_tokens
    started = request.app.state.started
    return [
        {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "created": started,
            "created_at": datetime.fromtimestamp(started, UTC).isoformat(),
            "owned_by": "ryzanstein",
            "max_model_len": length,
        }
        for name, length in lengths.items()
    ]
