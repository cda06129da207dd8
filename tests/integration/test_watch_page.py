"""The page of `fira watch` in Chromium: a run that grows, another one, and the details of both."""

import json
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fira.metrics.csv_log import LOG_NAME, Row, TrainingLog
from fira.metrics.events import EventLog
from fira.metrics.samples_log import SAMPLES, Sample, SamplesLog
from fira.training.config import TrainConfig
from fira.training.run_folder import write_settings
from fira.watching.watch_server import FollowedRuns, make_server
from pipeline.schedule import one_forward_one_backward
from pipeline.simulate import simulate
from pipeline.timeline import write_trace
from tests.integration.browser import chromium, emulate

pytestmark = pytest.mark.slow


def write_rows(log: TrainingLog, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1):
        loss = 3 + 4 / step + offset
        load = [[0.5, 0.25, 0.15, 0.1], [0.25] * 4]
        row = Row(
            iter=step, train_loss=loss, lr=1e-3, tokens_per_s=9e3, mfu=0.4, grad_norm=0.5, bubble=0.2, expert_load=load
        )
        row.val_loss = loss + 0.1 if step % 10 == 0 else None
        log.write(row)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs; the first has samples, a trace, a resume and a rollback."""
    folder = tmp_path / "runs"
    for name, offset in (("first", 0.0), ("second", 0.3)):
        events = EventLog(folder / name)
        write_settings(folder / name, TrainConfig(steps=100), {"unigram": 3.45, "trigram": 3.4})
        events.append("train", step=0, ranks=2, layout="pp 2 × dp 1 (ep 1)")
        log = TrainingLog(folder / name / LOG_NAME)
        log.write_initial(7.4, {})
        write_rows(log, 1, 40, offset)
        log.close()
    EventLog(folder / "first").append("train", step=20, ranks=1, layout="pp 1 × dp 1 (ep 1)")
    EventLog(folder / "first").append("rollback", step=30)
    samples = SamplesLog(folder / "first" / SAMPLES)
    samples.write(20, [Sample("def ", "<b>early</b>")])
    samples.write(40, [Sample("def ", "late")])
    costs = {kind: [0.01, 0.02] for kind in "FBIW"}
    schedule = one_forward_one_backward(2, 4)
    write_trace(simulate(schedule, costs), folder / "first" / "trace.json")  # type: ignore[arg-type]
    return folder


def test_page_follows_runs(runs: Path, tmp_path: Path) -> None:
    """PAGE_SCREENSHOTS: a folder that keeps the screenshots."""
    pictures = Path(os.environ.get("PAGE_SCREENSHOTS", tmp_path))
    server = make_server(FollowedRuns([runs]), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with chromium(tmp_path / "profile") as browser:
            _follow(browser, f"http://127.0.0.1:{server.server_address[1]}/", runs, pictures)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _follow(browser: Any, address: str, runs: Path, pictures: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def all_of(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def until(condition: Any) -> None:
        WebDriverWait(browser, 30).until(lambda _: condition())

    emulate(browser, 1400, 1900, "light")
    browser.get(address)
    until(lambda: len(all_of("tr.run")) == 2)
    assert [row.text.split()[:2] for row in all_of("tr.run")] == [["first", "running"], ["second", "running"]]
    assert len(all_of("#chart-train_loss polyline")) == 2
    resumed, rollback = all_of("#chart-train_loss .mark")
    assert resumed.get_attribute("textContent") == "first: resumed after step 20, layout pp 1 × dp 1"
    assert rollback.get_attribute("textContent") == "first: rollback after step 30"
    assert resumed.get_attribute("d").split("l")[1] != rollback.get_attribute("d").split("l")[1]
    assert all_of("#marks")[0].text.split() == ["▲", "resumed", "▼", "rollback"]
    assert len(all_of("#chart-val_loss circle")) == 2 * 5  # row 0 and steps 10 to 40
    labels = all_of("#chart-train_loss text")[-2:]
    assert [label.text for label in labels] == ["trigram 3.40", "unigram 3.45"]
    heights = [float(label.get_attribute("y")) for label in labels]
    assert all(low - high >= 11 for low, high in pairwise(heights))  # the font's size

    # Expert 0 of layer 1 has 2 × the balanced load, expert 3 0.4 ×; layer 2 is balanced.
    heat = "const c = document.querySelectorAll('canvas.heat')[arguments[0]]; "
    heat += "return [...c.getContext('2d').getImageData(0, arguments[1], 1, 1).data.slice(0, 3)]"
    assert len(all_of("canvas.heat")) == 2
    assert browser.execute_script(heat, 0, 0) == [179, 88, 6]
    assert browser.execute_script(heat, 1, 2) == [247, 247, 247]
    assert "forward" in all_of("#kinds")[0].text
    assert len(all_of("#timeline canvas")) == 1
    assert all_of("#samples")[0].text == "def late"
    Select(all_of("#step")[0]).select_by_visible_text("step 20")
    assert all_of("#samples")[0].text == "def <b>early</b>"  # text, not markup
    assert "layout pp 1 × dp 1" in all_of("#events")[0].text
    browser.save_screenshot(str(pictures / "watch_light.png"))

    all_of("tr.run input")[1].click()
    until(lambda: len(all_of("#chart-train_loss polyline.raw")) == 1)  # a single run, with its raw values
    log = TrainingLog(runs / "first" / LOG_NAME, resume_step=40)
    write_rows(log, 41, 60)
    log.close()
    until(lambda: "60 / 100" in all_of("tr.run")[0].text)
    shutil.copytree(runs / "second", runs / "third")
    (runs / "third" / "finished.json").write_text(json.dumps({"step": 40}))
    until(lambda: len(all_of("tr.run")) == 3)
    assert "finished" in all_of("tr.run")[2].text
    all_of("tr.run")[2].click()
    until(lambda: all_of("#chosen")[0].text == "third")
    until(lambda: "no samples" in all_of("#samples")[0].text)

    emulate(browser, 390, 900, "dark")
    browser.save_screenshot(str(pictures / "watch_dark_phone.png"))
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert browser.get_log("browser") == []
