"""The chat page of the server in Chromium."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fira.generation.conversation import Conversation
from tests.fira.serving.running_server import running, served_model
from tests.fira.small_model import make_tokenizer
from tests.integration.browser import chromium, emulate


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    with chromium(tmp_path / "profile") as opened:
        yield opened


@pytest.mark.slow
def test_a_chat_in_the_browser(browser: Any, tmp_path: Path) -> None:
    """PAGE_SCREENSHOTS: a folder that keeps the screenshots."""
    pictures = Path(os.environ.get("PAGE_SCREENSHOTS", tmp_path))
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def texts(kind: str) -> list[str]:
        return [box.text for box in browser.find_elements(By.CSS_SELECTOR, f".message.{kind}")]

    def ask(question: str) -> None:
        browser.find_element(By.ID, "input").send_keys(question + "\n")
        WebDriverWait(browser, 60).until(lambda _: browser.find_element(By.ID, "send").text == "Send")

    with running(served_model(make_tokenizer()), key="secret") as server:
        emulate(browser, 1000, 800, "light")
        browser.get(server.url)
        WebDriverWait(browser, 30).until(lambda _: "API key" in browser.find_element(By.ID, "context").text)
        browser.find_elements(By.TAG_NAME, "summary")[1].click()
        for name, value in (("key", "secret\t"), ("max_tokens", "40"), ("temperature", "")):
            field = browser.find_element(By.ID, name)
            field.clear()
            field.send_keys(value)
        browser.find_element(By.ID, "temperature").send_keys("0")
        WebDriverWait(browser, 30).until(lambda _: "200 tokens" in browser.find_element(By.ID, "context").text)
        browser.find_elements(By.TAG_NAME, "summary")[1].click()
        conversation = Conversation(server.model)
        expected = ["".join(conversation.ask(text, 40, temperature=0)) for text in ("def main", "Wald")]
        ask("def main")
        ask("Wald")
        assert texts("user") == ["def main", "Wald"]
        assert [text.split() for text in texts("assistant")] == [text.split() for text in expected]
        assert "tokens/s" in browser.find_element(By.ID, "stats").text
        bars = browser.find_elements(By.CSS_SELECTOR, ".bars div")
        assert len(bars) == 2 * server.model.config.num_experts
        assert max(bar.size["height"] for bar in bars) > 30
        browser.save_screenshot(str(pictures / "light.png"))
        emulate(browser, 390, 780, "dark")
        browser.save_screenshot(str(pictures / "dark_phone.png"))
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"
        errors = [entry for entry in browser.get_log("browser") if "401" not in entry["message"]]
        assert not errors
