"""The model as tools and resources of the Model Context Protocol, for whoever has a key."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import mcp_types as types
import msgspec
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from msgspec import Meta
from prometheus_client import generate_latest
from starlette.requests import Request

from engine import AsyncEngine, Delta, InvalidRequest
from engine.embedding.embedder import Embedder
from engine.version import VERSION
from server import timeline
from server.embeddings import EmbeddingRequest, embedder_named, embedding_body
from server.errors import describe
from server.openai import Generation, prepare_chat, prepare_completion
from server.protocol import ChatRequest, CompletionRequest, Message
from server.shapes import ChatShape
from server.streams import reading
from server.tenants import Client, client_of

Context = ServerRequestContext[Any, Request]
METRICS = "ryzanstein://metrics"
TIMELINE = "ryzanstein://requests/{id}/timeline"
PREFIX, SUFFIX = TIMELINE.split("{id}")
RequestName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Drawn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all that generates takes. `request_id` is for `cancel`."""

    max_tokens: Annotated[int, Meta(ge=1)] = 256
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    json_schema: dict[str, Any] | None = None
    request_id: RequestName | None = None


class Generate(Drawn, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Continue a text. Progress notifications carry the new text."""

    prompt: str


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Annotated[str, Meta(pattern="^(system|user|assistant)$")]
    content: str


class Chat(Drawn, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answer a conversation. Progress notifications carry the new text."""

    messages: Annotated[list[Turn], Meta(min_length=1)]


class Tokenize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The token ids of a text."""

    text: str


class Embed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The vectors of texts."""

    texts: Annotated[list[str], Meta(min_length=1, max_length=256)]


class ListModels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The models that are served."""


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """End a request that was begun with this request_id."""

    request_id: RequestName


def make_manager(
    engine: AsyncEngine, embedder: Embedder | None, max_body_bytes: int
) -> StreamableHTTPSessionManager:
    """What serves the protocol's requests. Each stands alone, so that any replica can take it."""
    inbound = Inbound(engine, embedder)
    server: Server[Any] = Server(
        "ryzanstein",
        version=VERSION,
        instructions="A language model that runs here. `chat` answers, `generate` continues text.",
        on_list_tools=inbound.list_tools,
        on_call_tool=inbound.call_tool,
        on_list_resources=inbound.list_resources,
        on_list_resource_templates=inbound.list_templates,
        on_read_resource=inbound.read_resource,
    )
    return StreamableHTTPSessionManager(
        server,
        stateless=True,
        # Host and origin have been checked before.
        security_settings=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        max_request_body_size=max_body_bytes,
    )


class Inbound:
    """Handles the protocol's requests."""

    def __init__(self, engine: AsyncEngine, embedder: Embedder | None) -> None:
        self._engine = engine
        self._embedder = embedder
        self._tools: dict[str, tuple[type, Callable[[Context, Any], Awaitable[Any]]]] = {
            "generate": (Generate, self._generate),
            "chat": (Chat, self._chat),
            "tokenize": (Tokenize, self._tokenize),
            "list_models": (ListModels, self._list_models),
            "cancel": (Cancel, self._cancel),
        }
        if embedder is not None:
            self._tools["embed"] = (Embed, self._embed)

    async def list_tools(
        self, ctx: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        tools = [
            types.Tool(
                name=name, description=(kind.__doc__ or "").strip(), input_schema=_schema(kind)
            )
            for name, (kind, _) in self._tools.items()
        ]
        return types.ListToolsResult(tools=tools)

    async def call_tool(
        self, ctx: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        """A tool's result; what is wrong with a call is told in it, so that a model can mend it."""
        if params.name not in self._tools:
            raise MCPError(types.INVALID_PARAMS, f"there is no tool {params.name[:64]!r}")
        kind, work = self._tools[params.name]
        try:
            arguments: Any = msgspec.convert(params.arguments or {}, kind)
            found = await work(ctx, arguments)
        except msgspec.ValidationError as error:
            return _failed(str(error))
        except Exception as error:  # noqa: BLE001  (unexpected ones tell no details)
            return _failed(describe(error)[1].error.message)
        text = found.pop("shown", None)
        shown = types.TextContent(type="text", text=text or json.dumps(found))
        return types.CallToolResult(content=[shown], structured_content=found)

    async def list_resources(
        self, ctx: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        metrics = types.Resource(
            uri=METRICS, name="metrics", description="Prometheus metrics", mime_type="text/plain"
        )
        return types.ListResourcesResult(resources=[metrics])

    async def list_templates(
        self, ctx: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        template = types.ResourceTemplate(
            uri_template=TIMELINE,
            name="timeline",
            description="Where a request's time went, and why",
            mime_type="application/json",
        )
        return types.ListResourceTemplatesResult(resource_templates=[template])

    async def read_resource(
        self, ctx: Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        uri, request = str(params.uri), _request(ctx)
        if uri == METRICS:
            text = generate_latest(request.app.state.metrics.registry).decode()
            kind = "text/plain"
        elif uri.startswith(PREFIX) and uri.endswith(SUFFIX):
            identifier = uri.removeprefix(PREFIX).removesuffix(SUFFIX)
            try:
                scope = {**request.scope, "path_params": {"id": identifier}}
                response = await timeline.get_timeline(Request(scope))
                text = bytes(response.body).decode()
            except Exception as error:
                message = describe(error)[1].error.message
                raise MCPError(types.INVALID_PARAMS, message, {"uri": uri}) from error
            kind = "application/json"
        else:
            raise MCPError(
                types.INVALID_PARAMS, f"there is no resource {uri[:200]!r}", {"uri": uri}
            )
        contents = types.TextResourceContents(uri=params.uri, text=text, mime_type=kind)
        return types.ReadResourceResult(contents=[contents])

    # Tools

    async def _generate(self, ctx: Context, given: Generate) -> dict[str, Any]:
        body = CompletionRequest(prompt=given.prompt, **self._fields(given))
        generation = await prepare_completion(self._engine, body, self._client(ctx))
        return await self._run(ctx, generation, given)

    async def _chat(self, ctx: Context, given: Chat) -> dict[str, Any]:
        messages = [Message(role=t.role, content=t.content) for t in given.messages]  # type: ignore[arg-type]
        body = ChatRequest(messages=messages, **self._fields(given))
        generation = await prepare_chat(self._engine, body, self._client(ctx))
        return await self._run(ctx, generation, given)

    def _fields(self, given: Drawn) -> dict[str, Any]:
        """The fields of OpenAI's requests."""
        names = ("max_tokens", "temperature", "top_p", "seed", "stop")
        fields = {name: getattr(given, name) for name in names}
        return fields | {"model": self._engine.parts.model_name, "guided_json": given.json_schema}

    async def _run(self, ctx: Context, generation: Generation, given: Drawn) -> dict[str, Any]:
        """Generate, and tell of progress to those who ask for it."""
        identifier = _identifier(self._client(ctx), given.request_id or uuid.uuid4().hex)
        stream = await generation.submit(self._engine, identifier)
        whole, made = Delta(), 0
        with reading(self._engine, stream):
            while batch := await stream.receive():
                text = "".join(delta.text for delta in batch)
                made += sum(len(delta.token_ids) for delta in batch)
                for delta in batch:
                    whole.merge(delta)
                if text:
                    await ctx.session.report_progress(made, generation.params.max_tokens, text)
        usage = whole.usage
        text = whole.text
        if isinstance(generation.shape, ChatShape):
            text = generation.shape.whole(whole)["message"]["content"] or ""
        return {
            "shown": text,
            "text": text,
            "finish_reason": whole.finish_reason,
            "prompt_tokens": 0 if usage is None else usage.prompt_tokens,
            "completion_tokens": made,
            "request_id": identifier,
        }

    async def _tokenize(self, ctx: Context, given: Tokenize) -> dict[str, Any]:
        ids = await self._engine.encode(given.text)
        return {"count": len(ids), "tokens": ids}

    async def _embed(self, ctx: Context, given: Embed) -> dict[str, Any]:
        embedder = self._embedder
        assert embedder is not None
        body = EmbeddingRequest(input=given.texts, model=embedder.name)
        embedder = embedder_named(embedder, body.model)
        answer = await embedding_body(
            self._engine, embedder, body, self._client(ctx).tenant, asyncio.wrap_future
        )
        return {"model": embedder.name, "vectors": [item["embedding"] for item in answer["data"]]}

    async def _list_models(self, ctx: Context, given: ListModels) -> dict[str, Any]:
        names = [self._engine.parts.model_name]
        if self._embedder is not None:
            names.append(self._embedder.name)
        return {"models": list(dict.fromkeys(names))}

    async def _cancel(self, ctx: Context, given: Cancel) -> dict[str, Any]:
        identifier = _identifier(self._client(ctx), given.request_id)
        if self._engine.delivery.request(identifier) is None:
            raise InvalidRequest(f"no request {given.request_id!r} of yours is under way")
        self._engine.abort(identifier)
        return {"cancelled": given.request_id}

    def _client(self, ctx: Context) -> Client:
        return client_of(_request(ctx))


def _request(ctx: Context) -> Request:
    """The HTTP request that a call came by, which the guard let in."""
    assert ctx.request is not None
    return ctx.request


def _identifier(client: Client, name: str) -> str:
    """A client's own name for a request, apart from everybody else's."""
    owner = hashlib.sha256(client.owner.encode()).hexdigest()[:12]
    return f"mcp-{owner}-{name}"


def _schema(kind: type) -> dict[str, Any]:
    """A tool's arguments; the protocol wants an object at the root."""
    whole = msgspec.json.schema(kind)
    parts = whole.pop("$defs")
    root: dict[str, Any] = parts.pop(kind.__name__)
    root.pop("description", None)
    return {**root, **({"$defs": parts} if parts else {})}


def _failed(message: str) -> types.CallToolResult:
    shown = types.TextContent(type="text", text=message)
    return types.CallToolResult(content=[shown], is_error=True)
