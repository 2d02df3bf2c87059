"""Whatever else an app mounts: pieces come one by one, answers end truthfully, who leaves ends the model's work."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.fake_upstream import Fin, Gate, Hang, answer, done, finish, head, last_chunk, text
from tests.live.readers import JSON, NDJSON, SSE, TEXT
from tests.live.servers import wait_for
from tests.neighbours.cases import Shop, under

pytestmark = pytest.mark.live

STREAMED = (TEXT, SSE, NDJSON)
ENDS = {TEXT: b"second", SSE: b"event: finish", NDJSON: b'"type":"finish"'}
AT_ONCE = 50
# What browsers and requests send: an extension that compresses takes the best of them.
ENCODINGS = "gzip, deflate, br, zstd"


@under()
def test_the_first_piece_is_read_before_the_second_is_made(shop: Shop) -> None:
    for accept in STREAMED:
        gate = Gate()
        shop.upstream.script = [head(), text("first "), gate, text("second"), finish(), done(), last_chunk()]
        with shop.ask(accept=accept, Accept_Encoding=ENCODINGS) as reading:
            assert b"second" not in reading.until(b"first")
            gate.open()
            seen = reading.rest()
        assert (seen.status, seen.whole) == (200, True), (accept, seen)
        assert ENDS[accept] in seen.body
        assert not {"Content-Encoding", "Content-Length"} & set(seen.headers)


@under()
def test_an_answer_is_whole_and_its_cut_is_seen(shop: Shop) -> None:
    shop.upstream.script = answer(["first ", "second"])
    whole = {accept: shop.told(accept=accept) for accept in (*STREAMED, JSON)}
    assert all((seen.status, seen.whole) == (200, True) for seen in whole.values()), whole
    assert whole[TEXT].body == b"first second"
    assert whole[SSE].events[-1]["type"] == whole[NDJSON].events[-1]["type"] == "finish"
    assert whole[JSON].document["text"] == "first second"

    shop.upstream.script = [head(), text("first "), Fin()]
    cut = {accept: shop.told(accept=accept) for accept in (*STREAMED, JSON)}
    assert (cut[TEXT].body, cut[TEXT].whole) == (b"first ", False)
    assert cut[SSE].events[-1]["code"] == cut[NDJSON].events[-1]["code"] == "upstream_incomplete"
    assert (cut[JSON].status, cut[JSON].document["code"]) == (502, "upstream_incomplete")


@under()
def test_who_leaves_ends_the_call_of_the_model(shop: Shop) -> None:
    for accept in STREAMED:
        shop.upstream.script = [head(), text("first "), Hang()]
        with shop.ask(accept=accept) as reading:
            reading.until(b"first")
        shop.upstream.requests[-1].wait_left(2)
    asked = len(shop.upstream.requests)
    shop.upstream.script = Hang()
    with shop.ask():  # nothing is read: it leaves before the first byte
        shop.upstream.wait_for_requests(asked + 1)
    shop.upstream.requests[-1].wait_left(2)
    wait_for(lambda: len(shop.records) == len(shop.upstream.requests), what="the last record")
    assert [record["outcome"] for record in shop.records[-4:]] == ["caller_left"] * 4


@under("Flask-SQLAlchemy")
def test_fifty_streams_hold_no_connection_of_a_pool_of_five(shop: Shop) -> None:
    begin, go_on = Gate(), Gate()
    asked = len(shop.upstream.requests)
    shop.upstream.script = [head(), begin, text("first "), go_on, text("second"), finish(), done(), last_chunk()]
    with ExitStack() as stack:
        readings = [stack.enter_context(shop.ask()) for _ in range(AT_ONCE)]
        shop.upstream.wait_for_requests(asked + AT_ONCE, 10)
        assert shop.seen()["checked out"] == 0  # all wait for their first byte
        begin.open()
        for reading in readings:
            reading.until(b"first")
        assert shop.seen()["checked out"] == 0  # all are being streamed
        go_on.open()
        assert [reading.rest().body for reading in readings] == [b"second"] * AT_ONCE
    assert shop.seen()["checked out"] == 0


@under()
def test_nothing_went_wrong_unseen(shop: Shop) -> None:
    """The last of a case's tests of streams: what a neighbour logs of its own trouble is not seen by callers."""
    assert "Traceback" not in shop.server.log, shop.server.log
    assert "ERROR" not in shop.server.log, shop.server.log
