"""A real model fills in two hundred schemas: every answer that is finished is valid."""

from __future__ import annotations

import asyncio
import json

import jsonschema_rs

from engine import AsyncEngine, Grammar, SamplingParams
from tests.kernels.native import needs_native
from tests.schemas import Schema, schemas

pytestmark = needs_native


async def test_every_finished_answer_validates() -> None:
    forms = schemas()
    assert len({json.dumps(form, sort_keys=True) for form in forms}) == 200
    finished = 0

    async def fill_in(
        engine: AsyncEngine, number: int, form: Schema, room: asyncio.Semaphore
    ) -> None:
        nonlocal finished
        params = SamplingParams(max_tokens=128, seed=number, grammar=Grammar.json_schema(form))
        text, reason = "", None
        async with room:
            messages = [{"role": "user", "content": "Fill in the form with an example."}]
            async for delta in engine.chat(messages, params):
                text += delta.text
                reason = delta.finish_reason or reason
        if reason == "stop":
            finished += 1
            validator = jsonschema_rs.validator_for(form, validate_formats=True)
            validator.validate(json.loads(text))

    async with AsyncEngine.from_pretrained("smollm2-135m") as engine:
        room = asyncio.Semaphore(32)
        await asyncio.gather(*(fill_in(engine, n, form, room) for n, form in enumerate(forms)))
    # A small model writes some numbers and trees for ever.
    assert finished > 150
