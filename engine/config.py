"""The configuration: one frozen tree, read from TOML plus `section.field=value` overrides."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engine.errors import ConfigError

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
PolicyName = Literal["lru", "lfu", "sieve", "cost", "adaptive"]


class ModelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model (`none` serves only an encoder), and how its numbers are stored while serving.
    While requests wait for each other, steps are computed with a second set of weights in
    `busy_dtype`, if that is not `none`: faster, less exact, and with more memory taken.
    `keep_packed` keeps weights that took long to repack for the native kernels on disk, for the
    next start. What requests leave out of how tokens are drawn is as the model's makers recommend,
    or as OpenAI has it without `recommended_sampling`. `checksums` names a list of `sha256sum`'s,
    beside the model, by which its files are checked at every start."""

    name: str = "smollm2-135m"
    revision: str | None = None
    served_name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    busy_dtype: Literal["none", "bfloat16", "int8", "int4"] = "none"
    max_context: NonNegative = 0
    keep_packed: bool = True
    recommended_sampling: bool = True
    checksums: str = ""


class CacheSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paged KV cache. `tokens` 0 sizes it from `memory_fraction` of the free memory.

    An `adaptive` pool gives memory back when the machine runs short of it, and grows again.
    `cold_tokens` that were evicted are kept in a file in `cold_folder` (the cache folder if
    empty), as stored or rounded to `cold_dtype`. What a request has computed that was set aside, or
    whose tools are being called, is forgotten after all else for `lease_seconds`. Of models whose
    layers keep a state instead, `snapshots` of it are kept beside those of who runs, for requests
    that begin alike; `auto` are as many as may run, in up to half of the cache's memory. Layers
    with a sliding window keep little more than that of a sequence if memory is short (`windows` is
    `auto`), or as much as the others (`whole`), so that requests can begin anywhere in a context.
    Host memory for `ahead_mb` of pages is taken from the system before they are needed, while
    nothing runs.
    """

    page_size: Annotated[int, Meta(ge=1, le=1024)] = 16
    tokens: NonNegative = 0
    memory_fraction: Annotated[float, Meta(gt=0, le=0.9)] = 0.25
    adaptive: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    prefix_caching: bool = True
    eviction: PolicyName = "adaptive"
    cold_tokens: NonNegative = 0
    cold_folder: str = ""
    cold_dtype: Literal["auto", "int8", "int4"] = "auto"
    lease_seconds: Annotated[float, Meta(ge=0)] = 120.0
    snapshots: Annotated[int, Meta(ge=0, le=65536)] | Literal["auto"] = "auto"
    windows: Literal["auto", "whole"] = "auto"
    ahead_mb: Annotated[int, Meta(ge=0, le=1 << 20)] = 1024


class SchedulerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What runs at once, and how long a step may take.

    Beside sequences that decode, a step may be predicted to take `target_itl_ms`; 0 finds a time
    that they hardly notice, or bear while a prompt is overdue. No step is predicted to take more
    than `max_step_ms`. While few run, up to `speculative_tokens` are guessed at once from what was
    said before, and checked in one step; `auto` are 8 on a CPU and none on a GPU.
    """

    target_itl_ms: Annotated[float, Meta(ge=0)] = 0.0
    max_step_ms: Annotated[float, Meta(gt=0)] = 250.0
    max_batch_tokens: Positive = 512
    max_running: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_prefilling: Positive = 8
    max_waiting: Positive = 1024
    max_waiting_tokens: Positive = 2_000_000
    patience_seconds: Annotated[float, Meta(gt=0)] = 30.0
    speculative_tokens: Annotated[int, Meta(ge=0, le=32)] | Literal["auto"] = "auto"
    look_ahead: bool = True


class ExecutionSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device. `threads` 0 uses every core; `instructions` is for the native kernels.
    `batch_invariant` makes a GPU's results independent of the batch, at a price; a CPU's are.
    `tensor_parallel` ranks, a process each, share the model, and the cores or a GPU each; then
    `threads` are those of one. On a CPU `exact_ranks` compute the very bits that one would."""

    backend: str = "auto"
    tensor_parallel: Annotated[int, Meta(ge=1, le=63)] = 1
    exact_ranks: bool = True
    batch_invariant: bool = False
    instructions: Literal["auto", "avx2", "avxvnni", "avx512", "avx512bf16"] = "auto"
    threads: NonNegative = 0
    stall_seconds: Annotated[float, Meta(gt=0)] = 30.0


class ServerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network side. Without `api_keys` and tenants it serves everybody who reaches the port.
    `tenants_file` says who has which key and which share (configs/tenants.toml), `mcp_file` which
    servers of the Model Context Protocol answers may call (configs/mcp.toml).

    A stream that nobody reads goes on for `resume_ttl_seconds` if its client may come back, at most
    `detached_streams` of them for each key; one that is read too slowly ends after
    `slow_consumer_seconds`. `max_streams` run at once on a WebSocket; `stored_responses` that have
    ended are kept in memory. An event stream says at least every `keepalive_seconds` that it lives.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    api_keys: tuple[str, ...] = ()
    tenants_file: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: Positive = 8 * 1024 * 1024
    drain_seconds: Annotated[float, Meta(ge=0)] = 30.0
    keepalive_seconds: Annotated[float, Meta(gt=0)] = 15.0
    resume_ttl_seconds: Annotated[float, Meta(ge=0)] = 60.0
    detached_streams: NonNegative = 16
    slow_consumer_seconds: Annotated[float, Meta(gt=0)] = 30.0
    stored_responses: NonNegative = 1000
    max_streams: Positive = 32
    mcp_file: str = ""

    @property
    def asks_for_keys(self) -> bool:
        """Whether only those with a key are served."""
        return bool(self.api_keys or self.tenants_file)


class LoggingSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is logged to standard error: lines for people, or `json` in the Elastic Common Schema;
    with `requests` a line for each that has ended. Prompts and answers are in it only with
    `prompts`, which also asks for the line."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: bool = False
    prompts: bool = False


class TracingSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Traces, sent to an OTLP collector's `endpoint` (http://host:4318/v1/traces) if there is one:
    those of a share of all traces, chosen by their ids unless the client has chosen, and all that
    fail or take `slow_seconds`; beside them every `step_every`-th step (0 for none) and all that
    take `slow_step_seconds`, with links to the requests that they served."""

    endpoint: str = ""
    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1
    slow_seconds: Annotated[float, Meta(gt=0)] = 10.0
    step_every: Annotated[int, Meta(ge=0)] = 1000
    slow_step_seconds: Annotated[float, Meta(gt=0)] = 1.0
    service: str = "ryzanstein"


class EmbeddingSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An encoder for `/v1/embeddings`, found as the model that generates is; none if `model` is
    empty. More than `max_waiting_tokens` do not wait for it."""

    model: str = ""
    served_name: str = ""
    max_waiting_tokens: Positive = 1_000_000


class BatchSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files and batches, kept in `folder` (one of the cache folder's if empty). At most
    `max_running` lines are answered at once, and none is begun while interactive requests wait.
    Who has files of `max_owner_bytes`, answers included, has to delete some before sending more."""

    enabled: bool = True
    folder: str = ""
    max_running: Positive = 16
    max_file_bytes: Positive = 200 * 1024 * 1024
    max_owner_bytes: Positive = 4 * 1024**3


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set."""

    model: ModelSection = ModelSection()
    cache: CacheSection = CacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    execution: ExecutionSection = ExecutionSection()
    server: ServerSection = ServerSection()
    embedding: EmbeddingSection = EmbeddingSection()
    batches: BatchSection = BatchSection()
    logging: LoggingSection = LoggingSection()
    tracing: TracingSection = TracingSection()


def load_config(
    file: Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Read `file`, apply `a.b=value` overrides as people write them, then `values` by dotted path.

    Raises ConfigError naming the field that is wrong.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error
    for override in overrides:
        _set(tree, *_parse(override))
    for path, value in (values or {}).items():
        _set(tree, path, value)
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration: {error}{_choice(str(error))}") from error


def _parse(override: str) -> tuple[str, Any]:
    """Path and value; the value is read as TOML, or taken as text if it is none."""
    path, separator, text = override.partition("=")
    if not separator or not all(path.strip().split(".")):
        raise ConfigError(f"--set {override!r}: write it as section.field=value")
    try:
        return path.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip(), text


def _choice(error: str) -> str:
    """What a setting may be where msgspec's message does not say it: names, and perhaps numbers."""
    path = re.search(r"(?:enum value|`int \| str`).* - at `\$\.([a-z_.]+)`$", error)
    if path is None:
        return ""
    kind: Any = msgspec.inspect.type_info(Config)
    for name in path[1].split("."):
        kind = next(field.type for field in kind.fields if field.name == name)
    kinds = getattr(kind, "types", (kind,))
    names = [str(v) for k in kinds for v in getattr(k, "values", ())]
    numbers = [f"{k.ge} to {k.le}" for k in kinds if isinstance(k, msgspec.inspect.IntType)]
    return f"; it takes {' or '.join((*numbers, *names))}"


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set one dotted path."""
    *sections, field = path.split(".")
    table = tree
    for key in sections:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {key} is a value, not a section")
    table[field] = value
