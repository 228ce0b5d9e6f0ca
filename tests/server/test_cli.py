"""The command: what people see in their terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.cli import _settings
from tests.server.process import ROOT
from tests.tiny import write_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("cli") / "tiny"))


def ryzanstein(
    *arguments: str, text: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        cwd=ROOT,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "120"} | (env or {}),
        check=False,
    )


def test_generate_prints_text_and_nothing_else(model: str) -> None:
    arguments = ("generate", "Hello", "--model", model, "--max-tokens", "8", "--temperature", "0")
    first, second = ryzanstein(*arguments), ryzanstein(*arguments)
    assert first.returncode == 0
    assert first.stdout == second.stdout
    assert first.stdout.strip()
    assert "load" in first.stderr
    piped = ryzanstein("generate", *arguments[2:], text="Hello\n")
    assert piped.stdout == first.stdout


def test_chat_answers_each_line_until_the_end(model: str) -> None:
    lines = "hi\n\nand\n/bye\nnobody reads this\n"
    result = ryzanstein(
        "chat", "--model", model, "--max-tokens", "4", "--system", "Be brief.", text=lines
    )
    assert result.returncode == 0
    assert result.stdout.count("> ") == 4
    assert result.stdout.count("cut at 4 tokens") == 2
    assert ryzanstein("chat", "--model", model, text="").returncode == 0


def test_a_question_that_cannot_be_answered_ends_no_chat(model: str) -> None:
    lines = f"hi\n{'long ' * 300}\n/clear\nagain\n"
    result = ryzanstein("chat", "--model", model, "--max-tokens", "4", text=lines)
    assert result.returncode == 0
    assert result.stderr.count("error: the prompt has") == 1
    assert "/clear begins" in result.stderr
    assert result.stdout.count("cut at 4 tokens") == 2


def typed(terminal: int, text: bytes, until: bytes) -> bytes:
    """What comes back to something typed, up to a mark."""
    os.write(terminal, text)
    seen, deadline = b"", time.monotonic() + 30
    while until not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the command has ended
                break
    assert until in seen, seen
    return seen


def test_at_a_terminal_ctrl_c_stops_an_answer_and_pasted_lines_are_one_question(
    tmp_path: Path,
) -> None:
    # One that knows no end, and would go on for minutes.
    model = write_llama(tmp_path / "tiny", max_position_embeddings=1 << 16, vocab_size=256)
    file, again = tmp_path / "made", b"\x1b[?2004h> "
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        command = [sys.executable, "-m", "server.cli", "chat", "--model", str(model)]
        os.execv(sys.executable, [*command, "--max-tokens", "60000"])
    typed(terminal, b"", b"> ")
    for question in (b"hi", f"\x1b[200~see:\n\ntouch {file}\x1b[201~".encode()):
        typed(terminal, question + b"\r", b"\x1b[?2004l\r")
        time.sleep(0.5)  # the answer has begun
        typed(terminal, b"\x03", again)
    os.write(terminal, b"/bye\r")
    typed(terminal, b"", b"/bye")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    assert not file.exists()


@pytest.mark.parametrize("command", ["generate x", "chat"])
def test_who_reads_no_further_ends_the_output_quietly(model: str, command: str) -> None:
    command = f"{sys.executable} -m server.cli {command} --model {model} --max-tokens 200"
    shell = f"(yes | head -50 | {command}; echo status $? >&2) | head -c 3 >/dev/null"
    result = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in result.stderr
    assert "status 141" in result.stderr


def ends_with_ctrl_c(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert b"terminate" not in said
    assert b"Traceback" not in said


def test_ctrl_c_ends_an_answer_and_a_chat_that_waits(model: str) -> None:
    command = [sys.executable, "-m", "server.cli"]

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    answer = subprocess.Popen(
        [*command, "generate", "x", "--model", model, "--max-tokens", "400"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible,
    )  # fmt: skip
    assert answer.stdout is not None
    assert answer.stdout.read(1)
    ends_with_ctrl_c(answer)
    terminal, far = pty.openpty()
    chat = subprocess.Popen(
        [*command, "chat", "--model", model],
        cwd=ROOT, stdin=far, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    )  # fmt: skip
    assert chat.stdout is not None
    assert chat.stdout.read(2) == b"> "
    time.sleep(0.3)  # by then it waits for a line
    ends_with_ctrl_c(chat)
    os.close(terminal)
    os.close(far)


def test_models_lists_what_is_here_and_what_can_be_had(tmp_path: Path) -> None:
    cached = tmp_path / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    result = ryzanstein("models", env={"RYZANSTEIN_CACHE": str(tmp_path)})
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    assert "yes" in lines["smollm2-135m"]
    assert "no" in lines["gemma3-270m"]
    assert str(tmp_path) in result.stdout.replace("\n", "")


def test_version_prints_what_a_bug_report_needs() -> None:
    out = ryzanstein("version").stdout
    assert all(word in out for word in ("ryzanstein 0.", "python 3.", "torch 2.", "cores"))


def test_help_explains_every_option() -> None:
    out = ryzanstein("serve", "--help").stdout
    for option in ("--model", "--host", "--port", "--config", "--set", "--threads", "--dtype"):
        assert option in out


def test_neither_help_nor_the_port_waits_for_torch() -> None:
    """Its import takes two seconds: loading begins with it."""
    code = "import sys, server.cli, server.serving; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "neither a path that exists nor a known name"),
        (("--set", "cache.colour=1"), "colour"),
        (("--set", "cache.tokens=many"), "$.cache.tokens"),
        (("--set", "cache"), "section.field=value"),
        (("--set", "model.name.x=1"), "name is a value, not a section"),
        (("--set", "execution.backend=tpu"), "backend 'tpu' is not known"),
        (("--set", "cache.eviction=never"), "it takes adaptive or cost or lfu"),
        (("--set", "scheduler.speculative_tokens=some"), "it takes 0 to 32 or auto"),
        (("--max-tokens", "0"), "it must be at least 1"),
        (("--config", "/no/such/file.toml"), "cannot read"),
        (("--model", "gemma3-270m"), "--accept-terms"),
    ],
)
def test_mistakes_are_one_sentence(
    model: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    chosen = arguments if "model" in arguments[0] else ("--model", model, *arguments)
    if arguments == ("--set", "model.name.x=1"):
        chosen = ("--set", "model.name=a", *arguments)
    result = ryzanstein("generate", "x", *chosen, env={"RYZANSTEIN_CACHE": str(tmp_path)})
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_a_configuration_file_with_overrides(model: str, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(f'[model]\nname = "{model}"\ndtype = "float32"\n[cache]\ntokens = 64\n')
    ok = ryzanstein("generate", "x", "--config", str(file), "--max-tokens", "2", "--threads", "1")
    assert ok.returncode == 0
    long = ryzanstein("generate", "x" * 80, "--config", str(file))
    assert "context holds 64" in long.stderr
    wide = ryzanstein(
        "generate",
        "x" * 80,
        "--config",
        str(file),
        "--set",
        "cache.tokens=400",
        "--max-tokens",
        "2",
    )
    assert wide.returncode == 0
    file.write_text("[model")
    assert "is not valid TOML" in ryzanstein("generate", "x", "--config", str(file)).stderr


def test_the_key_of_the_environment_adds_to_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[server]\napi_keys = ["first"]\n')
    monkeypatch.setenv("RYZANSTEIN_API_KEY", "second")
    settings = _settings(file, (), None, None, None)
    assert settings.server.api_keys == ("first", "second")
