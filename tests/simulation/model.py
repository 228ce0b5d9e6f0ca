"""A fake model behind the engine's stepper: it keeps (namespace, token) where a model keeps KV."""

from __future__ import annotations

import os
import random
from collections import deque

from engine.errors import DeviceLost
from engine.scheduling.plan import Chunk, Move, Plan, StepResult
from engine.scheduling.sequence import Sequence
from engine.scheduling.snapshots import Kept
from engine.scheduling.window_pages import WindowPages
from tests.simulation.clock import VirtualLoop

BASE = 26
State = tuple[bytes, int, int]
Held = tuple[bytes, int] | None


def fold(digest: int, token: int) -> int:
    """The digest of one token more."""
    return (digest * 1_000_003 + token + 1) & 0xFFFFFFFFFFFF


def token_after(digest: int) -> int:
    """What the model says after a text: it depends on every token."""
    return 97 + (digest >> 7) % BASE


def expected(prompt: list[int], count: int) -> list[int]:
    """What a request is to get."""
    digest = 0
    for token in prompt:
        digest = fold(digest, token)
    made = []
    for _ in range(count):
        made.append(token_after(digest))
        digest = fold(digest, made[-1])
    return made


class FakeStepper:
    """Runs steps in virtual time, one after another, and fails now and then.

    A position of the cache holds the digest of all tokens up to it, and whose it is; reading a
    position that another namespace wrote, or one that is not what comes next, ends the simulation.
    With `windows`, window pages hold the same, and are read as far as the window goes.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        chance: random.Random,
        pages: int,
        page_size: int,
        failures: float,
        *,
        recurrent: bool = False,
        windows: WindowPages | None = None,
    ) -> None:
        self._loop = loop
        self._chance = chance
        self._size = page_size
        self._failures = failures
        self._kv: list[Held] = [None] * (pages * page_size)
        self._cold: dict[int, list[Held]] = {}
        self._window = windows.window if windows is not None else 0
        self._near: list[Held] = [None] * (windows.total * page_size if windows is not None else 0)
        self._cold_near: dict[int, list[Held]] = {}
        self._last: dict[int, int] = {}
        # By place: whose it is, how many tokens it has seen, and their digest.
        self._states: dict[int, State] | None = {} if recurrent else None
        self._ready: deque[StepResult | Exception] = deque()
        self._life = 0
        self._away = False
        self._told = True
        self._read, self._write = os.pipe()
        self._free_at = 0.0
        self._keeping: dict[Sequence, Kept] = {}
        # Of failed steps: what they should have written is not there.
        self._lost: set[Sequence] = set()

    @property
    def available(self) -> bool:
        return self._told and not self._away

    @property
    def losses(self) -> int:
        return self._life

    @property
    def lead(self) -> float:
        return 0.002

    def lose(self) -> None:
        """The device goes, with all that it holds and does, and comes back after a while."""
        if self._away:
            return
        self._life += 1
        self._away, self._told = True, False
        self._kv = [None] * len(self._kv)
        self._near = [None] * len(self._near)
        self._cold, self._cold_near, self._last, self._lost = {}, {}, {}, set()
        self._states = None if self._states is None else {}
        self._free_at = self._loop.time()
        self._finish(DeviceLost("gone"), self._life)
        self._loop.call_later(self._chance.uniform(0.1, 3.0), self._return)

    def submit(self, plan: Plan) -> None:
        if not self._told:
            return
        assert not self._away, "a step for a device that is not there"
        seconds = (0.002 + 0.0004 * (plan.work.decodes + plan.work.prefill)) * (
            self._chance.uniform(0.7, 1.5) if self._chance.random() < 0.95 else 8.0
        )
        self._free_at = max(self._free_at, self._loop.time()) + seconds
        outcome: StepResult | Exception
        self._lost.difference_update(plan.admitted)
        if self._chance.random() < self._failures:
            outcome = RuntimeError("device lost")
            self._lost = {*plan.decodes, *(chunk.sequence for chunk in plan.chunks)}
        else:
            outcome = self._run(plan)
        self._loop.call_at(self._free_at, self._finish, outcome, self._life)

    def ready(self) -> bool:
        return bool(self._ready)

    def result(self) -> StepResult:
        os.read(self._read, 1)
        outcome = self._ready.popleft()
        if isinstance(outcome, DeviceLost):
            self._told = True
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)

    def _return(self) -> None:
        self._away = False

    def _finish(self, outcome: StepResult | Exception, life: int) -> None:
        if life != self._life:
            return
        self._ready.append(outcome)
        os.write(self._write, b"\0")

    def _run(self, plan: Plan) -> StepResult:
        for move in plan.moves:
            self._move(*move)
        ids = []
        self._keeping = dict(plan.kept)
        for sequence in plan.decodes:
            at = sequence.scheduled - 1
            ids.append(self._compute(sequence, at, [self._last[sequence.slot]], write=True))
        for chunk in plan.chunks:
            ids += self._chunk(chunk)
        count = len(ids)
        return StepResult(ids, [-0.5] * count, [[]] * count, {"forward": 0.0, "move": 0.0})

    def _chunk(self, chunk: Chunk) -> list[int]:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        if chunk.given:
            self._last.pop(sequence.slot, None)  # known again once it draws alone
            return [
                self._compute(sequence, at, [token], write=True, keep=chunk.sample)
                for at, token in enumerate(chunk.given, start=chunk.start)
            ]
        tokens = sequence.tokens[chunk.start : end]
        drawn = self._compute(sequence, chunk.start, tokens, write=chunk.write, keep=chunk.sample)
        scored = sequence.tokens[end - chunk.rows + 1 : end + 1 - chunk.sample]
        return [*scored, drawn] if chunk.sample else scored if chunk.rows else []

    def _compute(
        self,
        sequence: Sequence,
        start: int,
        tokens: list[int],
        *,
        write: bool,
        keep: bool = True,
    ) -> int:
        """Write positions from `start` on, each after the one before it; returns the next token."""
        mine, digest = sequence.request.namespace, 0
        if sequence in self._lost:
            return 0  # nobody will see it
        if self._chance.random() < 0.02:
            self._check_all(sequence, start)
        if start:
            held = self._kv[self._slot(sequence, start - 1)]
            assert held is not None, "a position is read that nobody wrote"
            assert held[0] == mine, "a page of another namespace is seen"
            digest = held[1]
        for position in range(max(0, start - self._window + 1), start if self._window else 0):
            near = self._near[self._near_slot(sequence, position)]
            assert near == self._kv[self._slot(sequence, position)], "a window page is another's"
        if self._states is not None:
            state = self._states.get(sequence.slot) if start else (mine, 0, 0)
            assert state == (mine, start, digest), "a state is not that of the tokens so far"
        self._keep(sequence, start, digest)
        for position, token in enumerate(tokens, start=start):
            digest = fold(digest, token)
            self._keep(sequence, position + 1, digest)
            if write:
                self._kv[self._slot(sequence, position)] = (mine, digest)
                if self._window:
                    self._near[self._near_slot(sequence, position)] = (mine, digest)
            else:
                assert self._kv[self._slot(sequence, position)] == (mine, digest), "not the same"
                if self._window:
                    near = self._near[self._near_slot(sequence, position)]
                    assert near == (mine, digest), "not the same beside it"
        if keep:
            self._last[sequence.slot] = token_after(digest)
        if self._states is not None:
            self._states[sequence.slot] = (mine, start + len(tokens), digest)
        return token_after(digest)

    def _keep(self, sequence: Sequence, count: int, digest: int) -> None:
        """Put a state where it is to be kept, if it is this one."""
        kept = self._keeping.get(sequence)
        if kept is not None and kept.pages * self._size == count:
            assert self._states is not None
            self._states[kept.place] = (sequence.request.namespace, count, digest)

    def _check_all(self, sequence: Sequence, count: int) -> None:
        """Every position that will be read is what the sequence's own tokens made."""
        digest, mine = 0, sequence.request.namespace
        for position, token in enumerate(sequence.tokens[:count]):
            digest = fold(digest, token)
            held = self._kv[self._slot(sequence, position)]
            assert held == (mine, digest), f"position {position} holds something else"

    def _slot(self, sequence: Sequence, position: int) -> int:
        page, offset = divmod(position, self._size)
        return sequence.pages[page] * self._size + offset

    def _near_slot(self, sequence: Sequence, position: int) -> int:
        page, offset = divmod(position, self._size)
        assert page >= sequence.window_start, "a window page is read that was given up"
        return sequence.window_pages[page] * self._size + offset

    def _move(self, kind: Move, source: int, target: int) -> None:
        size = self._size
        page = slice(source * size, (source + 1) * size)
        into = slice(target * size, (target + 1) * size)
        if kind is Move.COPY:
            self._kv[into] = self._kv[page]
        elif kind is Move.DEMOTE:
            self._cold[target] = self._kv[page]
        elif kind is Move.RESTORE:
            self._kv[into] = self._cold.get(source, [None] * size)
        elif kind is Move.COPY_WINDOW:
            self._near[into] = self._near[page]
        elif kind is Move.DEMOTE_WINDOW:
            self._cold_near[target] = self._near[page]
        elif kind is Move.RESTORE_WINDOW:
            self._near[into] = self._cold_near.get(source, [None] * size)
        elif kind is Move.RESUME:
            assert self._states is not None
            self._states.pop(target, None)
            if source in self._states:
                self._states[target] = self._states[source]
        else:
            self._kv[page] = [None] * size
