"""`/openapi.json`: what the server takes, made from the types that decode it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from server import messages_protocol, protocol, responses_protocol
from server.batches.routes import BatchRequest
from server.embeddings import EmbeddingRequest
from server.errors import ErrorBody, json_response
from server.messages_protocol import CountRequest, MessagesRequest
from server.openai import ready_engine
from server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Harmless,
    TokenizeRequest,
)
from server.responses_protocol import ResponsesRequest

TEMPLATE = "#/components/schemas/{name}"
TEXT = {"type": "string"}


@dataclass(frozen=True)
class Operation:
    """One method of one path. `query` are its parameters by name, with their schemas."""

    method: str
    path: str
    summary: str
    body: type | None = None
    query: tuple[tuple[str, dict[str, Any]], ...] = ()
    streams: bool = False


LISTED = (
    ("order", {"enum": ["asc", "desc"]}),
    ("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
    ("after", TEXT),
)
RETRIEVED = (
    ("stream", {"type": "boolean"}),
    ("starting_after", {"type": "integer", "minimum": -1}),
)
OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a chat", ChatRequest, streams=True),
    Operation("post", "/v1/completions", "Continue text", CompletionRequest, streams=True),
    Operation("post", "/v1/responses", "Create a response", ResponsesRequest, streams=True),
    Operation("post", "/v1/responses/input_tokens", "Count a response's input", ResponsesRequest),
    Operation("get", "/v1/responses/{id}", "A response, or its events", None, RETRIEVED, True),
    Operation("delete", "/v1/responses/{id}", "Forget a response"),
    Operation("post", "/v1/responses/{id}/cancel", "End a response as it stands"),
    Operation("get", "/v1/responses/{id}/input_items", "A response's input", None, LISTED),
    Operation("post", "/v1/messages", "Answer, Anthropic's way", MessagesRequest, streams=True),
    Operation("post", "/v1/messages/count_tokens", "Count a conversation's tokens", CountRequest),
    Operation("post", "/v1/embeddings", "Vectors of texts", EmbeddingRequest),
    Operation("get", "/v1/files", "The files that are kept"),
    Operation("post", "/v1/files", "Keep a file"),
    Operation("get", "/v1/files/{id}", "A file"),
    Operation("delete", "/v1/files/{id}", "Forget a file"),
    Operation("get", "/v1/files/{id}/content", "What a file holds"),
    Operation("get", "/v1/batches", "The batches that are kept"),
    Operation("post", "/v1/batches", "Answer a file's lines, below other requests", BatchRequest),
    Operation("get", "/v1/batches/{id}", "A batch, and how far it is"),
    Operation("post", "/v1/batches/{id}/cancel", "End a batch; what is answered stays"),
    Operation("get", "/v1/models", "The model that is served"),
    Operation("get", "/v1/models/{model}", "One model"),
    Operation("get", "/v1/usage/{id}", "What an ended answer took"),
    Operation("get", "/v1/requests/{id}/timeline", "Where an answer's time goes, and why"),
    Operation("post", "/tokenize", "Token ids of text or messages", TokenizeRequest),
    Operation("post", "/detokenize", "The text of token ids", DetokenizeRequest),
    Operation("get", "/health/live", "Whether the process works"),
    Operation("get", "/health/ready", "Whether it can serve"),
    Operation("get", "/metrics", "Prometheus metrics"),
)
# Values that a field may have though it cannot be honoured otherwise.
REFUSED: dict[type, Harmless] = {
    ChatRequest: protocol.HARMLESS,
    CompletionRequest: protocol.HARMLESS,
    ResponsesRequest: responses_protocol.HARMLESS,
    MessagesRequest: messages_protocol.HARMLESS,
    CountRequest: messages_protocol.HARMLESS,
}


@lru_cache(maxsize=1)
def document(model: str) -> bytes:
    """The whole document of a server that has `model`, encoded."""
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    kinds = [*dict.fromkeys(bodies), ErrorBody]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=TEMPLATE)
    for kind, harmless in REFUSED.items():
        properties = schemas[kind.__name__]["properties"]
        for name, values in harmless.items():
            if name in properties:
                properties[name] = {"enum": [None, *values], "default": None}
        properties["model"] = {"enum": [model]}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Ryzanstein", "version": "1"},
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{"key": []}, {}],
        }
    )


def _operation(operation: Operation) -> dict[str, Any]:
    reference = {"$ref": TEMPLATE.format(name="ErrorBody")}
    answer: dict[str, Any] = {"application/json": {}}
    if operation.streams:
        answer["text/event-stream"] = {}
    if operation.path == "/metrics":
        answer = {"text/plain": {}}
    result: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "what was asked for", "content": answer},
            "default": {
                "description": "what was wrong, and what to do",
                "content": {"application/json": {"schema": reference}},
            },
        },
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "schema": schema} for name, schema in operation.query
    ]
    in_path = [name for name in ("id", "model") if f"{{{name}}}" in operation.path]
    parameters += [
        {"name": name, "in": "path", "required": True, "schema": TEXT} for name in in_path
    ]
    if parameters:
        result["parameters"] = parameters
    if operation.body is not None:
        schema = {"$ref": TEMPLATE.format(name=operation.body.__name__)}
        content = {"application/json": {"schema": schema}}
        result["requestBody"] = {"required": True, "content": content}
    return result


async def openapi(request: Request) -> ASGIApp:
    """`GET /openapi.json`."""
    model = ready_engine(request).parts.model_name
    return json_response(msgspec.Raw(document(model)))
