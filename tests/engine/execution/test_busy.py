"""Two sets of weights in one engine: a step computes what an engine with only that set would."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import AsyncEngine, ConfigError, SamplingParams
from engine.models import load_model
from engine.scheduling.precision import Precision
from engine.types import StepStats, TokenLogprob
from engine.weights.checkpoint import open_checkpoint
from tests.audit import audit
from tests.kernels.native import NativeBackend, needs_native
from tests.tiny import write_llama

PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=0)
TWO = {"model__dtype": "float32", "model__busy_dtype": "int8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("busy") / "tiny"))


class Steps:
    """Which steps were busy."""

    def __init__(self) -> None:
        self.busy: list[bool] = []

    def on_step(self, stats: StepStats) -> None:
        self.busy.append(stats.busy)

    def on_request(self, stats: object) -> None: ...


async def answer(model: str, **settings: object) -> tuple[list[TokenLogprob], list[bool]]:
    """A greedy answer, and which steps were busy."""
    options = {"cache__tokens": 512, "cache__dtype": "float32", **settings}
    found: list[TokenLogprob] = []
    async with AsyncEngine.from_pretrained(model, **options) as engine:
        steps = Steps()
        engine.add_listener(steps)
        async for delta in engine.generate("a prompt of some length", PARAMS):
            found += delta.logprobs
        audit(engine.parts.scheduler)
    return found, steps.busy


def always(monkeypatch: pytest.MonkeyPatch, *pattern: bool) -> None:
    """Steps are busy in this order, again and again."""
    count = 0

    def choose(*_: object) -> bool:
        nonlocal count
        count += 1
        return pattern[count % len(pattern)]

    monkeypatch.setattr(Precision, "choose", choose)


@needs_native
async def test_a_step_is_computed_with_one_set_or_the_other(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, _ = await answer(model, model__dtype="float32")
    narrow, _ = await answer(model, model__dtype="int8")
    assert exact != narrow
    found, busy = await answer(model, **TWO)
    assert found == exact
    assert not any(busy)
    always(monkeypatch, True)
    found, busy = await answer(model, **TWO)
    assert found == narrow
    assert all(busy)


@needs_native
async def test_an_answer_goes_on_across_both_on_any_number_of_ranks(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, _ = await answer(model, model__dtype="float32")
    answers = []
    for ranks in (1, 2):
        always(monkeypatch, False, True, True)
        # Steps are not planned ahead, so that both runs have the same ones.
        more = {"execution__tensor_parallel": ranks, "scheduler__look_ahead": False}
        found, busy = await answer(model, **TWO, **more)
        assert {True, False} == set(busy)
        assert len(found) == PARAMS.max_tokens
        answers.append(found)
    assert answers[0] == answers[1] != exact


@needs_native
async def test_what_both_sets_have_alike_is_there_once(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, and the table and the head, which are int8 in both."""
    checkpoint = open_checkpoint(Path(model))
    one = NativeBackend("int8", 1)
    load_model(checkpoint, one)
    alone = NativeBackend("int4", 1)
    load_model(checkpoint, alone)
    beside = one.other_weights("int4")
    load_model(checkpoint, beside)
    assert beside.loaded_bytes(shared=True) == alone.loaded_bytes()
    assert beside.loaded_bytes() < alone.loaded_bytes() / 4
    narrow, _ = await answer(model, model__dtype="int4")
    always(monkeypatch, True)
    found, _ = await answer(model, model__dtype="int8", model__busy_dtype="int4")
    assert found == narrow


@needs_native
async def test_weights_that_are_not_narrower_are_refused(model: str) -> None:
    for dtype in ("int8", "int4"):
        with pytest.raises(ConfigError, match=r"busy_dtype is int8: .* choose a narrower one"):
            await answer(model, model__dtype=dtype, model__busy_dtype="int8", cache__dtype="auto")


async def test_torch_computes_in_one_format(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="busy_dtype: backend torch computes in one format"):
        await answer(model, execution__backend="torch", model__busy_dtype="bfloat16")
