"""Plans on their way to ranks: the server writes what changed, each rank keeps the rest."""

from __future__ import annotations

from collections.abc import Iterable

from engine.execution.messages import Entered, Part, Step
from engine.scheduling.plan import Chunk, Plan
from engine.scheduling.sequence import Sequence
from engine.scheduling.snapshots import Kept
from engine.types import Request, SamplingParams


class PlanWriter:
    """Turns plans into messages; knows which pages of each slot the ranks have been told."""

    def __init__(self) -> None:
        self._told: dict[int, int] = {}

    def write(self, plan: Plan) -> Step:
        """All that a rank has to know of a plan."""
        entered = []
        for sequence in plan.admitted:
            self._told[sequence.slot] = 0
            entered.append(
                Entered(
                    sequence.slot,
                    sequence.seed,
                    sequence.tokens,
                    sequence.prompt_length,
                    _drawing(sequence.request.sampling),
                    sequence.request.eos_token_ids,
                )
            )
        return Step(
            number=plan.step,
            entered=entered,
            pages=list(self._added((*plan.grown, *(chunk.sequence for chunk in plan.chunks)))),
            decodes=[(s.slot, s.scheduled) for s in plan.decodes],
            parts=[
                Part(c.sequence.slot, c.start, c.count, c.rows, c.sample, c.write, c.given)
                for c in plan.chunks
            ],
            moves=plan.moves,
            busy=plan.busy,
            kept=[(s.slot, kept.pages, kept.place) for s, kept in plan.kept],
        )

    def _added(self, sequences: Iterable[Sequence]) -> Iterable[tuple[int, list[int], list[int]]]:
        for sequence in sequences:
            told, count = self._told[sequence.slot], len(sequence.pages)
            if count > told:
                self._told[sequence.slot] = count
                yield sequence.slot, sequence.pages[told:], sequence.window_pages[told:]


class PlanReader:
    """A rank's own sequences, by slot, and the plans over them."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}

    def read(self, step: Step) -> Plan:
        """The plan that a message stands for."""
        admitted = []
        for entered in step.entered:
            sequence = self._sequences[entered.slot] = _sequence(entered)
            admitted.append(sequence)
        grown = []
        for slot, pages, window_pages in step.pages:
            self._sequences[slot].pages += pages
            self._sequences[slot].window_pages += window_pages
            grown.append(self._sequences[slot])
        decodes = []
        for slot, scheduled in step.decodes:
            sequence = self._sequences[slot]
            sequence.scheduled = scheduled
            decodes.append(sequence)
        chunks = [
            Chunk(
                self._sequences[p.slot], p.start, p.count, p.rows, p.sample, p.write, given=p.given
            )
            for p in step.parts
        ]
        kept = [
            (self._sequences[slot], Kept(pages, place, wanted=False))
            for slot, pages, place in step.kept
        ]
        return Plan(step.number, decodes, chunks, admitted, grown, step.moves, step.busy, kept)


def _drawing(sampling: SamplingParams) -> SamplingParams:
    """What a rank has to know to draw tokens, as numbers that can be sent, whatever they were."""
    return SamplingParams(
        min_tokens=int(sampling.min_tokens),
        temperature=float(sampling.temperature),
        top_k=int(sampling.top_k),
        top_p=float(sampling.top_p),
        min_p=float(sampling.min_p),
        repetition_penalty=float(sampling.repetition_penalty),
        presence_penalty=float(sampling.presence_penalty),
        frequency_penalty=float(sampling.frequency_penalty),
        logit_bias={int(token): float(value) for token, value in sampling.logit_bias.items()},
        stop_token_ids=tuple(int(token) for token in sampling.stop_token_ids),
        logprobs=None if sampling.logprobs is None else int(sampling.logprobs),
        grammar=sampling.grammar,
        prompt_logprobs=None if sampling.prompt_logprobs is None else int(sampling.prompt_logprobs),
    )


def _sequence(entered: Entered) -> Sequence:
    request = Request(
        id="",
        prompt_ids=tuple(entered.tokens[: entered.prompt_length]),
        sampling=entered.sampling,
        max_tokens=1,
        seed=entered.seed,
        arrival=0.0,
        eos_token_ids=entered.ends,
    )
    sequence = Sequence(request, 0, fingerprint=b"")
    sequence.tokens = entered.tokens
    sequence.slot = entered.slot
    return sequence
