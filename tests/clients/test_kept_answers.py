"""An answer out of the log has, byte for byte, what its first caller read: in every format, by its Idempotency-Key.

Every stream of the corpus, from either API of the upstream, goes through a real server and its log.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from tests.clients.conftest import MODEL, SETTINGS
from tests.clients.corpus import APIS, FORMATS, STREAMS, expected, pieces
from tests.clients.node import Node
from tests.clients.test_ai_sdk import text_of
from tests.fake_upstream import FakeUpstream, Gate, head, last_chunk
from tests.live.servers import Server, gunicorn

TEXT = expected("text", "text.txt").decode()
OWN = {"text.txt": "text/plain", "events.sse": "text/event-stream", "events.ndjson": "application/x-ndjson"}
OPENAI: dict[str, dict[str, Any]] = {
    "openai.sse": {"stream": True},
    "openai-usage.sse": {"stream": True, "stream_options": {"include_usage": True}},
    "openai.json": {},
}


@dataclass(frozen=True)
class Read:
    """A response. `broken`: its connection ended before it did."""

    status: int
    content_type: str
    body: bytes
    broken: bool
    id: str
    replayed: bool

    @property
    def told(self) -> tuple[int, str, bytes, bool]:
        """All that a caller can tell from another answer; of a problem, which request met it stays out."""
        if not self.content_type.startswith("application/problem+json"):
            return self.status, self.content_type, self.body, self.broken
        problem = json.loads(self.body)
        del problem["request_id"]
        return self.status, self.content_type, json.dumps(problem).encode(), self.broken


def question(name: str, text: str) -> tuple[str, str, dict[str, Any]]:
    """Path, Accept and body of the request for one format."""
    if name == "ui.sse":
        message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": text}]}
        return "/api/chat", "*/*", {"id": "chat-1", "messages": [message], "trigger": "submit-message"}
    if name in OPENAI:
        messages = [{"role": "user", "content": text}]
        return "/api/v1/chat/completions", "application/json", {"model": MODEL, "messages": messages} | OPENAI[name]
    return "/api/get-response", OWN.get(name, "application/json"), {"message": text}


def ask(server: Server, name: str, text: str, key: str) -> Read:
    path, accept, body = question(name, text)
    headers = {"Content-Type": "application/json", "Accept": accept, "Idempotency-Key": key}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        try:
            read, broken = response.read(), False
        except http.client.IncompleteRead as error:
            read, broken = error.partial, True
        told = response.headers
        replayed = told.get("Idempotency-Replayed") == "true"
        return Read(response.status, told["Content-Type"], read, broken, told["X-Response-Id"], replayed)


@pytest.fixture(scope="module")
def keepers(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A server that keeps answers for each API of the upstream."""
    with ExitStack() as stack:
        started = {}
        for api in APIS:
            folder = tmp_path_factory.mktemp(api)
            settings = SETTINGS | {"upstream_api": api, "store_url": f"sqlite:///{folder}/log.db", "coalesce_ms": "0"}
            started[api] = stack.enter_context(gunicorn(upstream_server.base_url, folder, **settings))
        yield started
        for server in started.values():
            assert "Traceback" not in server.log and "ERROR" not in server.log


CREATED = re.compile(rb'("created(?:_at)?":)[0-9]+')


def of_any(read: Read) -> tuple[int, str, bytes, bool]:
    """What was told, whichever answer it was and whenever it began."""
    status, content_type, body, broken = read.told
    return status, content_type, CREATED.sub(rb"\1 0", body.replace(read.id.encode(), b"resp")), broken


@pytest.mark.parametrize(("case", "api"), STREAMS)
def test_an_answer_of_the_log_is_what_its_first_caller_read(
    case: str, api: str, keepers: dict[str, Server], upstream: FakeUpstream
) -> None:
    """Again in the format in which it was asked for; our own formats in each other, too."""
    live = {name: ask(keepers[api], name, case, f"{case}, {name}") for name in FORMATS}
    assert not any(read.replayed for read in live.values())
    for name in FORMATS:
        again = ask(keepers[api], name, case, f"{case}, {name}")
        assert (again.replayed, again.id) == (True, live[name].id)
        assert again.told == live[name].told
        if question(name, case)[0] == "/api/get-response":  # another route has another body
            other = ask(keepers[api], name, case, f"{case}, events.ndjson")
            assert (other.replayed, other.id) == (True, live["events.ndjson"].id)
            assert of_any(other) == of_any(live[name])
    assert len(upstream.requests) == len(FORMATS)


# --- asked twice by the clients -----------------------------------------------------------------------------


def sdk(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/api/v1", api_key="none", max_retries=0, timeout=20)


def keyed(text: str, key: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "extra_headers": {"Idempotency-Key": key}}


def streamed(server: Server, text: str, key: str) -> tuple[str, str]:
    """The answer's id and text."""
    ids, said = set(), ""
    with sdk(server) as client, client.chat.completions.create(**keyed(text, key), stream=True) as stream:
        for chunk in stream:
            ids.add(chunk.id)
            said += chunk.choices[0].delta.content or ""
    (id,) = ids
    return id, said


def test_the_python_sdk_reads_an_answer_again_by_its_key(keepers: dict[str, Server], upstream: FakeUpstream) -> None:
    first = streamed(keepers["chat"], "text", "sdk")
    assert streamed(keepers["chat"], "text", "sdk") == first
    with sdk(keepers["chat"]) as client:
        whole = client.chat.completions.create(**keyed("text", "sdk"))
    assert (whole.id, whole.choices[0].message.content) == first == (whole.id, TEXT)
    assert len(upstream.requests) == 1
    assert streamed(keepers["chat"], "text", "another") != first


def test_two_calls_of_the_python_sdk_with_one_key_share_a_running_answer(
    keepers: dict[str, Server], upstream: FakeUpstream
) -> None:
    gate = Gate()
    first, *others = pieces("text", "chat")
    upstream.choose = lambda _: [head(), first, gate, *others, last_chunk()]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(streamed, keepers["chat"], "text", "shared") for _ in range(2)]
        gate.wait_reached()
        gate.open()
        one, other = (call.result(10) for call in calls)
    assert one == other
    assert one[1] == TEXT
    assert len(upstream.requests) == 1


def test_the_python_sdk_raises_the_same_exception_again(keepers: dict[str, Server], upstream: FakeUpstream) -> None:
    for _ in range(2):
        with pytest.raises(openai.InternalServerError) as caught:
            streamed(keepers["chat"], "429", "failing")
        assert (caught.value.status_code, caught.value.code) == (503, "upstream_rate_limited")
    with pytest.raises(openai.UnprocessableEntityError) as mismatch:
        streamed(keepers["chat"], "text", "failing")
    assert mismatch.value.code == "idempotency_mismatch"
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("version", ["ai5", "ai6", "ai7"])
def test_two_chats_with_one_key_share_an_answer(
    node: Node, keepers: dict[str, Server], upstream: FakeUpstream, version: str
) -> None:
    """Such as a question whose sender lost the connection and sent it again."""
    turns = [{"say": "text"}]
    headers = {"Idempotency-Key": f"chats of {version}"}
    job = {"job": "talk", "version": version, "url": f"{keepers['chat'].url}/api/chat", "headers": headers}
    seen = [turn["messages"][-1] for (turn,) in node.run_all([{**job, "turns": turns}, {**job, "turns": turns}])]
    assert seen[0] == seen[1]
    assert text_of(seen[0]) == TEXT
    assert len(upstream.requests) == 1
