"""Several ranks behind the engine: real processes, a tiny model, and SmolLM2."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest

from engine import AsyncEngine, ConfigError, EngineFailed, Grammar, SamplingParams
from engine.execution.parallel import FIRST_SECONDS, LEAST_SECONDS, Pace, RankStepper
from tests.engine.execution import faults
from tests.kernels.native import needs_native
from tests.server.process import ServerProcess
from tests.tiny import write_llama

pytestmark = needs_native


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("ranks") / "tiny")


def engine_of(model: Path, ranks: int = 2, **more: object) -> AsyncEngine:
    options = {"execution__tensor_parallel": ranks, "cache__tokens": 4096, **more}
    return AsyncEngine.from_pretrained(str(model), **options)


REQUESTS = [
    SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.0, seed=5, top_k=40, ignore_eos=True),
    SamplingParams(max_tokens=20, seed=1, repetition_penalty=1.3, presence_penalty=0.5, n=2),
    SamplingParams(max_tokens=9, temperature=0.0, logprobs=2, prompt_logprobs=1, min_tokens=5),
    SamplingParams(max_tokens=12, seed=3, logit_bias={65: 5.0, 66: -100.0}),
    SamplingParams(max_tokens=20, seed=8, grammar=Grammar("regex", "[a-z ]{6,14}!")),
]


async def everything(engine: AsyncEngine) -> list[object]:
    """What a mixture of requests gets, all at once."""
    got: dict[int, list[object]] = {}

    async def one(number: int, params: SamplingParams) -> None:
        found: list[object] = []
        async for delta in engine.generate(f"a prompt, number {number}, of some length", params):
            found += [(delta.index, i) for i in delta.token_ids]
            found += [*delta.logprobs, *(delta.prompt_logprobs or [])]
        got[number] = sorted(found, key=repr)

    async with anyio.create_task_group() as group:
        for number, params in enumerate(REQUESTS * 2):
            group.start_soon(one, number, params)
    return [got[number] for number in sorted(got)]


async def test_ranks_give_what_one_gives_whatever_is_asked(model: Path) -> None:
    """Seeded draws, penalties, biases, logprobs, a grammar; the cache is small, so pages are taken
    away."""
    answers = []
    for ranks in (1, 2, 4):
        async with engine_of(model, ranks, cache__tokens=384) as engine:
            answers.append(await everything(engine))
    assert answers[0] == answers[1] == answers[2]


async def test_ranks_that_sum_repeat_themselves_bit_for_bit(model: Path) -> None:
    runs = []
    for _ in range(2):
        async with engine_of(model, execution__exact_ranks=False) as engine:
            assert engine.parts.device.startswith("CPU")
            assert "on 2 ranks" in engine.parts.device
            runs.append(await everything(engine))
    assert runs[0] == runs[1]


async def test_a_rank_that_dies_hangs_or_fails_ends_every_stream_and_is_replaced() -> None:
    """One of each kind; `python -m tests.engine.execution.faults` has any number of them."""
    found = await faults.run(3, seed=1)
    assert all(len(seconds) == 1 for seconds in found.values())


async def test_a_loss_while_nothing_runs_costs_nobody_anything(model: Path) -> None:
    """Above all not the next request, whose prompt was in the cache that is gone."""
    async with engine_of(model) as engine:
        wanted = await faults.answer(engine)
        stepper = engine.parts.stepper
        assert isinstance(stepper, RankStepper)
        os.kill(stepper.pids[1], signal.SIGKILL)
        with anyio.fail_after(5):
            while engine.health() != "restarting":
                await anyio.sleep(0.01)
        assert await faults.answer(engine) == wanted
        assert stepper.losses == 1


async def test_three_losses_in_a_row_are_the_end(model: Path, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    async with engine_of(folder) as engine:
        stepper = engine.parts.stepper
        assert isinstance(stepper, RankStepper)
        (folder / "model.safetensors").unlink()
        os.kill(stepper.pids[0], signal.SIGKILL)
        with anyio.fail_after(60):
            error = await engine.failure()
        assert "3 times in a row" in str(error)
        assert engine.health() == "failed"
        with pytest.raises(EngineFailed):
            await engine.submit("hello")


def test_a_server_whose_ranks_cannot_be_had_again_exits_with_one(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    server = ServerProcess("--model", str(folder), "--tensor-parallel", "2")
    server.__enter__()
    (folder / "model.safetensors").unlink()
    ranks = children(server._process.pid)
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGSTOP)
    # It is seen once somebody wants something.
    body = {"model": folder.name, "prompt": "ab", "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 503
    assert server.wait() == 1
    assert "3 times in a row the ranks were lost" in server.log
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_ranks_do_not_outlive_a_server_that_is_killed(model: Path) -> None:
    server = ServerProcess("--model", str(model), "--tensor-parallel", "2")
    server.__enter__()
    ranks = children(server._process.pid)
    assert len(ranks) == 2
    server._process.kill()
    server.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    found = []
    for task in tasks:
        with suppress(FileNotFoundError):  # a thread that has just ended has no children
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "cannot be split among 3 ranks"),
        ({"num_hidden_layers": 3}, "has no tensor"),
    ],
)
async def test_what_cannot_be_loaded_is_refused_in_one_sentence(
    model: Path, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    folder = write_llama(tmp_path / "model")
    config = (folder / "config.json").read_text()
    for key, value in changes.items():
        before = config[config.index(f'"{key}"') :].split(",")[0]
        config = config.replace(before, f'"{key}": {value}')
    (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        async with engine_of(folder, ranks=3):
            pass


def test_a_step_hangs_after_ten_times_what_it_usually_takes_but_not_before_a_second() -> None:
    pace = Pace()
    assert pace.limit(0.0) > 60, "nobody knows what it should take"
    assert pace.limit(0.2) == 2.0
    for _ in range(200):
        pace.observe(0.01)
    assert pace.limit(0.01) == LEAST_SECONDS
    assert pace.limit(0.01, first=True) == FIRST_SECONDS, "it touches all of its memory"
    assert pace.limit(0.5) == 5.0
    for _ in range(200):
        pace.observe(0.3)
    assert pace.limit(0.01) == pytest.approx(3.0)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 2
    while left := children(os.getpid()):
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.05)


async def test_numbers_of_other_libraries_harm_nobody(model: Path) -> None:
    """Token ids and parameters as numpy makes them, and a text that cannot be encoded."""
    async with engine_of(model) as engine:
        ids = np.array([5, 6, 7])
        params = SamplingParams(max_tokens=4, top_k=np.int64(5), stop=("\ud800",), seed=1)
        found = [i async for d in engine.generate(ids, params) for i in d.token_ids]  # type: ignore[arg-type]
        assert len(found) == 4
        stepper = engine.parts.stepper
        assert isinstance(stepper, RankStepper)
        assert stepper.losses == 0


async def test_memory_given_back_while_ranks_start_waits_for_them(model: Path) -> None:
    async with engine_of(model) as engine:
        wanted = await faults.answer(engine)
        stepper, scheduler = engine.parts.stepper, engine.parts.scheduler
        assert isinstance(stepper, RankStepper)
        os.kill(stepper.pids[0], signal.SIGKILL)
        while engine.health() != "restarting":
            await anyio.sleep(0.01)
        scheduler.resize(scheduler.pool.total - 32)
        assert scheduler.prefixes.urgent
        engine._wake.set()
        await anyio.sleep(0.1)
        assert engine.health() == "restarting"
        assert await faults.answer(engine) == wanted


async def test_weights_that_have_changed_are_not_served_under_the_old_name(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    async with engine_of(folder) as engine:
        stepper = engine.parts.stepper
        assert isinstance(stepper, RankStepper)
        file = folder / "model.safetensors"
        os.utime(file, ns=(0, 0))
        os.kill(stepper.pids[0], signal.SIGKILL)
        with anyio.fail_after(60):
            error = await engine.failure()
        assert "files have changed" in str(error)


def test_signals_to_all_processes_are_the_servers_alone(model: Path) -> None:
    """As a terminal's Ctrl-C, and a service manager's SIGTERM to the control group."""
    server = ServerProcess("--model", str(model), "--tensor-parallel", "2")
    with server:
        for pid in children(server._process.pid):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        body = {"model": model.name, "prompt": "ab", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200
        assert server.metric("ryzanstein_rank_losses_total") == 0


def test_a_pause_of_everything_is_no_hang(model: Path) -> None:
    """Ctrl-Z, a frozen container, a machine that slept."""
    server = ServerProcess("--model", str(model), "--tensor-parallel", "2")
    with server:
        pids = [server._process.pid, *children(server._process.pid)]
        answers: list[httpx.Response] = []
        body = {"model": model.name, "prompt": "ab", "max_tokens": 300, "ignore_eos": True}

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        while server.metric("ryzanstein_requests_running") == 0:
            time.sleep(0.001)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(2.5 if number == signal.SIGSTOP else 0)
        asking.join()
        assert answers[0].status_code == 200
        assert server.metric("ryzanstein_rank_losses_total") == 0
