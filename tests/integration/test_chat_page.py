"""The chat page of the server in Chromium."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fira.generation.conversation import Conversation
from tests.fira.serving.running_server import running, served_model
from tests.fira.small_model import make_tokenizer

webdriver = pytest.importorskip("selenium.webdriver")
FLAGS = [
    "--headless",
    "--no-sandbox",  # which root needs
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.set_page_load_timeout(60)
        yield browser
    finally:
        browser.quit()


def emulate(browser: Any, width: int, height: int, scheme: str) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


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
