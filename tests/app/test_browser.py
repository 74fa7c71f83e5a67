"""The app in a headless Chromium: draw, answer, move a slider, click a step, watch a verdict; dark, and on a phone."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import BROWSER, browser_page

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")]
LONG = 120_000  # milliseconds


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_stepflow.cli", "app", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert f"http://127.0.0.1:{port}" in line
            yield line.split()[0]
        finally:
            server.terminate()


def drawn(page, address: str, level: str = "reasoner:chains-2") -> None:
    """Opens the app and draws a problem."""
    page.goto(address)
    page.get_by_label("Level, or a source of problems").fill(level)
    page.keyboard.press("Enter")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#question textarea').value.includes('How many')")


def answered(page) -> None:
    page.click("#answer")
    page.wait_for_selector("#effect table", timeout=LONG)


def test_a_visit(address: str) -> None:
    requested: list[str] = []
    with browser_page() as page:
        page.on("request", lambda request: requested.append(request.url))
        drawn(page, address)
        page.click("#answer")
        page.wait_for_selector("#answers .sf-cell", timeout=LONG)  # it is written step by step
        page.wait_for_selector("#effect table", timeout=LONG)
        cards = page.locator(".sf-card").all_inner_texts()
        assert [card.split("\n")[0] for card in cards] == ["Base model", "With StepFlow"]
        assert all(re.search(r"\d+ tokens, \d+ steps, [\d.]+ s", card) for card in cards)
        first = page.locator(".sf-number").all_inner_texts()
        assert first[:3] == ["1", "2", "3"]

        alpha = page.locator("#alpha input[type=number]")
        alpha.fill("0")
        alpha.press("Tab")
        page.locator("#tau-max input[type=range]").focus()
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        page.wait_for_timeout(500)
        assert page.locator("#tau-max input[type=number]").input_value() == "0.2"
        assert alpha.input_value() == "0"
        page.click("#answer")
        # The head, and the two layers of the bridge: without momentum, no other layer is changed.
        page.wait_for_function("document.querySelectorAll('#effect tr').length === 3", timeout=LONG)

        page.get_by_role("tab", name="Step-Saliency").click()
        page.click("#measure")
        frame = page.frame_locator("#saliency iframe")
        frame.locator("html[data-ready=true]").wait_for(timeout=LONG)
        steps = frame.locator("#steps li[data-step]")
        steps.nth(3).click()
        assert frame.locator("html").get_attribute("data-selected") == "3"
        assert frame.locator("#sources li").count() > 1

        page.get_by_role("tab", name="More problems").click()
        number = page.locator("#number input[type=number]")
        number.fill("16")
        number.press("Enter")
        page.click("#compare")
        page.wait_for_selector(".sf-verdict", timeout=LONG)
        page.get_by_text("(finished)").wait_for(timeout=LONG)
        assert re.search(r"stepflow: .* points, n = 16, .* base.* \(finished\)", page.inner_text(".sf-verdict"))
    assert {url.split("/")[2] for url in requested if url.startswith("http")} == {address.split("/")[2]}


def test_errors_are_messages_with_their_hint(address: str) -> None:
    with browser_page() as page:
        page.goto(address)
        page.locator("#question textarea").fill("Bob has 4 points. How many points does Bob have?")
        page.click("#answer")
        message = page.get_by_text("'Bob' are outside its language")
        message.wait_for(timeout=LONG)
        assert page.get_by_text("questions such as").count() > 0
        assert page.get_by_text("Traceback").count() == 0


def test_on_a_phone_in_the_dark(address: str) -> None:
    with browser_page(390, 844, dark=True) as page:
        drawn(page, address)
        answered(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        colour = page.evaluate("getComputedStyle(document.querySelector('.sf-text')).color")
        assert min(map(int, re.findall(r"\d+", colour)[:3])) > 150  # light text
