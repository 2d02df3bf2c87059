"""Chromium, and servers for it: a real gunicorn in a process of its own, with the fake upstream behind it.

The browser reaches 127.0.0.1 alone: every other name leads to `Foreign`, which tells of whoever asks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.fake_upstream import FakeUpstream, RecordedRequest, Step, answer, head
from tests.live.servers import Server, gunicorn

CHROMIUM = Path("/usr/bin/chromium")
# The first is for root, in containers; the others keep the browser from calling home.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

expect.set_options(timeout=10_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.live)


class Foreign:
    """Another site: serves the page it is given, and records every request."""

    def __init__(self, server: FakeUpstream) -> None:
        self.server = server
        self.page = ""
        server.choose = self._answer

    def _answer(self, request: RecordedRequest) -> Step:
        body = self.page.encode()
        fields = {"Content-Length": str(len(body)), "Access-Control-Allow-Origin": "*"}
        return head(200, fields, content_type="text/html; charset=utf-8", chunked=False) + body

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def asked(self) -> list[str]:
        """What was asked of it, by whatever name."""
        return [f"{each.headers.get('host')}{each.path}" for each in self.server.requests]


@pytest.fixture(scope="package")
def foreign_server() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture
def foreign(foreign_server: FakeUpstream) -> Foreign:
    foreign_server.requests.clear()
    return Foreign(foreign_server)


@pytest.fixture(scope="package")
def browser(foreign_server: FakeUpstream) -> Iterator[Browser]:
    assert CHROMIUM.exists(), "Chromium is missing: install Debian's package chromium"
    rules = f"--host-resolver-rules=MAP * 127.0.0.1:{foreign_server.port}, EXCLUDE 127.0.0.1, EXCLUDE localhost"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, rules])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def upstream_server() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture
def upstream(upstream_server: FakeUpstream) -> FakeUpstream:
    upstream_server.requests.clear()
    upstream_server.scripts.clear()
    upstream_server.choose = None
    upstream_server.script = answer(["Hello", ", ", "world", "!"])
    return upstream_server


@pytest.fixture(scope="package")
def server(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """wsgi.py as it is deployed, open to everybody."""
    with gunicorn(upstream_server.base_url, tmp_path_factory.mktemp("gunicorn"), max_retries="0") as running:
        yield running


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A tab in which nothing may fail unseen."""
    page = context.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: failures.append(message.text) if _tells_of_csp(message.text) else None)
    yield page
    assert failures == []


def _tells_of_csp(text: str) -> bool:
    return "Content Security Policy" in text or "Trusted" in text


@pytest.fixture
def chat(page: Page, server: Server, upstream: FakeUpstream) -> Page:
    """The page, loaded."""
    page.goto(server.url)
    return page


def ask(page: Page, question: str = "Hello?") -> None:
    page.get_by_role("textbox", name="Message").fill(question)
    page.get_by_role("button", name="Send").click()
