"""Progress bars for start-up, and the summary that follows them."""

from __future__ import annotations

import json
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from engine.parts import Parts

BYTES = ("download", "unpack")


class AmountColumn(ProgressColumn):
    """Bytes for what is measured in bytes, counts for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn()
        self._count = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        column = self._bytes if task.description in BYTES else self._count
        return column.render(task)


class StartupProgress:
    """A bar per stage; call it with (stage, done, total) from any thread."""

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description:9}"), BarColumn())
        self._progress = Progress(*columns, AmountColumn(), TimeElapsedColumn(), console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StartupProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)


def print_summary(
    console: Console, parts: Parts, host: str, port: int, seconds: float, *, keys: bool
) -> None:
    """What was started, how long each stage took, and how to try it."""
    stages = "  ".join(f"{name} {spent:.2f}s" for name, spent in parts.timeline)
    console.print(f"[bold]Ready[/] in {seconds:.1f}s  [dim]({stages})[/]")
    console.print(f"  model    {escape(parts.model_name)}")
    console.print(f"  device   {escape(parts.device)}")
    context = parts.limits.context
    if parts.generates:
        console.print(f"  KV cache {parts.cache_tokens:,} tokens; context {context:,} tokens")
    if parts.recommended:
        drawn = ", ".join(f"{name} {value:g}" for name, value in parts.recommended.items())
        console.print(f"  sampling {drawn}, where a request says nothing")
    if parts.budget is not None:
        spent = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.budget.lines())
        console.print(f"  memory   {spent}")
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    console.print(f"  address  {address}\n")
    example = example_request(parts, address, keys=keys)
    console.print(example, markup=False, highlight=False, soft_wrap=True)


def example_request(parts: Parts, address: str, *, keys: bool) -> str:
    """A curl command that streams an answer from this model, or has it embed a text."""
    key = '  -H "Authorization: Bearer $RYZANSTEIN_API_KEY" \\\n' if keys else ""
    body: dict[str, object] = {"model": parts.model_name}
    if not parts.generates:
        path, body["input"] = "embeddings", "The sky is blue."
        return _curl(address, path, key, body)
    body |= {"stream": True, "max_tokens": 128}
    if parts.tokenizer.chat_template is not None:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "Why is the sky blue?"}]
    else:
        path, body["prompt"] = "completions", "The sky is blue because"
    return _curl(address, path, key, body)


def _curl(address: str, path: str, key: str, body: dict[str, object]) -> str:
    return (
        f"curl -N {address}/v1/{path} \\\n"
        f"{key}  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'\n"
    )
