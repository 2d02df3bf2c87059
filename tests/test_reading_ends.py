"""A reader is sent away with 204 only when it has the answer's last event; what the log never got is an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from streamchat.bookkeeping import Unfinished, interrupted
from streamchat.events import Event, Failure, Finish, Start, Text
from streamchat.store import Batch, Ending, Entry, Limits, Status, pack
from tests.shop import SSE, Shop, open_shop, sse_events

ID = "resp_kept"
STARTED = 1790000000.0
HEAD: list[Event] = [Start(ID, "m", 1790000000), Text("Hello"), Text(" world")]
WHOLE: list[Event] = [*HEAD, Finish("stop")]
FAILED: list[Event] = [*HEAD, Failure("upstream_incomplete", "The answer was cut off.", True)]


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody-asks")
    with open_shop(store_url="memory://") as shop:
        yield shop


def keep(shop: Shop, events: list[Event], status: Status = "completed") -> None:
    """An answer of the log that has ended, with these events of it."""
    store = shop.mounts[0].log.store
    owner = store.take_lease()
    store.admit(Entry(ID, owner, None, "m", STARTED), Limits())
    batches = [Batch(ID, 0, len(events), pack(events))] if events else []
    record = replace(interrupted(Unfinished(ID, None, "m", STARTED, len(events)), STARTED)[1].record, outcome=status)
    store.write(owner, batches, [Ending(ID, status, record, "stop")])


def read(shop: Shop, after: int) -> tuple[int, str, bytes]:
    path = f"/api/responses/{ID}/stream"
    response = shop.app.test_client().get(path, headers={"Accept": SSE, "Last-Event-ID": str(after)}, buffered=True)
    return response.status_code, response.headers.get("Content-Type", ""), response.data


@pytest.mark.parametrize("events", [WHOLE, FAILED])
def test_who_has_the_last_event_is_told_that_there_is_no_more(shop: Shop, events: list[Event]) -> None:
    keep(shop, events)
    assert read(shop, 3) == (204, "", b"")


def test_who_lacks_the_last_event_gets_it(shop: Shop) -> None:
    keep(shop, WHOLE)
    status, _, body = read(shop, 2)
    assert (status, [event["type"] for event in sse_events(body)]) == (200, ["finish"])


@pytest.mark.parametrize(("events", "after"), [(HEAD, 2), (HEAD, 5), ([], -1)])
def test_an_answer_whose_end_was_never_written_is_not_called_told(shop: Shop, events: list[Event], after: int) -> None:
    """The log had given it up: its readers have not seen how it ended, and nobody can tell them."""
    keep(shop, events)
    status, content_type, body = read(shop, after)
    assert status != 204
    assert b'"gap"' in body
    assert content_type in ("application/problem+json", "text/event-stream; charset=utf-8")


@pytest.mark.parametrize("after", [4, 5, 1000])
def test_who_has_more_of_a_failed_answer_than_the_log_is_told_how_it_failed(shop: Shop, after: int) -> None:
    """Its producer died before all was written that it had told: such a reader has done nothing wrong."""
    keep(shop, FAILED, "failed")
    status, _, body = read(shop, after)
    (event,) = sse_events(body)
    assert (status, event["seq"], event["code"]) == (200, 3, "upstream_incomplete")
    assert b"id: 3\n" in body  # with which an EventSource comes back, and is told that there is no more


@pytest.mark.parametrize("path", ["/api/responses/resp_1", "/api/responses/resp_1/stream", "/api/chat/c1/stream"])
def test_another_sites_page_may_ask_whether_it_may_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    with open_shop(origins=["https://other.example"]) as shop:
        asked = {"Origin": "https://other.example", "Access-Control-Request-Method": "GET"}
        response = shop.app.test_client().options(path, headers=asked)
    assert response.status_code == 204
    assert response.headers["Access-Control-Allow-Methods"] == "GET, OPTIONS"
    assert "Last-Event-ID" in response.headers["Access-Control-Allow-Headers"]
    assert "Idempotency-Replayed" in response.headers["Access-Control-Expose-Headers"]
