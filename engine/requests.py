"""From what a caller asks for to a request that the scheduler takes: checked, with all defaults."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.parts import Parts
from engine.scheduling.admission import check_ids, check_length, share_tokens
from engine.types import Request, SamplingParams, Terms


def make_request(
    parts: Parts,
    ids: Sequence[int],
    params: SamplingParams,
    terms: Terms,
    *,
    request_id: str | None,
    seed: int,
    arrival: float,
) -> Request:
    """Raises InvalidRequest if it can never be served. `seed` is taken if `params` name none."""
    if not parts.generates:
        raise InvalidRequest(f"{parts.model_name} only embeds; nothing here generates text")
    scheduler = parts.scheduler
    tenant = scheduler.queue.tenant(terms.tenant)
    room = share_tokens(tenant, scheduler.pool.total, scheduler.pool.page_size)
    max_tokens = check_length(len(ids), params.max_tokens, parts.limits, room)
    check_ids(ids, parts.vocab_size)
    return Request(
        id=request_id or uuid.uuid4().hex,
        prompt_ids=tuple(map(int, ids)),  # an array's numbers are none that can be sent
        sampling=params,
        max_tokens=max_tokens,
        seed=(seed if params.seed is None else params.seed) % 2**64,
        arrival=arrival,
        priority=min(terms.priority, tenant.max_priority),
        deadline=arrival + terms.deadline,
        first_token_deadline=arrival + terms.first_token_deadline,
        target_itl=terms.target_itl,
        tenant=terms.tenant,
        namespace=terms.namespace,
        trace=terms.trace,
        lease=terms.lease,
        eos_token_ids=parts.tokenizer.eos_token_ids,
    )


def render_chat(parts: Parts, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The prompt that the model's chat template makes of `messages`; `options` are those of
    `ChatTemplate.render`. Raises InvalidRequest if it has none, or refuses them."""
    template = parts.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            f"{parts.model_name} has no chat template (it is a base model); "
            "use completions instead",
            param="messages",
            code="no_chat_template",
        )
    return template.render(messages, **options)
