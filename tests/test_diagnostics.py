"""POST /diagnostics/stream: who may ask, what may be asked, and that a probe is an answer that asks no model."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask import Flask
from itsdangerous import URLSafeTimedSerializer
from itsdangerous.timed import TimestampSigner
from werkzeug.test import TestResponse

from streamchat import StreamChat
from streamchat.departures import OLD_SECONDS, PREFIX, Departures
from streamchat.diagnostics import (
    FLOOD_PIECE,
    FLOOD_PIECES,
    KINDS,
    MOST_PROBES,
    SALT,
    STREAMS,
    TOKEN_SECONDS,
    check_token,
    make_token,
)
from streamchat.errors import Unauthorized
from streamchat.gevent_loop import holders_of_originals
from streamchat.inspection import worker_class
from streamchat.loop import late_modules
from tests.fake_upstream import FakeUpstream
from tests.shop import NDJSON, SSE, TEXT, Shop, call, events_of, open_shop, read_all, read_until, serve, wait_until

SECRET = "the secret of this shop"
URL = "/api/diagnostics/stream"
ID = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's departures are noted."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def shop(upstream: FakeUpstream) -> Iterator[Shop]:
    """Its probes must ask no model."""

    def build(app: Flask) -> None:
        app.secret_key = SECRET
        StreamChat(app, public=True, diagnostics=True, max_streams=12)

    with open_shop(build) as opened:
        yield opened
        opened.expect_nothing_held()
    assert upstream.requests == []
    assert opened.records == []


def bearer(token: str | None = None) -> dict[str, str]:
    return {"Authorization": f"Bearer {make_token(SECRET) if token is None else token}"}


def ask(shop: Shop, accept: str = SSE, headers: dict[str, str] | None = None, **probe: Any) -> TestResponse:
    given = {"Accept": accept} | (bearer() if headers is None else headers)
    return shop.app.test_client().post(URL, json=probe, headers=given, buffered=True)


def test_there_is_nothing_where_it_is_not_turned_on(upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        shop.app.secret_key = SECRET
        assert ask(shop, probe="report").status_code == 404


@pytest.mark.parametrize("method", ["get", "put", "delete"])
def test_it_is_for_post_alone(shop: Shop, method: str) -> None:
    assert shop.app.test_client().open(URL, method=method.upper(), headers=bearer()).status_code == 405


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic x"},
        bearer(""),
        bearer("x.y.z"),
        bearer(make_token("another secret")),
        bearer(str(URLSafeTimedSerializer(SECRET, salt="another purpose").dumps("stream"))),
        {"Authorization": make_token(SECRET)},
    ],
    ids=str,
)
def test_without_a_token_of_this_app_nothing_is_told(shop: Shop, header: dict[str, str]) -> None:
    refused = ask(shop, headers=header, probe="report")
    assert (refused.status_code, json.loads(refused.data)["code"]) == (401, "unauthorized")


@pytest.mark.parametrize(("age", "good"), [(0, True), (250, True), (-250, True), (310, False), (-310, False)])
def test_a_token_is_good_for_five_minutes_whichever_clock_is_ahead(
    monkeypatch: pytest.MonkeyPatch, age: int, good: bool
) -> None:
    assert TOKEN_SECONDS == 300
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: int(time.time()) - age)
    header = f"Bearer {URLSafeTimedSerializer(SECRET, salt=SALT).dumps('stream')}"
    if good:
        check_token(header, SECRET)
    else:
        with pytest.raises(Unauthorized):
            check_token(header, SECRET)


@pytest.mark.parametrize("secret", [None, "", b""])
def test_an_app_without_a_secret_lets_nobody_in(secret: str | bytes | None) -> None:
    with pytest.raises(Unauthorized):
        check_token(f"Bearer {make_token('')}", secret)


@pytest.mark.parametrize(
    ("probe", "named"),
    [
        ({}, "probe"),
        ({"probe": "other"}, "probe"),
        ({"probe": 1}, "probe"),
        ({"probe": "pieces", "more": 1}, "field"),
        ({"probe": "pieces", "pieces": 101}, "pieces"),
        ({"probe": "pieces", "pieces": 0}, "pieces"),
        ({"probe": "pieces", "pieces": 1.5}, "pieces"),
        ({"probe": "pieces", "pieces": True}, "pieces"),
        ({"probe": "pieces", "interval": 2.1}, "interval"),
        ({"probe": "pieces", "interval": "1"}, "interval"),
        ({"probe": "pieces", "pieces": 100, "interval": 1}, "60 seconds"),
        ({"probe": "pieces", "accel": 1}, "accel"),
        ({"probe": "silence", "seconds": 571}, "seconds"),
        ({"probe": "departure", "id": ID, "seconds": 61}, "seconds"),
        ({"probe": "departure"}, "id"),
        ({"probe": "departed", "id": "../../etc/passwd"}, "id"),
        ({"probe": "flood", "id": ID.upper()}, "id"),
        ({"probe": "pieces", "id": ID}, "id"),
        ({"probe": ["pieces"]}, "probe"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_probe_is_named(shop: Shop, probe: dict[str, Any], named: str) -> None:
    refused = ask(shop, **probe)
    assert refused.status_code == 400
    assert named in json.loads(refused.data)["detail"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b"\xff", b'"pieces"', b"[" * 900])
def test_a_body_that_is_no_object_is_refused(shop: Shop, body: bytes) -> None:
    client = shop.app.test_client()
    refused = client.post(URL, data=body, headers=bearer(), content_type="application/json")
    assert refused.status_code == 400


def test_a_long_body_is_refused(shop: Shop) -> None:
    assert shop.app.test_client().post(URL, data=b" " * 1001, headers=bearer()).status_code == 413


def test_a_probe_is_never_written_whole(shop: Shop) -> None:
    assert ask(shop, "application/json", probe="pieces").status_code == 406


@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_pieces_are_paced_and_have_the_time_at_which_they_were_made(shop: Shop, accept: str) -> None:
    answer = ask(shop, accept, probe="pieces", pieces=4, interval=0.02)
    start, *pieces, finish = events_of(accept, answer.data)
    assert (start["type"], finish["type"]) == ("start", "finish")
    made = [json.loads(piece["text"]) for piece in pieces]
    assert [each["n"] for each in made] == [0, 1, 2, 3]
    assert all(later["at"] - earlier["at"] >= 0.02 for earlier, later in pairwise(made))


def test_the_text_is_a_line_a_piece(shop: Shop) -> None:
    lines = ask(shop, TEXT, probe="pieces", pieces=2, interval=0.01).data.splitlines()
    assert [json.loads(line)["n"] for line in lines] == [0, 1]


def test_a_probe_has_the_headers_of_an_answer_and_may_leave_one_out(shop: Shop) -> None:
    answer = ask(shop, probe="pieces", pieces=1)
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert "no-transform" in answer.headers["Cache-Control"]
    assert answer.headers["X-Response-Id"].startswith("resp_")
    assert "Content-Length" not in answer.headers
    assert "X-Accel-Buffering" not in ask(shop, probe="pieces", pieces=1, accel=False).headers


def test_a_silence_is_as_long_as_asked_for(shop: Shop) -> None:
    lines = ask(shop, TEXT, probe="silence", seconds=0.2).data.splitlines()
    first, second = (json.loads(line)["at"] for line in lines)
    assert 0.2 <= second - first < 5


def on_the_wire(port: int, accept: str, **probe: Any) -> Any:
    body = json.dumps(probe).encode()
    head = f"POST {URL} HTTP/1.1\r\nHost: shop\r\nAccept: {accept}\r\nAuthorization: Bearer {make_token(SECRET)}\r\n"
    return call(port, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.mark.parametrize("probe", ["cut", "lapse"])
def test_a_cut_text_has_no_end(shop: Shop, probe: str) -> None:
    with serve(shop.app) as port, on_the_wire(port, TEXT, probe=probe) as caller:
        wire = read_all(caller)
    assert b'"n":2' in wire
    assert not wire.endswith(b"0\r\n\r\n")


def test_a_cut_stream_of_events_ends_with_the_error(shop: Shop) -> None:
    events = events_of(SSE, ask(shop, probe="cut").data)
    assert [event["type"] for event in events] == ["start", "text", "text", "text", "error"]
    assert [event["seq"] for event in events] == [0, 1, 2, 3, 4]
    assert events[-1]["code"] == "interrupted"


def test_when_a_caller_left_can_be_asked_for(shop: Shop) -> None:
    with serve(shop.app) as port:
        with on_the_wire(port, SSE, probe="departure", id=ID, seconds=30) as caller:
            read_until(caller, b'\\"n\\":0')
            assert told(shop) == {"state": "running"}
        wait_until(lambda: told(shop)["state"] == "left", "the leaving was not noted")
        assert 0 < told(shop)["after"] < 5
    assert shop.mounts[0].process.probes.acquire(blocking=False)


def told(shop: Shop) -> dict[str, Any]:
    found = json.loads(ask(shop, probe="departed", id=ID).data)
    assert isinstance(found, dict)
    return found


def test_a_caller_that_stays_to_the_end_has_not_left(shop: Shop) -> None:
    assert told(shop) == {"state": "unknown"}
    ask(shop, probe="departure", id=ID, seconds=0.05)
    assert told(shop) == {"state": "stayed"}


def test_an_id_is_good_for_one_probe(shop: Shop) -> None:
    ask(shop, probe="departure", id=ID, seconds=0.05)
    assert ask(shop, probe="departure", id=ID, seconds=0.05).status_code == 400
    shop.expect_nothing_held()


def test_how_much_of_a_flood_is_taken_can_be_asked_for(shop: Shop) -> None:
    with serve(shop.app) as port, on_the_wire(port, TEXT, probe="flood", id=ID, seconds=5) as caller:
        read_until(caller, b"x" * 100)
        size = 0
        while size < 3_000_000:
            piece = caller.recv(1 << 20)
            assert piece
            size += len(piece)
        wait_until(lambda: told(shop).get("part", 0) > size / (FLOOD_PIECE * FLOOD_PIECES) / 2, "it is not noted")


def test_so_many_probes_run_at_a_time_and_each_is_a_live_answer(shop: Shop) -> None:
    with serve(shop.app) as port:
        callers = [on_the_wire(port, SSE, probe="silence", seconds=60) for _ in range(MOST_PROBES)]
        try:
            for caller in callers:
                read_until(caller, b'\\"n\\":0')
            assert len(shop.mounts[0].process.live) == MOST_PROBES
            refused = ask(shop, probe="pieces")
            assert (refused.status_code, json.loads(refused.data)["code"]) == (429, "too_many_streams")
            assert refused.headers["Retry-After"]
        finally:
            for caller in callers:
                caller.close()
        shop.expect_nothing_held()
        assert ask(shop, probe="pieces", pieces=1).status_code == 200


def test_a_full_worker_runs_no_probe_and_keeps_no_place_for_it(shop: Shop) -> None:
    process = shop.mounts[0].process
    process.live.most = 0
    for _ in range(MOST_PROBES + 1):
        assert ask(shop, probe="pieces").status_code == 503
    process.live.most = 12
    assert ask(shop, probe="pieces", pieces=1).status_code == 200


def test_the_report_says_what_serves_and_within_which_limits(shop: Shop) -> None:
    with serve(shop.app) as port, on_the_wire(port, SSE, probe="report") as caller:
        head, _, body = read_until(caller, b"}\n").partition(b"\r\n\r\n")
    report = json.loads(body)
    assert b"no-store" in head
    assert report["worker"] == "flask run"
    assert report["limits"]["max_streams"] == 12
    assert report["request"] == {"protocol": "HTTP/1.1", "scheme": "http", "added": []}
    assert report["settings"]["heartbeat"] == 15
    assert {"python", "flask", "werkzeug", "openai", "streamchat"} <= report["versions"].keys()
    assert report["versions"]["flask"][0].isdigit()


def test_the_report_names_what_proxies_added(shop: Shop) -> None:
    report = json.loads(ask(shop, headers=bearer() | {"X-Forwarded-For": "1.2.3.4", "Via": "x"}, probe="report").data)
    assert report["request"]["added"] == ["Via", "X-Forwarded-For"]
    assert "1.2.3.4" not in json.dumps(report)


@pytest.mark.parametrize(
    ("environ", "found"),
    [({"werkzeug.socket": 1}, "flask run"), ({"SERVER_SOFTWARE": "waitress"}, "waitress"), ({}, "unknown")],
)
def test_a_server_is_known_by_what_it_says(environ: dict[str, Any], found: str) -> None:
    assert worker_class(environ) == found


def test_nothing_is_late_where_gevent_replaces_nothing() -> None:
    assert late_modules() == []


def test_a_package_that_keeps_what_gevent_replaced_is_named_once() -> None:
    early, later = ModuleType("early"), ModuleType("later")
    vars(early)["mine"] = socket.socket  # nothing is replaced in this process: the original is what there is
    found = holders_of_originals(
        {"early": early, "early.deep": early, "later": later, "gevent.of": early, "ssl": early}
    )
    assert found == ["early"]


def test_every_kind_of_probe_is_told_apart() -> None:
    assert len(set(KINDS)) == len(KINDS) == len(STREAMS) + 2


def test_old_notes_of_departures_go_away_and_no_others(folder: Path) -> None:
    departures = Departures(str(folder))
    departures.begin("old")
    (noted,) = folder.iterdir()
    assert noted.name.startswith(PREFIX) and noted.stat().st_mode & 0o777 == 0o600
    before = time.time() - OLD_SECONDS - 1
    os.utime(noted, (before, before))
    (folder / "another").touch()
    departures.begin("new")
    assert not noted.exists()
    assert departures.find("new") == {"state": "running"}
    assert len(list(folder.iterdir())) == 2
