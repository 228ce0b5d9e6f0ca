"""A conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import Any

from engine import AsyncEngine, SamplingParams
from server.answer_parser import Content, Piece, Reasoning
from server.answering import Wishes, prepare_answer

DIM, PLAIN = "\033[2m", "\033[0m"


async def answer_to(
    engine: AsyncEngine, messages: list[dict[str, Any]], params: SamplingParams
) -> str:
    """Print the answer to a conversation while it comes, reasoning dimly; its content."""
    answering = await prepare_answer(engine, messages, Wishes())
    parser = answering.parser() if answering.parser is not None else None
    content, shown = "", False

    def show(pieces: list[Piece]) -> None:
        nonlocal content, shown
        for piece in pieces:
            if isinstance(piece, Reasoning):
                shown = True
                _print(piece.text, dim=True)
            elif isinstance(piece, Content):
                if shown and not content:
                    _print("\n\n")
                content += piece.text
                _print(piece.text)

    stream = engine.generate(answering.ids, answering.applied(params))
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            show([Content(delta.text)] if parser is None else parser.push(delta.text))
    if parser is not None:
        show(parser.finish())
    _print("\n")
    return content


def _print(text: str, *, dim: bool = False) -> None:
    marked = dim and sys.stdout.isatty()
    sys.stdout.write(f"{DIM}{text}{PLAIN}" if marked else text)
    sys.stdout.flush()
