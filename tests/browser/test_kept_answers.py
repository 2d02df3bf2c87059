"""Answers that the server keeps, in a browser: taken up again after every cut, stopped by a word, read by EventSource.

Every byte goes through a hop that a test cuts.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from playwright.sync_api import Page, expect

from tests.browser.conftest import ask
from tests.browser.cutter import Cutter
from tests.browser.test_page import button, expect_state, gated, log
from tests.fake_upstream import FakeUpstream, Hang, head, stamped, text
from tests.live.servers import Server, gunicorn, wait_for

READ = """async (url) => {
  const {stream} = await import("/api/assets/streamchat.js");
  const events = [];
  for await (const event of stream(url, {message: "Hello?"})) {
    events.push(event);
    await window.seen?.(events.length);
  }
  return events;
}"""
LISTEN = """(url) => {
  const source = new EventSource(url);
  window.seen = [];
  window.source = source;
  for (const type of ["start", "text", "finish", "warning"]) {
    source.addEventListener(type, (event) => seen.push([event.lastEventId, type, JSON.parse(event.data)]));
  }
}"""


@pytest.fixture(scope="module")
def keeper(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keeps every answer, and finishes it without its caller."""
    folder = tmp_path_factory.mktemp("keeper")
    log = f"sqlite:///{folder}/log.db"
    with gunicorn(upstream_server.base_url, folder, store_url=log, on_disconnect="finish", max_retries="0") as running:
        yield running
        assert "Traceback" not in running.log and "ERROR" not in running.log


@pytest.fixture(scope="module")
def waiter(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keeps every answer, and waits for a caller's return, as ./serve does."""
    folder = tmp_path_factory.mktemp("waiter")
    log = f"sqlite:///{folder}/log.db"
    with gunicorn(upstream_server.base_url, folder, store_url=log, on_disconnect="20", max_retries="0") as running:
        yield running
        assert "Traceback" not in running.log and "ERROR" not in running.log


@pytest.fixture
def hop(keeper: Server) -> Iterator[Cutter]:
    with Cutter(keeper.port) as hop:
        yield hop


@pytest.fixture
def kept(page: Page, hop: Cutter, upstream: FakeUpstream) -> Page:
    """The page, loaded through the hop."""
    page.goto(hop.url)
    return page


def begin(hop: Cutter) -> str:
    """An answer whose first caller has left; its id."""
    asked = {"Accept": "text/event-stream"}
    with requests.post(f"{hop.url}/api/get-response", json={"message": "hi"}, headers=asked, stream=True) as response:
        return response.headers["X-Response-Id"]


def status_of(keeper: Server, id: str) -> str:
    return str(requests.get(f"{keeper.url}/api/responses/{id}", timeout=5).json()["status"])


def wait_seen(page: Page, count: int) -> None:
    """The page's policy forbids what wait_for_function does."""
    wait_for(lambda: page.evaluate("seen.length") == count, what=f"{count} events")


def test_a_cut_answer_goes_on_where_it_was(kept: Page, hop: Cutter, upstream: FakeUpstream) -> None:
    (begin, later, end), upstream.script = gated("Hello", " world")
    asked: list[str] = []
    kept.on("request", lambda request: asked.append(f"{request.method} {request.url.removeprefix(hop.url)}"))
    ask(kept, "Hi?")
    begin.open()
    expect(log(kept)).to_contain_text("Hello")
    hop.cut()
    later.open()
    expect(log(kept)).to_contain_text("Hello world")
    expect_state(kept, "writing")
    end.open()
    expect_state(kept, "done")
    expect(log(kept).get_by_text("Hello world", exact=True)).to_be_visible()
    assert len(upstream.requests) == 1
    assert [each.partition("?")[2] for each in asked if "/stream" in each] == ["after=1"]


def test_whatever_is_cut_no_event_is_missing_or_comes_twice(kept: Page, hop: Cutter, upstream: FakeUpstream) -> None:
    pieces, chance = 150, random.Random(6)
    upstream.script = stamped(pieces, 0.02)
    cuts = sorted(chance.sample(range(2, pieces), 8))
    kept.expose_function("seen", lambda count: hop.cut() if count in cuts else None)
    events = kept.evaluate(READ, "/api/get-response")
    assert [event["seq"] for event in events] == list(range(pieces + 2))
    assert [event["type"] for event in events] == ["start", *["text"] * pieces, "finish"]
    assert len(upstream.requests) == 1
    assert hop.accepted > len(cuts)


@pytest.mark.parametrize("cut", [False, True])
def test_stop_ends_a_kept_answer_at_the_model(
    kept: Page, hop: Cutter, keeper: Server, upstream: FakeUpstream, cut: bool
) -> None:
    (begin, later, _), upstream.script = gated("Hello", " world")
    with kept.expect_response("**/get-response") as response:
        ask(kept, "Hi?")
        begin.open()
    expect(log(kept)).to_contain_text("Hello")
    if cut:
        hop.cut()
        later.open()
        expect(log(kept)).to_contain_text("Hello world")
    button(kept, "Stop").click()
    upstream.requests[0].wait_left(1)
    expect_state(kept, "stopped")
    id = response.value.headers["x-response-id"]
    wait_for(lambda: status_of(keeper, id) == "cancelled", what="the cancelled answer")


@pytest.mark.parametrize("by", ["stop", "reload"])
def test_who_leaves_before_the_headers_ends_the_call_to_the_model_though_answers_are_kept(
    page: Page, waiter: Server, upstream: FakeUpstream, by: str
) -> None:
    upstream.script = [head(), Hang()]
    page.goto(waiter.url)
    responses: list[str] = []
    page.on("response", lambda response: responses.append(response.url))
    ask(page)
    request = upstream.wait_for_requests(1)[0]
    before = time.monotonic()
    button(page, "Stop").click() if by == "stop" else page.reload()
    assert request.wait_left(2) - before < 1
    assert not [url for url in responses if url.endswith("/get-response")]
    if by == "stop":
        expect_state(page, "stopped")
        expect(page.locator(".answer .words")).to_have_text("Stopped")
    wait_for(lambda: [each["outcome"] for each in waiter.records()][-1:] == ["caller_left"], what="the record")


def test_a_kept_answer_whose_reader_reloads_after_the_headers_waits_for_its_return(
    page: Page, waiter: Server, upstream: FakeUpstream
) -> None:
    upstream.script = [head(), text("Hello"), Hang()]
    page.goto(waiter.url)
    with page.expect_response("**/get-response") as response:
        ask(page)
    expect(log(page)).to_contain_text("Hello")
    page.reload()
    id = response.value.headers["x-response-id"]
    with pytest.raises(AssertionError, match="has not left"):
        upstream.requests[0].wait_left(1)
    page.evaluate(f"fetch('/api/responses/{id}/cancel', {{method: 'POST'}})")
    upstream.requests[0].wait_left(1)


def test_a_reload_leaves_the_answer_to_be_finished_and_the_page_usable(
    kept: Page, keeper: Server, upstream: FakeUpstream
) -> None:
    (begin, later, end), upstream.script = gated("Hello", " world")
    with kept.expect_response("**/get-response") as response:
        ask(kept, "Hi?")
        begin.open()
    id = response.value.headers["x-response-id"]
    expect(log(kept)).to_contain_text("Hello")
    kept.reload()
    assert status_of(keeper, id) == "in_progress"
    for gate in (later, end):
        gate.open()
    wait_for(lambda: status_of(keeper, id) == "completed", what="the answer's end")
    ask(kept, "Again?")
    expect(log(kept)).to_contain_text("Hello world")
    assert [request.message for request in upstream.requests] == ["Hi?", "Again?"]


def test_a_part_that_the_log_lost_is_told_as_cut_off(kept: Page, hop: Cutter, upstream: FakeUpstream) -> None:
    (begin, *_), upstream.script = gated("Hello", " world")
    problem = {"code": "gap", "detail": "A part of the answer is missing.", "status": 500}
    kept.route(re.compile(r"/stream\?after="), lambda route: route.fulfill(status=500, json=problem))
    ask(kept, "Hi?")
    begin.open()
    expect(log(kept)).to_contain_text("Hello")
    hop.cut()
    expect_state(kept, "cut")
    expect(kept.locator(".answer .words")).to_have_text("Cut off. A part of the answer is missing.")


def test_a_word_about_the_log_disturbs_no_reader(kept: Page, upstream: FakeUpstream) -> None:
    events: list[dict[str, Any]] = [
        {"type": "start", "seq": 0, "id": "resp_1", "model": "m", "created_at": 1790000000},
        {"type": "text", "seq": 1, "text": "Hello"},
        {"type": "warning", "code": "not_resumable", "message": "The log does not keep up."},
        {"type": "text", "seq": 2, "text": " world"},
        {"type": "finish", "seq": 3, "finish_reason": "stop", "usage": None},
    ]
    body = "".join(f"{json.dumps(event)}\n" for event in events)
    headers = {"Content-Type": "application/x-ndjson", "X-Stream-Resumable": "?1"}
    kept.route("**/get-response", lambda route: route.fulfill(headers=headers, body=body))
    ask(kept, "Hi?")
    expect_state(kept, "done")
    expect(log(kept).get_by_text("Hello world", exact=True)).to_be_visible()


# --- EventSource ------------------------------------------------------------------------------------------


def test_an_event_source_resumes_by_itself_and_stops_after_the_end(
    kept: Page, hop: Cutter, upstream: FakeUpstream
) -> None:
    (first, later, end), upstream.script = gated("Hello", " world")
    first.open()
    id = begin(hop)
    kept.evaluate(LISTEN, f"/api/responses/{id}/stream")
    wait_seen(kept, 2)
    hop.cut()
    for gate in (later, end):
        gate.open()
    wait_seen(kept, 4)
    wait_for(lambda: bool(kept.evaluate("source.readyState === EventSource.CLOSED")), what="the source's end")
    seen = kept.evaluate("seen")
    assert [(number, kind) for number, kind, _ in seen] == [
        ("0", "start"),
        ("1", "text"),
        ("2", "text"),
        ("3", "finish"),
    ]
    assert [event["seq"] for _, _, event in seen] == [0, 1, 2, 3]
