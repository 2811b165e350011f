"""The live page in a real browser, at a real server under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from amoe.builtin import builtin_model_path
from amoe.cluster.admin import ClusterStatus, WorkerStatus
from amoe.cluster.admin_desk import LocalDesk
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.options import HttpOptions, digest_keys
from tests.fake_workers import make_engine, make_tokenizer
from tests.integration.test_serve import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (apt install chromium chromium-driver)"
)


class Browser:
    """Headless Chromium with the page open, and what it has logged and loaded."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        self.resize(1360, 900)

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, theme: str) -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def send_key(self, key: str | None) -> None:
        """What a browser does for its user once a login dialogue has been answered."""
        self.driver.execute_cdp_cmd("Network.enable", {})
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": headers})

    def text(self, name: str) -> str:
        return str(self.driver.execute_script("return document.getElementById(arguments[0]).textContent", name))

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def fill(self, name: str, value: str) -> None:
        element = self.driver.find_element(By.ID, name)
        element.clear()
        element.send_keys(value)

    def click(self, name: str) -> None:
        self.driver.find_element(By.ID, name).click()

    def canvas(self) -> str:
        """The picture of the layers."""
        return str(self.run("return document.getElementById('layers').toDataURL()"))

    def background(self) -> str:
        return str(self.run("return getComputedStyle(document.body).backgroundColor"))

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
        """Wait until `condition` holds. The limit is for a server that hangs, not for one that is slow."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.1)
        raise AssertionError(f"never: {what}; status: {self.text('status-text')!r}; console: {self.console()}")

    def console(self) -> list[str]:
        """Complaints since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def origins(self) -> set[str]:
        """From where something was loaded."""
        script = "return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)"
        return set(self.run(script))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The built-in model: what somebody sees who has just run `make serve`."""
    served = Served(builtin_model_path(), "--colocated", "2")
    yield served
    served.client.close()
    served.process.kill()
    served.process.wait()


@contextlib.contextmanager
def traffic(url: str) -> Iterator[None]:
    """Some clients that go on until the end."""
    stop = threading.Event()

    def ask() -> None:
        body = {"prompt": "import os\n", "max_tokens": 48, "temperature": 1.0, "ignore_eos": True}
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    client.post(f"{url}/v1/completions", json=body)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def number(text: str) -> float:
    """Of a figure such as `1,234` or `5.2`; 0 for a dash."""
    match = re.search(r"[\d,]+(\.\d+)?", text)
    return float(match[0].replace(",", "")) if match else 0.0


def test_moves_under_load(browser: Browser, served: Served, tmp_path: Path):
    browser.prefer("light")
    browser.driver.get(f"{served.url}/")
    with traffic(served.url):
        browser.until(lambda: browser.text("status-text") == "live", "live")
        browser.until(lambda: number(browser.text("generated")) > 0, "tokens per second")
        browser.until(lambda: number(browser.text("itl-p50")) > 0, "time between tokens")
        label = "return document.getElementById('layers').getAttribute('aria-label')"
        browser.until(lambda: "greatest load of an expert" in str(browser.run(label)), "load of experts")
        pictures = {browser.canvas()}
        browser.until(lambda: pictures.add(browser.canvas()) or len(pictures) >= 3, "a heatmap and bars that move")
        rows = browser.driver.find_elements(By.CSS_SELECTOR, ".worker")
        assert [row.text.split("\n")[0] for row in rows] == ["0 colocated", "1 colocated"]
        browser.run("document.getElementById('table-box').open = true")
        cells = browser.until(lambda: table(browser), "a table")
        assert len(cells) == 6 and all(len(row) == 11 for row in cells)
        batches = {row[3] for row in cells}
        assert batches != {"–"}
        browser.run("document.getElementById('table-box').open = false")

        light = browser.background()
        browser.driver.save_screenshot(str(tmp_path / "light.png"))
        browser.prefer("dark")
        browser.until(lambda: browser.background() != light, "dark colours")
        browser.driver.save_screenshot(str(tmp_path / "dark.png"))
    assert browser.origins() == {served.url}
    assert browser.console() == []


def table(browser: Browser) -> list[list[str]]:
    rows = "[...document.querySelectorAll('#table tbody tr')]"
    return list(browser.run(f"return {rows}.map((row) => [...row.cells].map((cell) => cell.textContent))"))


@pytest.mark.parametrize("mode", ["completions", "chat"])
def test_streams_a_prompt(browser: Browser, served: Served, mode: str):
    browser.driver.get(f"{served.url}/")
    browser.run(f"document.querySelector('input[value={mode}]').click()")
    browser.fill("prompt-text", "def add(a, b):")
    browser.fill("max-tokens", "24")
    browser.click("send")
    seen: set[str] = set()
    browser.until(lambda: seen.add(browser.text("answer")) or "finished" in browser.text("try-status"), "an answer")
    status = browser.text("try-status")
    assert re.search(r"finished: (length|stop) · \d+ tokens? · ", status) and "first after" in status
    assert number(status.split("·")[1]) <= 24
    assert browser.text("answer")
    assert browser.console() == []


def test_stop_frees_the_sequence(browser: Browser, served: Served):
    browser.driver.get(f"{served.url}/")
    browser.fill("prompt-text", "import os\nimport sys\n")
    browser.fill("max-tokens", "1900")
    browser.fill("temperature", "1")
    browser.click("send")
    browser.until(lambda: len(browser.text("answer")) > 20, "some text")
    browser.click("stop")
    browser.until(lambda: browser.text("try-status").startswith("stopped"), "stopped")
    browser.until(
        lambda: httpx.get(f"{served.url}/live", timeout=60).json()["requests"]["open"] == 0, "a free sequence"
    )
    browser.until(lambda: browser.driver.find_element(By.ID, "send").is_enabled(), "a box that can be used again")
    assert browser.console() == []


def test_errors_are_shown_as_the_server_says_them(browser: Browser, served: Served):
    browser.driver.get(f"{served.url}/")
    browser.fill("max-tokens", "99999")
    browser.click("send")
    browser.until(lambda: "max_tokens" in browser.text("answer"), "the name of the field")
    assert browser.text("try-status") == "failed"
    browser.console()  # the browser itself logs the status of 400


def test_what_a_model_says_is_text(browser: Browser, served: Served):
    """A chat of markup, given back by the browser's own fetch: no element of it may come to be."""
    browser.driver.get(f"{served.url}/")
    markup = "<img src=x onerror=alert(1)><script>document.title='owned'</script>"
    chunk = json.dumps({"choices": [{"index": 0, "text": markup}]})
    stream = f"data: {chunk}\n\ndata: [DONE]\n\n"
    browser.run(
        "const real = window.fetch; window.fetch = (url, options) => String(url).includes('/v1/')"
        f" ? Promise.resolve(new Response({json.dumps(stream)})) : real(url, options);"
    )
    browser.click("send")
    browser.until(lambda: browser.text("answer") == markup, "the markup as text")
    assert browser.run("return document.querySelectorAll('#answer img, #answer script').length") == 0
    assert browser.driver.title.startswith("amoe")
    assert browser.console() == []


@pytest.mark.parametrize("width", [360, 800, 1900])
def test_fits_every_width(browser: Browser, served: Served, width: int):
    browser.resize(width, 800)
    browser.driver.get(f"{served.url}/")
    browser.until(lambda: browser.text("status-text") == "live", "live")
    try:
        assert browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    finally:
        browser.resize(1360, 900)


def test_keyboard_and_theme(browser: Browser, served: Served):
    browser.driver.get(f"{served.url}/")
    browser.until(lambda: browser.text("status-text") == "live", "live")
    browser.until(lambda: browser.run("return document.getElementById('layers').hasAttribute('aria-label')"), "layers")
    canvas = browser.driver.find_element(By.ID, "layers")
    canvas.send_keys("\ue014\ue015")  # right, down
    browser.until(lambda: browser.text("readout").startswith("Layer 1"), "figures of a cell")
    browser.prefer("light")
    backgrounds = []
    for _ in range(3):
        browser.click("theme")
        backgrounds.append((browser.text("theme"), browser.background()))
    assert [name for name, _ in backgrounds] == ["theme: light", "theme: dark", "theme: auto"]
    assert backgrounds[0][1] == backgrounds[2][1] != backgrounds[1][1]
    assert browser.console() == []


def test_a_hidden_tab_asks_for_nothing(browser: Browser, served: Served):
    browser.driver.get(f"{served.url}/")
    browser.until(lambda: browser.text("status-text") == "live", "live")
    count = "return performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/live')).length"
    show = (
        "Object.defineProperty(document, 'hidden', {configurable: true, get: () => %s});"
        "document.dispatchEvent(new Event('visibilitychange'));"
    )
    browser.run(show % "true")
    assert browser.text("status-text") == "paused"
    before = browser.run(count)
    time.sleep(2.5)
    assert browser.run(count) - before <= 1  # one may have been on its way
    browser.run(show % "false")
    browser.until(lambda: browser.text("status-text") == "live", "live again")


class FakeServed(threading.Thread):
    """The page over workers that compute nothing, in a thread of this process: it starts and ends at once."""

    def __init__(
        self, tokenizer: Path, *, port: int = 0, created: int = 1, key: str | None = None, admin: Any = None
    ) -> None:
        super().__init__(daemon=True)
        self._tokenizer = tokenizer
        self._created = created
        self._admin = admin
        self._options = HttpOptions(key_digests=digest_keys((key,) if key else (), "test"))
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: uvicorn.Server | None = None
        self._is_up = threading.Event()
        self.start()
        assert self._is_up.wait(60)

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        engine, workers = make_engine(self._tokenizer)
        desk = None if self._admin is None else LocalDesk(self._admin)
        context = ServerContext(engine=engine, model_names=("fake",), created=self._created, admin=desk)
        config = uvicorn.Config(create_app(context, self._options), log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._is_up.set()
        await self._server.serve(sockets=[self._listener])
        await engine.close()
        for worker in workers:
            worker.die()

    def stop(self) -> None:
        """Returns when it has gone."""
        assert self._server is not None
        self._server.should_exit = True
        self.join()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[..., FakeServed]]:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> FakeServed:
            served = FakeServed(tokenizer, **options)
            stack.callback(served.stop)
            return served

        yield start


def test_says_that_the_server_is_gone_and_back(browser: Browser, fake: Callable[..., FakeServed]):
    first = fake(created=1)
    browser.driver.get(f"{first.url}/")
    browser.until(lambda: browser.text("status-text") == "live", "live")
    first.stop()
    browser.until(lambda: "no answer from the server" in browser.text("status-text"), "gone")
    fake(port=first.port, created=2)
    browser.until(lambda: "restarted" in browser.text("status-text"), "back")
    browser.console()  # the browser itself logs refused connections


def test_a_guarded_server_asks_for_the_key(browser: Browser, fake: Callable[..., FakeServed]):
    served = fake(key="sesame")
    for path in ("/", "/live", "/page/main.js"):
        assert httpx.get(f"{served.url}{path}", timeout=60).status_code == 401
    browser.send_key("sesame")
    browser.driver.get(f"{served.url}/")
    browser.until(lambda: browser.text("status-text") == "live", "live")
    browser.send_key(None)  # as if the server had got other keys since
    field = browser.driver.find_element(By.ID, "key")
    browser.until(field.is_displayed, "a field for the key")
    browser.fill("key", "wrong")
    field.submit()
    browser.until(lambda: "does not take" in browser.text("access-text"), "a refusal")
    browser.fill("key", "sesame")
    field.submit()
    browser.until(lambda: browser.text("status-text") == "live", "live with a key")
    assert not field.is_displayed()
    assert browser.run("return Object.values(localStorage).includes('sesame')") is False
    browser.run("sessionStorage.clear()")
    browser.console()  # the browser itself logs the status of 401


class Script:
    """A cluster of which the test says what has become of it."""

    def __init__(self) -> None:
        self.now = ClusterStatus(version=0)

    def status(self) -> ClusterStatus:
        return self.now

    def tell(self, *experts: WorkerStatus, **fields: Any) -> None:
        home = WorkerStatus(rank=0, title="attention 0", role="colocated", state="serving")
        self.now = ClusterStatus(version=1, workers=[home, *experts], max_expert_workers=6, **fields)


def test_a_worker_dies_and_comes_back_and_another_one_joins(
    browser: Browser, fake: Callable[..., FakeServed], tmp_path: Path
):
    cluster = Script()
    expert = partial(WorkerStatus, rank=1, title="expert 0", role="experts")
    cluster.tell(expert(state="serving"), num_expert_workers=1)
    browser.prefer("light")
    browser.driver.get(f"{fake(admin=cluster).url}/")

    def row(rank: int) -> str:
        return str(browser.run(f"return document.querySelectorAll('#workers li')[{rank}]?.textContent ?? ''"))

    def state(rank: int) -> str:
        return str(browser.run(f"return document.querySelectorAll('#workers li')[{rank}]?.className ?? ''"))

    browser.until(lambda: browser.text("status-text") == "live", "live")
    browser.until(lambda: row(1).startswith("1 experts"), "its line")
    assert browser.text("cluster") == "1 of at most 6 expert workers"
    killed = "expert 0 (pid 7) was killed by SIGKILL"
    cluster.tell(expert(state="lost", reason=killed), num_expert_workers=1, missing=32)
    browser.until(lambda: browser.text("status-text") == "expert 0 is lost", "a loss")
    assert killed in row(1) and state(1) == "worker bad"
    assert "32 experts are held by nobody" in browser.text("cluster")
    browser.driver.save_screenshot(str(tmp_path / "lost.png"))
    cluster.tell(expert(state="waiting", reason=killed, num_crashes=3, retry_s=4.0), num_expert_workers=1)
    browser.until(lambda: browser.text("status-text").startswith("expert 0 has died 3 times in a row"), "a pause")
    cluster.tell(expert(state="starting", lives=4, reason=killed), num_expert_workers=1, missing=32)
    shown = "expert 0 is being started; 32 experts are held by nobody"
    browser.until(lambda: browser.text("status-text") == shown, "a new life")
    assert "life 4" in row(1) and state(1) == "worker changing"
    cluster.tell(
        expert(state="serving", lives=4, reason=killed),
        WorkerStatus(rank=2, title="expert 1", role="experts", state="starting"),
        num_expert_workers=2,
        num_replicas=3,
        action="moving 4 of 12 experts",
    )
    browser.until(lambda: browser.text("status-text") == "expert 1 is being started", "one more")
    assert "life 4" in row(1) and state(1) == "worker"
    shown = "2 of at most 6 expert workers · 3 replicas of experts · moving 4 of 12 experts"
    assert browser.text("cluster") == shown
    browser.driver.save_screenshot(str(tmp_path / "joining.png"))
    cluster.tell(expert(state="serving", lives=4), num_expert_workers=1)
    browser.until(lambda: row(2) == "", "gone")
    assert browser.text("status-text") == "live"
    assert browser.console() == []
