"""Our own transport and the SDK's own HTTP give callers the same bytes, in every format, however the network cuts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_upstream import FakeUpstream, Fin, Step, event, head, http_chunk, last_chunk, sse
from tests.shop import FORMATS, KEY, TEXT, Shop, open_shop
from tests.splits import random_splits
from tests.test_upstream import DELTAS

Paths = tuple[FakeUpstream, list[Shop]]
DONE = b"data: [DONE]\n\n"
# Whole, cut, failed: the body's last events, and what comes behind them on the wire.
ENDS: dict[str, tuple[bytes, Step]] = {
    "whole": (event({}, "stop") + DONE, last_chunk()),
    "no finish_reason": (DONE, last_chunk()),
    "cut": (b'data: {"choices": [', Fin()),
    "error object": (sse({"error": {"message": "gone"}}), last_chunk()),
}


@pytest.fixture(scope="module")
def paths() -> Iterator[Paths]:
    with FakeUpstream() as upstream, ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", OPENAI_BASE_URL=upstream.base_url, OPENAI_API_KEY=KEY))
        options: dict[str, Any] = {"make_id": lambda: "resp_1", "coalesce_ms": 0}
        yield upstream, [stack.enter_context(open_shop(http=http, **options)) for http in ("fast", "sdk")]


def said(shop: Shop, accept: str) -> tuple[int, bytes]:
    """The status and the bytes of an answer; a text answer that is broken off has those that came before."""
    response = shop.app.test_client().post("/api/get-response", json={"message": "hi"}, headers={"Accept": accept})
    body = b""
    try:
        for piece in response.response:
            body += piece if isinstance(piece, bytes) else piece.encode()
    except ConnectionResetError:
        body += b"<broken off>"
    response.close()
    return response.status_code, re.sub(rb'"created_at":\d+', b'"created_at":0', body)


@given(
    deltas=st.lists(DELTAS, max_size=6),
    end=st.sampled_from(sorted(ENDS)),
    accept=st.sampled_from(FORMATS),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_both_paths_give_the_same_bytes_under_any_splitting(
    paths: Paths, deltas: list[dict[str, Any]], end: str, accept: str, data: st.DataObject
) -> None:
    upstream, shops = paths
    last, behind = ENDS[end]
    # The first piece decides the status in both, wherever the rest is cut.
    first, stream = event({"content": "a"}), b"".join(event(delta) for delta in deltas) + last
    found = []
    for shop in (*shops, *shops):
        body = [http_chunk(part) for part in (first, *data.draw(random_splits(stream)))]
        wire = data.draw(random_splits(b"".join(body)))
        upstream.script = [head(), *wire, behind]
        found.append(said(shop, accept))
    assert all(each == found[0] for each in found), found
    assert found[0][1].startswith(b"a") or accept != TEXT
