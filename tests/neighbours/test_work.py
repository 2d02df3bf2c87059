"""Each neighbour still does its own work beside streamchat, and streamchat with it."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from tests.fake_upstream import Fin, Gate, Hang, answer, done, finish, head, last_chunk, text
from tests.live.readers import JSON, NDJSON, PATH, SSE, TEXT
from tests.live.servers import wait_for
from tests.neighbours.cases import ADDRESS, HOST, Shop, under
from tests.neighbours.mounts import ORIGIN
from tests.neighbours.shop import BROKEN_END

pytestmark = pytest.mark.live

CANARY = "canary question: what is in the safe?"


def hello(shop: Shop) -> None:
    shop.upstream.script = answer(["Hello, ", "world!"])


@under("Flask-Login")
def test_flask_login_says_who_asks(shop: Shop) -> None:
    hello(shop)
    asked = len(shop.upstream.requests)
    refused = shop.somebody(is_user=False, has_token=True).told()
    assert (refused.status, refused.kind, refused.document["code"]) == (401, "application/problem+json", "unauthorized")
    assert len(shop.upstream.requests) == asked
    assert shop.told().body == b"Hello, world!"
    assert shop.last_record()["user"] == "user-7"


@under("Flask-WTF CSRFProtect")
def test_csrf_protect_wants_its_token_in_a_header(shop: Shop) -> None:
    hello(shop)
    asked = len(shop.upstream.requests)
    refused = shop.somebody(is_user=False, has_token=False).told()
    assert (refused.status, refused.document["code"]) == (400, "csrf")
    assert len(shop.upstream.requests) == asked
    assert shop.told().body == b"Hello, world!"


@under("Flask-Session")
def test_flask_session_keeps_what_a_hook_puts_there_and_a_stream_does_not_write_it_late(shop: Shop) -> None:
    hello(shop)
    shop.told()
    before = shop.get("/basket?put=apples").document
    gate = Gate()
    shop.upstream.script = [head(), text("first "), gate, text("second"), finish(), done(), last_chunk()]
    with shop.ask() as reading:
        reading.until(b"first")
        assert shop.get("/basket").document == {"basket": "apples", "asked": before["asked"] + 1}
        shop.get("/basket?put=pears")
        gate.open()
        assert reading.rest().whole
    wait_for(lambda: len(shop.records) == len(shop.upstream.requests), what="the record")
    assert shop.get("/basket").document == {"basket": "pears", "asked": before["asked"] + 1}
    assert "pears" not in str(shop.cookies)


@under("Flask-Limiter")
def test_flask_limiter_answers_429(shop: Shop) -> None:
    hello(shop)
    told = [shop.told(X_Pot=shop.case.server) for _ in range(4)]
    assert [seen.status for seen in told] == [200, 200, 200, 429]
    assert told[0].headers["X-RateLimit-Remaining"] == "2"
    assert int(told[3].headers["Retry-After"]) > 0
    assert shop.told().status == 200


@under("Flask-Compress")
def test_flask_compress_compresses_what_is_no_stream(shop: Shop) -> None:
    shop.upstream.script = answer(["a word and "] * 200)
    for seen in (shop.get("/page", Accept_Encoding="gzip"), shop.told(accept=JSON, Accept_Encoding="gzip")):
        assert seen.headers["Content-Encoding"] == "gzip"
        assert len(seen.body) < len(gzip.decompress(seen.body)) / 2
    for accept in (TEXT, SSE, NDJSON):
        streamed = shop.told(accept=accept, Accept_Encoding="gzip")
        assert "Content-Encoding" not in streamed.headers and b"a word" in streamed.body


@under("Flask-CORS")
def test_flask_cors_and_streamchat_send_each_header_once(shop: Shop) -> None:
    hello(shop)
    others = {"Origin": ORIGIN, "Sec_Fetch_Site": "cross-site"}
    for reading in (shop.ask(**others), shop.open("/page", **others)):
        with reading:
            assert reading.rest().status == 200
            headers = reading.response.headers
            assert headers.get_all("Access-Control-Allow-Origin") == [ORIGIN]
            assert headers.get_all("Access-Control-Allow-Credentials") == ["true"]
            assert ", ".join(headers.get_all("Vary", [])).lower().count("origin") <= 1
    with shop.open(PATH, "OPTIONS", **others, Access_Control_Request_Method="POST") as reading:
        assert reading.rest().status == 204
        assert reading.response.headers.get_all("Access-Control-Allow-Origin") == [ORIGIN]
        assert "X-CSRFToken" in reading.response.headers["Access-Control-Allow-Headers"]
    foreign = shop.told(Origin="https://elsewhere.example", Sec_Fetch_Site="cross-site")
    assert foreign.status == 403 and "Access-Control-Allow-Origin" not in foreign.headers


@under("Flask-Talisman")
def test_flask_talisman_sets_its_headers_on_streams_and_sends_others_to_https(shop: Shop) -> None:
    hello(shop)
    for seen in (shop.told(), shop.get("/page"), shop.get("/api/")):
        assert (seen.status, seen.whole) == (200, True)
        assert seen.headers["Strict-Transport-Security"].startswith("max-age=")
        assert seen.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert seen.headers["X-Content-Type-Options"] == "nosniff"
    open_text = shop.told(X_Forwarded_Proto="http", Referer=f"http://{HOST}/")
    # In debug mode it lets http pass.
    assert open_text.status == (200 if shop.has("Flask-DebugToolbar") else 302)


@under("Flask-DebugToolbar")
def test_flask_debugtoolbar_is_in_pages_and_not_in_answers(shop: Shop) -> None:
    hello(shop)
    assert b"flDebug" in shop.get("/page").body
    assert shop.told().body == b"Hello, world!"
    for accept in (SSE, NDJSON, JSON):
        assert b"flDebug" not in shop.told(accept=accept).body


def events_of(envelopes: list[str]) -> list[dict[str, Any]]:
    """What Sentry shows as issues: transactions and logs are none."""
    lines = [json.loads(line) for envelope in envelopes for line in envelope.splitlines()]
    return [line for line in lines if "exception" in line or line.get("level") == "error"]


@under("sentry-sdk")
def test_sentry_is_told_what_a_hook_raises_and_not_what_was_asked(shop: Shop) -> None:
    before = len(shop.seen()["sentry"])
    asked = len(shop.upstream.requests)
    shop.upstream.script = answer([BROKEN_END])
    assert [shop.told(CANARY, X_Break=hook).status for hook in ("authorize", "build_messages")] == [500, 500]
    assert len(shop.upstream.requests) == asked
    assert shop.told(CANARY).body == BROKEN_END.encode()
    shop.last_record()
    wait_for(lambda: len(events_of(shop.seen()["sentry"][before:])) >= 3, what="the third event")
    sent = shop.seen()["sentry"][before:]
    told = {event["exception"]["values"][-1]["value"] for event in events_of(sent)}
    assert told == {"authorize fails", "build_messages fails", "on_finish fails"}
    assert not [envelope for envelope in sent if CANARY in envelope or f'"{BROKEN_END}"' in envelope]
    assert any('"type":"transaction"' in envelope for envelope in sent)
    # As docs/neighbours.md says.
    assert ("sentry-trace" in shop.upstream.requests[-1].headers) == (shop.case.server != "gevent")


@under("sentry-sdk")
def test_sentry_is_not_told_of_callers_who_leave_nor_of_answers_that_are_cut(shop: Shop) -> None:
    before = len(shop.seen()["sentry"])
    for accept in (TEXT, SSE, NDJSON):
        shop.upstream.script = [head(), text("first "), Fin()]
        shop.told(CANARY, accept)
        assert shop.last_record()["outcome"] == "upstream_incomplete"
        shop.upstream.script = [head(), text("first "), Hang()]
        with shop.ask(CANARY, accept) as reading:
            reading.until(b"first")
        assert shop.last_record()["outcome"] == "caller_left"
    assert events_of(shop.seen()["sentry"][before:]) == []


@under("opentelemetry-instrumentation-flask")
def test_opentelemetry_has_one_server_span_of_an_answer_and_it_ends(shop: Shop) -> None:
    def spans() -> list[dict[str, Any]]:
        found = shop.seen()["spans"]
        assert len(found["begun"]) == len(found["ended"])
        ended = [span for span in found["ended"] if span["kind"] == "SpanKind.SERVER"]
        return [span for span in ended if span["attributes"].get("http.route") == PATH]

    shop.credentials  # noqa: B018  # logging in has a span too
    before = len(spans())
    hello(shop)
    assert shop.told().whole
    shop.upstream.script = [head(), text("first "), Hang()]
    with shop.ask() as reading:
        reading.until(b"first")
        assert len(spans()) == before + 2  # it has ended already
    shop.last_record()
    (whole, left) = spans()[before:]
    assert whole["attributes"]["http.status_code"] == left["attributes"]["http.status_code"] == 200
    assert whole["context"]["trace_id"] != left["context"]["trace_id"]
    assert whole["parent_id"] is left["parent_id"] is None


@under("ProxyFix")
def test_proxy_fix_gives_the_address_and_the_host_of_the_caller(shop: Shop) -> None:
    hello(shop)
    inside = {"Host": "inside.example"}
    assert shop.get("/who", **inside).document == {"url": f"https://{HOST}/who", "address": ADDRESS}
    own = shop.told(**inside, Origin=f"https://{HOST}")  # a page of the shop, by a browser without Sec-Fetch-Site
    assert (own.status, own.body) == (200, b"Hello, world!")
    assert shop.told(**inside, Origin="https://inside.example").status == 403
