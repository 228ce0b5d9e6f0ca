"""The console in a real browser: Debian's Chromium, without a head."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.mock import continuation
from tests.server.conftest import MockFactory
from tests.server.process import ROOT, ServerProcess

# A frame's work with 64 streams in view.
FRAME_SECONDS = 0.004


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        assert not os.environ.get("RYZANSTEIN_TOOLS"), "chromium is not installed"
        pytest.skip("chromium is not installed (Debian's package of that name)")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose every complaint is a failure."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    made = context.new_page()
    complaints: list[str] = []
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    requested: list[str] = []
    made.on("request", lambda request: requested.append(request.url))
    yield made
    hosts = {re.sub(r"^(\w+://[^/]+).*", r"\1", url) for url in requested if "data:" not in url}
    context.close()
    # A server that is down for a moment is told in the network's own words.
    assert [c for c in complaints if "ERR_CONNECTION_REFUSED" not in c] == []
    assert len(hosts) <= 1, f"something is loaded from elsewhere: {hosts}"


def ask(page: Page, text: str, tokens: int) -> None:
    page.fill("#tokens", str(tokens))
    page.fill("#input", text)
    page.press("#input", "Enter")


def answer_to(text: str, count: int) -> str:
    prompt = f"<user>{text}\n<assistant>"
    return bytes(continuation(list(prompt.encode()), count)).decode()


def test_an_answer_streams_with_its_speed(mock_server: MockFactory, page: Page) -> None:
    server = mock_server(delay=0.02)
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("mock")
    expect(page.locator("#state")).to_have_text("ok")
    ask(page, "hello", 40)
    text = page.locator("#messages li.assistant .text")
    expect(text).to_have_text(re.compile(r"^[a-z]{3,39}$"))  # while it comes
    expect(text).to_have_text(answer_to("hello", 40), timeout=10_000)
    stats = page.locator("#messages li.assistant .stats")
    expect(stats).to_have_text(re.compile(r"40 tokens · first after \d+ ms · [\d.]+ tokens/s"))


def test_stop_ends_it_where_it_is(mock_server: MockFactory, page: Page) -> None:
    server = mock_server(delay=0.02, pages=512, context=500)
    page.goto(server.url)
    ask(page, "a long one", 400)
    text = page.locator("#messages li.assistant .text")
    expect(text).to_have_text(re.compile(r"^[a-z]{5,}$"))
    page.keyboard.press("Escape")
    expect(page.locator("#messages li.assistant .stats")).to_contain_text("stopped")
    assert 5 <= len(text.inner_text()) < 400
    expect(page.locator("#send")).to_be_visible()


def test_a_reload_in_the_middle_loses_nothing(mock_server: MockFactory, page: Page) -> None:
    server = mock_server(delay=0.02, pages=512, context=500)
    page.goto(server.url)
    ask(page, "go on", 150)
    text = page.locator("#messages li.assistant .text")
    expect(text).to_have_text(re.compile(r"^[a-z]{10,}$"))
    page.reload()
    expect(text).to_have_text(answer_to("go on", 150), timeout=15_000)
    assert server.metric('ryzanstein_http_requests_total{path="/v1/models",status="200"}') >= 2
    assert server.metric('ryzanstein_requests_finished_total{reason="length"}') == 1


@pytest.mark.parametrize("loading", [0.0, 3.0])
def test_a_restart_of_the_server_is_survived(page: Page, loading: float) -> None:
    """The new server knows nothing of the answer, so it is asked for again, once it has loaded."""
    env = {"MOCK_ENGINE": json.dumps({"delay": 0.05, "pages": 512, "context": 500})}
    first = ServerProcess(module="tests.server.mock_server", env=env)
    first.__enter__()
    port = first.port
    page.goto(first.url)
    ask(page, "once more", 60)
    text = page.locator("#messages li.assistant .text")
    expect(text).to_have_text(re.compile(r"^[a-z]{5,}$"))
    first._process.kill()
    first.wait()
    expect(page.locator("#state")).to_have_text("offline")
    options = json.loads(env["MOCK_ENGINE"]) | {"loading": loading}
    again = {"MOCK_ENGINE": json.dumps(options), "MOCK_SERVER": json.dumps({"port": port})}
    with ServerProcess(module="tests.server.mock_server", env=again):
        expect(page.locator("#state")).to_have_text("ok", timeout=15_000)
        expect(text).to_have_text(answer_to("once more", 60), timeout=15_000)
        page.goto("about:blank")


def test_a_stopped_answer_goes_on_when_asked_to(mock_server: MockFactory, page: Page) -> None:
    """From where it was, twice, through a reload: the same text that it would have become."""
    server = mock_server(delay=0.02, pages=512, context=500)
    page.goto(server.url)
    ask(page, "a long one", 120)
    text = page.locator("#messages li.assistant .text")
    stats = page.locator("#messages li.assistant .stats")
    resume = page.locator("#resume")
    for letters in (5, 40):
        expect(text).to_have_text(re.compile(rf"^[a-z]{{{letters},}}$"))
        expect(resume).to_be_hidden()
        page.click("#stop")
        expect(stats).to_contain_text("stopped")
        if letters > 5:
            page.reload()
        expect(page.locator("#state")).to_have_text("ok")
        kept = text.inner_text()
        resume.click()
        expect(text).to_have_text(re.compile(rf"^{kept}[a-z]+$"))
    expect(text).to_have_text(answer_to("a long one", 120), timeout=10_000)
    expect(stats).to_have_text(re.compile(r"^120 tokens · .*cut at its length$"))
    # One that was cut goes on, too, by as many tokens as are set now.
    page.fill("#tokens", "30")
    resume.click()
    expect(text).to_have_text(answer_to("a long one", 150), timeout=10_000)
    assert server.metric('ryzanstein_requests_finished_total{reason="abort"}') == 2


def test_a_question_that_had_no_answer_is_not_asked_again(
    mock_server: MockFactory, page: Page
) -> None:
    server = mock_server(pages=512, context=100)
    page.goto(server.url)
    ask(page, "x" * 200, 10)
    expect(page.locator("#messages li.assistant .error")).to_contain_text("the prompt has")
    ask(page, "short", 5)
    answers = page.locator("#messages li.assistant .text")
    expect(answers.nth(1)).to_have_text(answer_to("short", 5))


def test_each_tab_keeps_its_own_conversation(mock_server: MockFactory, page: Page) -> None:
    server = mock_server()
    page.goto(server.url)
    ask(page, "one", 5)
    expect(page.locator("#messages li.assistant .text")).to_have_text(answer_to("one", 5))
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.locator("#messages li.user .text")).to_have_text("one")  # the last that was kept
    other.click("#clear")
    ask(other, "two", 5)
    expect(other.locator("#messages li.assistant .text")).to_have_text(answer_to("two", 5))
    page.reload()
    expect(page.locator("#messages li.user .text")).to_have_text("one")
    other.evaluate("sessionStorage.setItem('ryzanstein.conversation', '{oops')")
    other.evaluate("Storage.prototype.setItem = () => {}")
    other.reload()
    expect(other.locator("#state")).to_have_text("ok")


def test_enter_sends_nothing_that_is_composed_or_set_wrongly(
    mock_server: MockFactory, page: Page
) -> None:
    server = mock_server()
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("ok")
    page.fill("#input", "にほん")
    enter = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.getElementById('input').dispatchEvent({enter})")
    page.fill("#tokens", "")
    page.press("#input", "Enter")
    assert page.locator("#messages li").count() == 0
    page.fill("#tokens", "5")
    page.press("#input", "Enter")
    expect(page.locator("#messages li.assistant .stats")).to_contain_text("5 tokens")


def test_an_answer_that_failed_goes_on_when_asked_to(mock_server: MockFactory, page: Page) -> None:
    server = mock_server(delay=0.02, pages=512, context=500)
    page.goto(server.url)
    ask(page, "goes wrong", 60)
    text = page.locator("#messages li.assistant .text")
    expect(text).to_have_text(re.compile(r"^[a-z]{5,}$"))
    httpx.post(f"{server.url}/test/fail")
    error = page.locator("#messages li.assistant .error")
    expect(error).not_to_be_empty()
    page.click("#resume")
    # How many tokens there were is only guessed, from how often some came.
    expect(page.locator("#messages li.assistant .stats")).to_contain_text("cut at its length")
    expect(error).to_be_empty()
    assert 60 <= len(text.inner_text()) < 75
    assert text.inner_text() == answer_to("goes wrong", len(text.inner_text()))


def test_when_attempts_have_ended_a_button_begins_anew(page: Page) -> None:
    env = {"MOCK_ENGINE": json.dumps({"delay": 0.02, "pages": 512, "context": 500})}
    # Half a minute of attempts in a second or two.
    page.add_init_script(
        "const real = setTimeout; window.setTimeout = (work, ms) => real(work, ms / 25);"
    )
    first = ServerProcess(module="tests.server.mock_server", env=env)
    first.__enter__()
    page.goto(first.url)
    ask(page, "once more", 100)
    text = page.locator("#messages li.assistant .text")
    expect(text).to_have_text(re.compile(r"^[a-z]{5,}$"))
    first._process.kill()
    first.wait()
    expect(page.locator("#resume")).to_be_visible()  # also while it tries by itself
    expect(page.locator("#state")).to_have_text("disconnected", timeout=20_000)
    again = env | {"MOCK_SERVER": json.dumps({"port": first.port})}
    with ServerProcess(module="tests.server.mock_server", env=again):
        page.wait_for_timeout(1000)
        expect(page.locator("#state")).to_have_text("disconnected")
        page.click("#resume")
        expect(page.locator("#state")).to_have_text("ok")
        expect(text).to_have_text(answer_to("once more", 100), timeout=15_000)
        expect(page.locator("#send")).to_be_visible()
        page.goto("about:blank")


def test_a_server_with_keys_asks_for_one(mock_server: MockFactory, browser: Browser) -> None:
    server = mock_server({"api_keys": ["right"]})
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.fill("#key", "right")
    page.press("#key", "Enter")
    expect(page.locator("#state")).to_have_text("ok")
    ask(page, "hi", 5)
    expect(page.locator("#messages li.assistant .text")).to_have_text(answer_to("hi", 5))
    assert "right" not in page.evaluate("JSON.stringify(localStorage)")
    context.close()


def keep_busy(
    server: ServerProcess, streams: int, tokens: int, **more: int
) -> list[threading.Thread]:
    """Start requests that go on for a while."""
    prompt = "some words to begin with"
    body = {"model": "mock", "prompt": prompt, "max_tokens": tokens, **more}

    def one() -> None:
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    threads = [threading.Thread(target=one) for _ in range(streams)]
    for thread in threads:
        thread.start()
    return threads


def test_the_engine_at_work_and_a_requests_timeline(mock_server: MockFactory, page: Page) -> None:
    server = mock_server(delay=0.02, pages=512, context=400, max_running=4)
    threads = keep_busy(server, 6, 150)
    page.goto(f"{server.url}/#engine")
    expect(page.locator(".figures")).to_contain_text("tokens/s")
    expect(page.locator(".figures div:nth-child(2) b")).to_have_text("4")
    expect(page.locator("#queue")).to_contain_text("2 waiting")
    expect(page.locator("#pages")).to_contain_text("of 512 in use")
    lanes = page.locator("#lanes").bounding_box()
    assert lanes is not None
    page.wait_for_timeout(600)
    page.mouse.click(lanes["x"] + lanes["width"] - 4, lanes["y"] + 5)
    expect(page.locator("#timeline")).to_contain_text("decode")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/engine.png")
    for thread in threads:
        thread.join()


def test_a_timeline_shows_each_choice(mock_server: MockFactory, page: Page) -> None:
    """The one whose lane was clicked first."""
    server = mock_server(delay=0.02, pages=512, context=400, max_running=4)
    threads = keep_busy(server, 1, 150, n=3)
    page.goto(f"{server.url}/#engine")
    expect(page.locator(".figures div:nth-child(2) b")).to_have_text("3")
    page.wait_for_timeout(600)
    lanes = page.locator("#lanes").bounding_box()
    assert lanes is not None
    page.mouse.click(lanes["x"] + lanes["width"] - 4, lanes["y"] + 25)
    names = page.locator("#timeline h3")
    expect(names).to_have_count(3)
    expect(names.nth(0)).to_have_text(re.compile(r"^choice 2: 100\.0% of \d+ ms explained$"))
    expect(names.nth(1)).to_contain_text("choice 0: ")
    expect(page.locator("#timeline table")).to_have_count(3)
    for thread in threads:
        thread.join()


def test_the_documents_page_streams_and_stops(
    mock_server: MockFactory, browser: Browser, tmp_path: Path
) -> None:
    """docs/websocket.md's, as a file on disk."""
    server = mock_server({"allowed_origins": ["null"]}, delay=0.02, pages=512, context=500)
    document = (ROOT / "docs/websocket.md").read_text()
    (example,) = re.findall(r"```html\n(.*?)```", document, re.DOTALL)
    file = tmp_path / "page.html"
    file.write_text(example.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(file.as_uri())
    text = page.locator("#answer")
    expect(text).to_have_text(re.compile(r"^[a-z]{5,}$"))
    page.click("#stop")
    page.wait_for_timeout(300)
    kept = text.inner_text()
    assert answer_to("Why is the sky blue?", 300).startswith(kept)
    page.wait_for_timeout(300)
    assert text.inner_text() == kept
    context.close()


def test_tenants_do_not_see_the_engine(
    mock_server: MockFactory, browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.a]\nkeys = ["key-a"]\n')
    server = mock_server({"tenants_file": str(file)})
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.fill("#key", "key-a")
    page.press("#key", "Enter")
    expect(page.locator("#state")).to_have_text("ok")
    page.click("#tab-engine")
    expect(page.locator("#pages")).to_have_text("only the operator's key shows this")
    context.close()


def test_a_frame_with_64_streams_takes_less_than_four_milliseconds(
    mock_server: MockFactory, page: Page
) -> None:
    """Of scripting, measured around each frame's work."""
    server = mock_server(delay=0.02, pages=8192, context=400, max_running=64, max_batch_tokens=128)
    page.add_init_script(
        """
        window.spent = [];
        const real = window.requestAnimationFrame.bind(window);
        window.requestAnimationFrame = (work) => real((now) => {
          const begin = performance.now();
          work(now);
          window.spent.push(performance.now() - begin);
        });
        """
    )
    threads = keep_busy(server, 1, 360, n=64)
    page.goto(f"{server.url}/#engine")
    expect(page.locator(".figures div:nth-child(2) b")).to_have_text("64")
    page.wait_for_timeout(3000)
    spent = sorted(page.evaluate("window.spent"))
    assert len(spent) > 8
    # A browser that draws in software shares two cores with the server: a quarter is undisturbed.
    assert spent[len(spent) // 4] / 1e3 < FRAME_SECONDS, spent
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_works_on_a_phone_by_keyboard_and_in_the_dark(
    mock_server: MockFactory, browser: Browser, scheme: str
) -> None:
    server = mock_server(delay=0.002, pages=512, context=500)
    context = browser.new_context(
        viewport={"width": 375, "height": 700},
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("ok")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is too wide"
    page.keyboard.type("by keyboard")
    page.keyboard.press("Enter")
    expect(page.locator("#messages li.assistant .stats")).to_contain_text("tokens")
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#engine")).to_be_visible()
    expect(page.locator("#chat")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is too wide"
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/phone-{scheme}.png")
    context.close()


def test_the_page_says_that_nothing_comes_from_elsewhere(mock_server: MockFactory) -> None:
    server = mock_server({"api_keys": ["secret"]})
    answer = httpx.get(server.url)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("app.js", "chat.js", "engine.js", "style.css"):
        found = httpx.get(f"{server.url}/console/{name}")
        assert found.status_code == 200
        assert not re.search(r"https?://", found.text), name
    for name in ("nothing.js", "..%2Fconsole.py", "%2e%2e/app.py"):
        assert httpx.get(f"{server.url}/console/{name}").status_code in (401, 404)
