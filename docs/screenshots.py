"""Takes the pictures of the console that the documents show, of a running server with a real model:

    ryzanstein serve
    python docs/screenshots.py

Needs Playwright, and Debian's Chromium.
"""

from __future__ import annotations

import re
import shutil
import sys
import threading
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

FOLDER = Path(__file__).parent
QUESTIONS = (
    "Why is the sky blue? Answer in three sentences.",
    "And why is it red in the evening?",
)
STORIES = ("a lighthouse", "a fox", "the sea", "an old clock", "a train", "a garden")


def ask(page: Page, question: str) -> None:
    """Ask in the chat, and wait for the answer's end."""
    page.fill("#temperature", "0")
    page.fill("#tokens", "110")
    page.fill("#input", question)
    page.press("#input", "Enter")
    expect(page.locator("#messages li.assistant .stats").last).to_contain_text(
        "tokens ·", timeout=60_000
    )


def keep_busy(url: str) -> list[threading.Thread]:
    """Answers of several choices, some of which wait for others."""

    def one(number: int) -> None:
        story = STORIES[number % len(STORIES)]
        body = {
            "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"],
            "messages": [{"role": "user", "content": f"Tell a long story about {story}. " * 12}],
            "max_tokens": 600 + 40 * number,
            "ignore_eos": True,
            "n": 1 + number % 3,
        }
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
        thread.join(0.7)
    return threads


def picture_engine(page: Page, url: str) -> None:
    """The batch at work, and the timeline of an answer with choices."""
    page.goto(f"{url}/#engine")
    threads = keep_busy(url)
    page.wait_for_timeout(4000)
    lanes = page.locator("#lanes").bounding_box()
    assert lanes is not None
    page.mouse.click(lanes["x"] + lanes["width"] - 4, lanes["y"] + 15)
    expect(page.locator("#timeline h3").first).to_be_visible()
    page.locator("#engine").evaluate("view => view.scrollTo(0, 0)")
    page.screenshot(path=FOLDER / "console.png", full_page=True)
    for thread in threads:
        thread.join()


def take(browser: Browser, url: str) -> None:
    """All of them."""
    page = browser.new_context(viewport={"width": 1100, "height": 640}).new_page()
    page.goto(url)
    for question in QUESTIONS:
        ask(page, question)
    page.screenshot(path=FOLDER / "console-chat.png")
    page = browser.new_context(viewport={"width": 1100, "height": 900}).new_page()
    picture_engine(page, url)
    phone = browser.new_context(
        viewport={"width": 390, "height": 760}, color_scheme="dark", device_scale_factor=1.5
    ).new_page()
    phone.goto(url)
    ask(phone, QUESTIONS[0])
    phone.fill("#tokens", "400")
    phone.fill("#input", "Tell me more about light.")
    phone.press("#input", "Enter")
    text = phone.locator("#messages li.assistant .text").nth(1)
    expect(text).to_have_text(re.compile(".{80}", re.DOTALL))
    phone.click("#stop")
    expect(phone.locator("#resume")).to_be_visible()
    phone.screenshot(path=FOLDER / "console-phone.png")


def main() -> None:
    """Of the server at the address that is given, or the usual one."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        take(browser, url)
        browser.close()


if __name__ == "__main__":
    main()
