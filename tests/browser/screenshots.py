"""`python -m tests.browser.screenshots`: pictures of the page's states, written to docs/. Not a test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.conftest import CHROMIUM, FLAGS, ask
from tests.fake_upstream import FakeUpstream, Fin, Hang, Step, answer, error, head, text
from tests.live.servers import gunicorn

DOCS = Path(__file__).parents[2] / "docs"
QUESTION = "How do I stream an answer from Flask?"
ANSWER = """A generator function becomes a streamed response. Three things matter:

1. **Headers first.** The status is sent before the first piece, so a failure *after* it must be seen in another way.
2. Nothing may buffer on the way: see [nginx's documentation](https://nginx.org/en/docs/) on `proxy_buffering`.
3. The generator must be closed when the caller leaves.

```python
@app.get("/count")
def count():
    def numbers():
        for number in range(10):
            yield f"{number}\\n"

    return Response(numbers(), mimetype="text/plain")
```

| Worker | Answers at a time |
|---|--:|
| sync | 1 |
| gevent | 900 |
"""
OPENING = ANSWER[: ANSWER.index("3. The")]
# Name, upstream's script, the state to wait for, colour scheme, width, height.
STATES: list[tuple[str, Step, str, str, int, int]] = [
    ("page-answer", answer([ANSWER]), "done", "light", 960, 860),
    ("page-dark", answer([ANSWER]), "done", "dark", 960, 860),
    ("page-narrow", answer([ANSWER]), "done", "light", 390, 844),
    ("page-waiting", [head(), Hang()], "waiting", "light", 960, 420),
    ("page-writing", [head(), text(OPENING), Hang()], "writing", "light", 960, 520),
    ("page-cut", [head(), text(OPENING), Fin()], "cut", "light", 960, 560),
    ("page-limited", error(429, headers={"Retry-After": "30"}), "limited", "light", 960, 420),
]


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    DOCS.mkdir(exist_ok=True)
    with FakeUpstream() as upstream, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        with gunicorn(upstream.base_url, folder, max_retries="0") as server:
            for name, script, state, scheme, width, height in STATES:
                upstream.script = script
                take(browser, server.url, name, scheme, width, height, partial(show, state=state))
            upstream.script = [head(), text(OPENING), Hang()]
            take(browser, server.url, "page-stopped", "dark", 960, 560, show_stopped)
        with gunicorn(upstream.base_url, folder, public="false", tokens='["a-token"]') as server:
            take(browser, server.url, "page-token", "light", 960, 560, show_token)


def take(
    browser: Browser, url: str, name: str, scheme: str, width: int, height: int, prepare: Callable[[Page], None]
) -> None:
    page = browser.new_page(
        color_scheme=scheme,  # type: ignore[arg-type]
        viewport={"width": width, "height": height},
        reduced_motion="reduce",
    )
    page.goto(url)
    prepare(page)
    page.screenshot(path=DOCS / f"{name}.png")
    page.close()


def show(page: Page, state: str) -> None:
    ask(page, QUESTION)
    page.locator(f".answer[data-state={state}]").wait_for()


def show_stopped(page: Page) -> None:
    show(page, "writing")
    page.get_by_text("proxy_buffering").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator(".answer[data-state=stopped]").wait_for()


def show_token(page: Page) -> None:
    ask(page, QUESTION)
    page.get_by_label("Token", exact=True).wait_for()


if __name__ == "__main__":
    main()
