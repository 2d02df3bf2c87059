"""The AI SDK takes up answers that still run, of the chat's own user, and finds none otherwise.

The model stands still at a gate until the client calls for it: no answer ends before its reader is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import requests

from tests.clients.conftest import SETTINGS, TOKEN
from tests.clients.corpus import expected, pieces
from tests.clients.node import Node
from tests.clients.test_ai_sdk import assert_failed, assert_succeeded, sent, shown, text_of
from tests.fake_upstream import FakeUpstream, Gate, RecordedRequest, Step, head, last_chunk
from tests.live.servers import Server, gunicorn, wait_for

WHOLE = expected("text", "text.txt").decode()
BEFORE = "Hello"  # what is told before the gate
OPEN = "/open"
USER: dict[str, Any] = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "text"}]}
ADA, BOB = {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": "Bearer token-of-bob"}
KEEPING = {"on_disconnect": "finish", "idle_timeout": "10", "status_hold": "0.1"}
USERS = {"public": "false", "tokens": f'{{"ada": "{TOKEN}", "bob": "token-of-bob"}}'}


@pytest.fixture(scope="module")
def keepers(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Servers that keep answers and finish them without their caller: for users they know, and for everybody."""
    with ExitStack() as stack:
        started = {}
        for name, own in {"users": USERS, "public": {}}.items():
            folder = tmp_path_factory.mktemp(name)
            settings = SETTINGS | KEEPING | own | {"store_url": f"sqlite:///{folder}/log.db"}
            started[name] = stack.enter_context(gunicorn(upstream_server.base_url, folder, **settings))
        yield started
        for server in started.values():
            assert "Traceback" not in server.log and "ERROR" not in server.log


@pytest.fixture
def gate(upstream: FakeUpstream) -> Iterator[Gate]:
    """Where each answer stands still after its first words, until somebody calls OPEN at the upstream."""
    gate = Gate()

    def choose(request: RecordedRequest) -> Step:
        if request.path.endswith(OPEN):
            gate.open()
            upstream.requests.remove(request)
            return head(204, chunked=False)
        first, second, *others = pieces("text", "chat")
        rest = [] if request.message == "cut" else others
        return [head(), first, second, gate, *rest, last_chunk()]

    upstream.choose = choose
    yield gate
    gate.open()


class Talk:
    """A chat of one version of the SDK with a server that keeps answers."""

    def __init__(self, node: Node, server: Server, upstream: FakeUpstream, version: str) -> None:
        self._node, self._server, self._version = node, server, version
        self.upstream = upstream
        self.opening = {"resume": True, "call": BEFORE, "url": f"{upstream.base_url}{OPEN}"}

    def talk(self, *turns: dict[str, Any], **options: Any) -> list[Any]:
        asked = {"headers": ADA, "version": self._version, "turns": list(turns)} | options
        return list(self._node.run("talk", url=f"{self._server.url}/api/chat", **asked))

    def at_once(self, *turns: dict[str, Any]) -> list[Any]:
        """Pages of their own, which know the question alone."""
        asked = {"job": "talk", "version": self._version, "url": f"{self._server.url}/api/chat", "headers": ADA}
        return [seen[0] for seen in self._node.run_all([{**asked, "messages": [USER], "turns": [t]} for t in turns])]

    def left(self, question: str = "text", **options: Any) -> Any:
        """A question whose caller is cut off in the middle of the answer, which goes on."""
        (turn,) = self.talk({"say": question, "cut": BEFORE}, **options)
        assert turn["status"] == "error" and text_of(turn["messages"][-1]) == BEFORE
        return turn

    def finds(self, **options: Any) -> bool:
        asked = {"headers": ADA, "version": self._version} | options
        return self._node.run("reconnect", url=f"{self._server.url}/api/chat", **asked)["stream"] is not None

    def status_of(self, id: str) -> str:
        found = requests.get(f"{self._server.url}/api/responses/{id}", headers=ADA, timeout=5)
        return str(found.json()["status"])

    def cancel(self, id: str) -> None:
        cancelled = requests.post(f"{self._server.url}/api/responses/{id}/cancel", headers=ADA, timeout=5)
        assert cancelled.json()["status"] == "cancelled"


@pytest.fixture(params=["ai5", "ai6", "ai7"])
def chat(request: pytest.FixtureRequest, node: Node, keepers: dict[str, Server], upstream: FakeUpstream) -> Talk:
    return Talk(node, keepers["users"], upstream, request.param)


# 5.0.0 appends what it resumes to the half answer that it has, and forgets to be ready where there is none.
newer = pytest.mark.parametrize("chat", ["ai6", "ai7"], indirect=True)


@pytest.mark.parametrize("transport", ["ui", "text"])
def test_a_reloaded_page_reads_a_running_answer_from_its_start_to_its_end(
    chat: Talk, gate: Gate, transport: str
) -> None:
    chat.left(transport=transport)
    (resumed,) = chat.talk(chat.opening, messages=[USER], transport=transport)
    assert_succeeded(resumed)
    assert shown(resumed) == [("user", "text"), ("assistant", WHOLE)]
    assert len(chat.upstream.requests) == 1


def test_a_resumed_message_is_the_one_that_was_left(chat: Talk, gate: Gate) -> None:
    left = chat.left()
    (resumed,) = chat.talk(chat.opening, messages=[USER])
    answer = resumed["messages"][-1]
    assert answer["id"] == left["messages"][-1]["id"]
    assert answer["metadata"]["finishReason"] == "stop"


@newer
def test_a_chat_that_lost_its_connection_goes_on_without_repeating_a_word(chat: Talk, gate: Gate) -> None:
    cut, resumed, after = chat.talk({"say": "text", "cut": BEFORE}, chat.opening, {"say": "again"})
    assert cut["finish"] == {"isAbort": False, "isDisconnect": True, "isError": True}
    assert_succeeded(resumed)
    assert shown(resumed) == [("user", "text"), ("assistant", WHOLE)]
    assert_succeeded(after)
    told = [("user", "text"), ("assistant", WHOLE), ("user", "again")]
    assert sent(chat.upstream) == [told[:1], told]


def test_two_pages_read_the_same_answer(chat: Talk, gate: Gate) -> None:
    chat.left()
    opening, waiting = chat.opening, {"resume": True}
    assert [shown(turn) for turn in chat.at_once(opening, waiting)] == [[("user", "text"), ("assistant", WHOLE)]] * 2
    assert len(chat.upstream.requests) == 1


def test_an_answer_that_fails_later_is_an_error_to_who_resumed_it(chat: Talk, gate: Gate) -> None:
    chat.left("cut")
    (resumed,) = chat.talk(chat.opening, messages=[USER])
    assert_failed(resumed)
    assert resumed["error"]["message"] == "The answer was cut off."
    assert shown(resumed) == [("user", "text"), ("assistant", BEFORE)]


def test_an_answer_that_has_ended_is_not_told_again(chat: Talk, gate: Gate) -> None:
    """`useChat({resume: true})` asks at every load: a page that keeps answers under ids of its own would have two."""
    gate.open()
    (asked,) = chat.talk({"say": "text"})
    wait_for(lambda: not chat.finds(), what="the end of the answer")
    kept = [asked["messages"][0], asked["messages"][1] | {"id": "own-2"}]
    (resumed,) = chat.talk({"resume": True}, messages=kept)
    assert (resumed["messages"], resumed["error"]) == (kept, None)


@newer
def test_a_chat_that_finds_nothing_to_resume_goes_on(chat: Talk, gate: Gate) -> None:
    gate.open()
    resumed, after = chat.talk({"resume": True}, {"say": "text"})
    assert (resumed["status"], resumed["statuses"], resumed["error"]) == ("ready", [], None)
    assert_succeeded(after)
    assert shown(after) == [("user", "text"), ("assistant", WHOLE)]


def test_only_a_running_answer_of_the_chats_own_user_is_found(chat: Talk, gate: Gate) -> None:
    assert not chat.finds(chatId="another")
    chat.left()
    assert chat.finds()
    assert not chat.finds(headers=BOB)
    assert not chat.finds(chatId="another")
    gate.open()
    wait_for(lambda: not chat.finds(), what="the end of the answer")


def test_without_users_no_chat_is_anybodys(
    node: Node, keepers: dict[str, Server], upstream: FakeUpstream, gate: Gate
) -> None:
    chat = Talk(node, keepers["public"], upstream, "ai7")
    id = chat.left()["messages"][-1]["id"]
    assert chat.status_of(id) == "in_progress"
    assert not chat.finds()


def test_the_message_names_the_answer_that_cancel_ends(chat: Talk, gate: Gate) -> None:
    """`stop()` only leaves an answer that goes on without its caller: a page's stop button says so as well."""
    (stopped,) = chat.talk({"say": "text", "stop": BEFORE})
    id = stopped["messages"][-1]["id"]
    assert (stopped["status"], chat.status_of(id)) == ("ready", "in_progress")
    chat.cancel(id)
    assert chat.status_of(id) == "cancelled"
    chat.upstream.requests[0].wait_left(1)
    assert not chat.finds()
