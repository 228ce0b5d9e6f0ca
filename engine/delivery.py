"""From committed tokens to streams: text, stop strings, usage, and the end of each request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import InvalidRequest
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence as ScheduledSequence
from engine.scheduling.sequence import State
from engine.streams import Handout, TokenStream
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer
from engine.types import Choice, Clock, Decision, Delta, Listener, Request, RequestStats, Usage


@dataclass(slots=True)
class Active:
    """A request under way."""

    request: Request
    stream: TokenStream
    sequences: list[ScheduledSequence]
    open: int
    offset: int
    first_token: float | None = None
    # When each choice ended.
    ends: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Outlet:
    """Where one choice's tokens go: all that a token needs, since whatever else it touched would
    come from memory each time. `index` is the choice's in its stream, `known` how many of the
    sequence's tokens that has. The tokens of `plain` ones are text and no more, and no text ends
    them."""

    active: Active
    stream: TokenStream
    index: int
    detokenizer: Detokenizer
    plain: bool
    known: int
    # When it got its last token.
    last: float | None = None


class Delivery:
    """Owns the streams of all active requests; runs on the event loop, never blocks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        clock: Clock,
        listeners: Sequence[Listener],
    ) -> None:
        self._listeners = listeners
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._clock = clock
        self._active: dict[str, Active] = {}
        self._outlets: dict[ScheduledSequence, Outlet] = {}
        self._notes: list[Decision] = []
        self._handout = Handout()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._active

    def __len__(self) -> int:
        return len(self._active)

    @property
    def moving(self) -> int:
        """Active requests that have not been set aside."""
        return sum(
            any(s.state in (State.WAITING, State.RUNNING) for s in active.sequences)
            for active in self._active.values()
        )

    def open(
        self, request: Request, sequences: list[ScheduledSequence], stream: TokenStream
    ) -> None:
        """Start delivering a request's tokens to `stream`."""
        sampling = request.sampling
        offset = stream.join(request.id, len(sequences))
        active = Active(request, stream, sequences, open=len(sequences), offset=offset)
        self._active[request.id] = active
        scored = sampling.logprobs is not None or sampling.prompt_logprobs is not None
        for sequence in sequences:
            detokenizer = Detokenizer(
                self._tokenizer,
                sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
            )
            self._outlets[sequence] = Outlet(
                active,
                stream,
                offset + sequence.index,
                detokenizer,
                plain=not sampling.stop and not scored,
                known=sequence.prompt_length,
            )

    def deliver(self, moved: Sequence[ScheduledSequence]) -> dict[float, int]:
        """Push the new tokens of each sequence; ends those that finished or hit a stop string.

        Returns how many tokens came how many seconds after the one before them.
        """
        outlets, now = self._outlets, self._clock.now()
        gaps: dict[float, int] = {}
        # Most got their last token when the one before them got its.
        before, alike = now, 0
        for sequence in moved:
            outlet = outlets[sequence]
            last, outlet.last = outlet.last, now
            if last == before:
                alike += 1
            elif last is not None:
                _add(gaps, now - before, alike)
                before, alike = last, 1
            elif outlet.active.first_token is None:
                outlet.active.first_token = now
            tokens = sequence.tokens
            if outlet.plain and sequence.finish_reason is None and len(tokens) == outlet.known + 1:
                # One of many, as most are: what `_push` does, and does not have to.
                outlet.known += 1
                token = tokens[-1]
                text, _ = outlet.detokenizer.push(token)
                delta = Delta(index=outlet.index, text=text, token_ids=[token])
                self._handout.push(outlet.stream, delta)
                continue
            count = self._push(outlet, sequence, now)
            _add(gaps, 0.0, count - 1)
        _add(gaps, now - before, alike)
        return gaps

    def abort(self, request_id: str) -> None:
        """End a request at its owner's wish; unknown ids are ignored."""
        active = self._active.get(request_id)
        if active is None:
            return
        now = self._clock.now()
        for sequence in active.sequences:
            if sequence.state is not State.FINISHED:
                self._scheduler.finish(sequence, "abort")
                active.ends[sequence.index] = now
                active.open -= 1
                delta = Delta(index=active.offset + sequence.index, finish_reason="abort")
                delta.usage = _usage(active) if active.open == 0 else None
                self._handout.push(active.stream, delta)
        self._close(active, "abort")

    def pause(self, request_id: str) -> None:
        """Set a request aside; its stream stays open. Unknown ids are ignored."""
        if (active := self._active.get(request_id)) is not None:
            for sequence in active.sequences:
                if sequence.state in (State.WAITING, State.RUNNING):
                    self._note("pause", sequence, "its reader wants nothing now")
                self._scheduler.pause(sequence)

    def unpause(self, request_id: str) -> None:
        """Let a request that was set aside go on; unknown ids are ignored."""
        if (active := self._active.get(request_id)) is not None:
            now = self._clock.now()
            for sequence in active.sequences:
                if sequence.state is State.PAUSED:
                    self._note("unpause", sequence, "")
                    if sequence.generated:
                        # Its reader waits for the next token from now on.
                        self._outlets[sequence].last = now
                self._scheduler.unpause(sequence)

    def notes(self) -> list[Decision]:
        """What was decided here since the last call, for whoever is told."""
        notes, self._notes = self._notes, []
        return notes

    def request(self, request_id: str) -> Request | None:
        """An active request; None if it is none."""
        active = self._active.get(request_id)
        return None if active is None else active.request

    def choices(self, request_id: str) -> tuple[Choice, ...]:
        """How far an active request's choices are; none if it is none."""
        active = self._active.get(request_id)
        return () if active is None else _choices(active)

    def tokens(self, request_id: str) -> tuple[Sequence[int], list[list[int]]]:
        """An active request's prompt, and what its choices have added to it; also while listeners
        are told of its end."""
        active = self._active[request_id]
        prompt = active.request.prompt_ids
        return prompt, [sequence.tokens[len(prompt) :] for sequence in active.sequences]

    def waiting(self, request_id: str) -> ScheduledSequence | None:
        """The first sequence of a request if none of them has ever been let in."""
        active = self._active.get(request_id)
        if active is None or any(s.admitted_at is not None for s in active.sequences):
            return None
        return next((s for s in active.sequences if s.state is State.WAITING), None)

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request with an error; unknown ids are ignored."""
        active = self._active.get(request_id)
        if active is None:
            return
        now = self._clock.now()
        # What is wrong with a request is no error of ours, however late it shows.
        reason = "refused" if isinstance(error, InvalidRequest) else "error"
        for sequence in active.sequences:
            self._scheduler.finish(sequence, reason)
            active.ends.setdefault(sequence.index, now)
        active.stream.fail(error)
        self._close(active, reason)

    def fail_all(self, error: Exception, *, begun: bool = False) -> None:
        """End every request with an error, or only those that have `begun`."""
        for request_id in list(self._active):
            if not begun or self.waiting(request_id) is None:
                self.fail(request_id, error)

    def _push(self, outlet: Outlet, sequence: ScheduledSequence, now: float) -> int:
        """The new tokens of one sequence, which came just now; how many there are."""
        active, begin = outlet.active, outlet.known
        sampling = active.request.sampling
        fresh = sequence.tokens[begin:]
        delta = Delta(index=outlet.index, token_ids=fresh)
        if sequence.wants_prompt_logprobs and begin == sequence.prompt_length:
            delta.prompt_logprobs = sequence.prompt_logprobs
        stop: str | None = None
        # The token that ended the sequence is not part of the text, unless asked for.
        shown = sequence.finish_reason != "stop" or sampling.include_stop_str_in_output
        for number, token in enumerate(fresh, 1):
            if number == len(fresh) and not shown:
                break
            generated = begin + number - sequence.prompt_length
            armed = not sampling.min_tokens or generated >= sampling.min_tokens
            text, stop = outlet.detokenizer.push(token, match=armed)
            delta.text += text
            if stop is not None:
                # What was drawn together with the end of the text is none of it.
                sequence.account.give_back_output(len(fresh) - number)
                del fresh[number:], sequence.tokens[begin + number :]
                self._scheduler.finish(sequence, "stop")
                sequence.finish_reason = "stop"
                break
        outlet.known += len(fresh)
        if sampling.logprobs is not None:
            del sequence.logprobs[outlet.known - sequence.prompt_length :]
            delta.logprobs = sequence.logprobs[-len(fresh) :]
        if sequence.state is State.FINISHED:
            active.ends[sequence.index] = now
            if stop is None:
                delta.text += outlet.detokenizer.flush()
            delta.finish_reason = sequence.finish_reason
            delta.stop_reason = stop if stop is not None else sequence.stop_reason
            active.open -= 1
            if active.open == 0:
                delta.usage = _usage(active)
        self._handout.push(active.stream, delta)
        if active.open == 0:
            self._close(active, sequence.finish_reason or "stop")
        return len(fresh)

    def _note(self, kind: str, sequence: ScheduledSequence, reason: str) -> None:
        if self._listeners:
            at, request_id = self._clock.now(), sequence.request.id
            self._notes.append(Decision(kind, request_id, reason, at, sequence.index))

    def _close(self, active: Active, reason: str) -> None:
        usage = _usage(active)
        stats = RequestStats(
            id=active.request.id,
            tenant=active.request.tenant,
            arrival=active.request.arrival,
            first_scheduled=active.sequences[0].admitted_at,
            first_token=active.first_token,
            finished=self._clock.now(),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            preemptions=sum(s.preemptions for s in active.sequences),
            finish_reason=reason,
            trace=active.request.trace,
            choices=_choices(active),
        )
        for listener in self._listeners:
            listener.on_request(stats)
        del self._active[active.request.id]
        for sequence in active.sequences:
            del self._outlets[sequence]


def _add(counts: dict[float, int], key: float, count: int) -> None:
    if count > 0:
        counts[key] = counts.get(key, 0) + count


def _choices(active: Active) -> tuple[Choice, ...]:
    return tuple(
        Choice(s.index, s.generated, active.ends.get(s.index), s.finish_reason)
        for s in active.sequences
    )


def _usage(active: Active) -> Usage:
    return Usage(
        prompt_tokens=len(active.request.prompt_ids),
        completion_tokens=sum(s.generated for s in active.sequences),
        cached_tokens=active.sequences[0].cached,
    )
