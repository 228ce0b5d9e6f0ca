"""`/v1/files` and `/v1/batches`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from engine import InvalidRequest
from server.batches.answers import EMBEDDINGS, ENDPOINTS
from server.batches.database import Row, StorageFull
from server.batches.service import Batches
from server.errors import HTTPError, json_response
from server.openai import read_body, ready_engine
from server.tenants import client_of

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
WINDOW_SECONDS = 24 * 3600
PAGE, MOST = 20, 10_000
MAX_METADATA = 16
FILENAME = re.compile(r"[^\w. ()-]")


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


async def create_file(request: Request) -> ASGIApp:
    """`POST /v1/files`: a form with `file` and `purpose`."""
    batches = service_of(request)
    try:
        form = await request.form(max_files=1, max_fields=20)
    except MultiPartException as error:
        raise HTTPError(400, f"the form cannot be read: {error.message}") from error
    try:
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise InvalidRequest("file is missing; send a form with a file", param="file")
        if purpose not in PURPOSES:
            raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
        seconds = _seconds(form.get("expires_after[seconds]"))
        content = await upload.read()
        name = FILENAME.sub("_", upload.filename or "file")[:200]
    finally:
        await form.close()
    database, owner = batches.database, client_of(request).owner
    most = batches.section.max_owner_bytes
    try:
        row = await batches.on_disk(
            database.add_file, owner, name, str(purpose), content, seconds, most
        )
    except StorageFull as error:
        raise _full(error, "file") from error
    return json_response(_file(row))


async def list_files(request: Request) -> ASGIApp:
    """`GET /v1/files`."""
    batches, query = service_of(request), request.query_params
    owner = client_of(request).owner
    rows = await batches.on_disk(batches.database.files, owner, query.get("purpose"))
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    if order == "desc":
        rows.reverse()
    return json_response(_page(request, [_file(row) for row in rows]))


async def one_file(request: Request) -> ASGIApp:
    """`GET` or `DELETE /v1/files/{id}`."""
    batches, row = service_of(request), await _find_file(request)
    if request.method != "DELETE":
        return json_response(_file(row))
    await batches.on_disk(batches.database.delete_file, row["id"], row["owner"])
    return json_response({"id": row["id"], "object": "file", "deleted": True})


async def file_content(request: Request) -> ASGIApp:
    """`GET /v1/files/{id}/content`."""
    batches, row = service_of(request), await _find_file(request)

    async def pieces() -> AsyncGenerator[bytes]:
        for number in itertools.count():
            piece = await batches.on_disk(batches.database.part, row["id"], number)
            if piece is None:
                return
            yield piece

    headers = {"content-length": str(row["bytes"])}
    return StreamingResponse(pieces(), headers=headers, media_type="application/octet-stream")


async def create_batch(request: Request) -> ASGIApp:
    """`POST /v1/batches`."""
    batches = service_of(request)
    body, headers = await read_body(request, BatchRequest, {})
    if body.endpoint not in ENDPOINTS:
        raise InvalidRequest(f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    if body.endpoint == EMBEDDINGS and request.app.state.embedder is None:
        raise InvalidRequest(
            "this server has no embedding model; start it with --embedding-model", param="endpoint"
        )
    if body.completion_window != "24h":
        raise InvalidRequest("completion_window must be '24h'", param="completion_window")
    if len(body.metadata or {}) > MAX_METADATA:
        raise InvalidRequest(f"metadata holds more than {MAX_METADATA} keys", param="metadata")
    try:
        msgspec.json.encode(body.metadata)
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "metadata holds half of a surrogate pair, which is no character", param="metadata"
        ) from error
    client, database = client_of(request), batches.database
    if await batches.on_disk(database.file, body.input_file_id, client.owner) is None:
        raise _missing("file", body.input_file_id, "input_file_id")
    try:
        row = await batches.on_disk(
            database.add_batch,
            client.owner,
            client.tenant,
            body.endpoint,
            body.input_file_id,
            body.metadata,
            WINDOW_SECONDS,
            batches.section.max_owner_bytes,
        )
    except StorageFull as error:
        raise _full(error, "input_file_id") from error
    batches.wake()
    return json_response(batch_body(row), headers=headers)


async def list_batches(request: Request) -> ASGIApp:
    """`GET /v1/batches`."""
    batches = service_of(request)
    rows = await batches.on_disk(batches.database.batches, client_of(request).owner)
    return json_response(_page(request, [batch_body(row) for row in rows]))


async def one_batch(request: Request) -> ASGIApp:
    """`GET /v1/batches/{id}`."""
    return json_response(batch_body(await _find_batch(request)))


async def cancel_batch(request: Request) -> ASGIApp:
    """`POST /v1/batches/{id}/cancel`: what has been answered stays."""
    batches, row = service_of(request), await _find_batch(request)
    await batches.on_disk(batches.database.cancel, row["id"])
    batches.wake()
    return json_response(batch_body(await _find_batch(request)))


def _full(error: StorageFull, param: str) -> HTTPError:
    return HTTPError(
        413,
        f"your files, and batches under way, hold {error.held} of {error.most} bytes, and this "
        f"needs {error.more} more; delete files that are no longer needed, answers of batches "
        "among them, or wait for batches to end",
        param=param,
        code="storage_limit_exceeded",
    )


def service_of(request: Request) -> Batches:
    """The server's batches. Raises HTTPError if it has none."""
    ready_engine(request)
    service: Batches | None = request.app.state.batches
    if service is None and not request.app.state.wants_batches:
        raise HTTPError(
            404,
            "files and batches are switched off here (batches.enabled)",
            code="batches_unavailable",
        )
    if service is None:
        raise HTTPError(
            503,
            "files and batches are not here: another server has their folder, or it could not be "
            "used; see the log, and set batches.folder",
            code="batches_unavailable",
        )
    return service


def batch_body(row: Row) -> dict[str, Any]:
    """A batch as OpenAI shows it."""
    errors = json.loads(row["errors"] or "null")
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": None if errors is None else {"object": "list", "data": errors},
        "input_file_id": row["input_file_id"],
        "completion_window": "24h",
        "status": row["status"],
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        **{f"{name}_at": row[f"{name}_at"] for name in (*times, "cancelled")},
        "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
        "metadata": json.loads(row["metadata"] or "null"),
    }


def _file(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
    }


def _seconds(value: Any) -> int | None:
    """After how long a file is forgotten."""
    if value is None:
        return None
    if not isinstance(value, str) or not 3600 <= _number(value) <= 2_592_000:
        raise InvalidRequest(
            "expires_after[seconds] must be between 3600 and 2592000", param="expires_after"
        )
    return int(value)


def _page(request: Request, items: list[dict[str, Any]]) -> dict[str, Any]:
    """A part of a list: `limit` items behind the one called `after`."""
    query = request.query_params
    limit = query.get("limit", str(PAGE))
    if not 1 <= _number(limit) <= MOST:
        raise InvalidRequest(f"limit must be between 1 and {MOST}", param="limit")
    if (after := query.get("after")) is not None:
        places = [number for number, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"there is nothing called {after[:100]!r}", param="after")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }


def _number(text: str) -> int:
    """A whole number, or -1."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else -1


async def _find_file(request: Request) -> Row:
    batches, identifier = service_of(request), request.path_params["id"]
    row = await batches.on_disk(batches.database.file, identifier, client_of(request).owner)
    if row is None:
        raise _missing("file", identifier)
    return row


async def _find_batch(request: Request) -> Row:
    batches, identifier = service_of(request), request.path_params["id"]
    row = await batches.on_disk(batches.database.batch, identifier)
    if row is None or row["owner"] != client_of(request).owner:
        raise _missing("batch", identifier)
    return row


def _missing(kind: str, identifier: str, param: str | None = None) -> HTTPError:
    return HTTPError(404, f"there is no {kind} {identifier[:100]!r}", code="not_found", param=param)
