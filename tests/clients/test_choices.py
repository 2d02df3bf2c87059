"""OpenAI's own clients ask for several answers and for the probabilities of tokens: streamed, gathered, whole.

They get every choice with its own, and an exception where one of them was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import requests

from tests.clients.choices import CUT, HELLO, REASONS, TEXTS, WORLD, tokens
from tests.clients.node import Node
from tests.clients.test_openai_clients import ask_of, client
from tests.clients.upstream import FAULTS
from tests.fake_upstream import FakeUpstream
from tests.live.servers import Server, wait_for

USAGE = {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}


@dataclass
class Seen:
    """What the client's user has in the end, by the index of the choice."""

    texts: dict[int, str] = field(default_factory=dict)
    roles: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[Any]] = field(default_factory=dict)
    usage: list[dict[str, int]] = field(default_factory=list)
    error: str | None = None  # the class of the exception
    status: int | None = None
    code: str | None = None

    def add(self, choice: dict[str, Any], said: dict[str, Any]) -> None:
        index = choice["index"]
        self.texts[index] = self.texts.get(index, "") + (said.get("content") or "")
        if said.get("role"):
            self.roles.append(index)
        if choice.get("logprobs"):
            self.tokens.setdefault(index, []).extend(choice["logprobs"]["content"])
        if choice["finish_reason"]:
            assert index not in self.reasons
            self.reasons[index] = choice["finish_reason"]

    def add_chunks(self, chunks: list[dict[str, Any]]) -> None:
        for chunk in chunks:
            if chunk.get("usage"):
                self.usage.append({name: chunk["usage"][name] for name in USAGE})
            for choice in chunk["choices"]:
                self.add(choice, choice["delta"])

    def add_completion(self, completion: dict[str, Any]) -> None:
        assert [choice["index"] for choice in completion["choices"]] == list(range(len(completion["choices"])))
        for choice in completion["choices"]:
            self.add(choice, choice["message"])
        if completion.get("usage"):
            self.usage.append({name: completion["usage"][name] for name in USAGE})

    def fail(self, error: openai.OpenAIError) -> None:
        self.error, self.code = type(error).__name__, getattr(error, "code", None)
        self.status = error.status_code if isinstance(error, openai.APIStatusError) else None


def from_python(read: Callable[[Seen, openai.OpenAI, dict[str, Any]], None]) -> Callable[..., Seen]:
    def ask(node: Node, server: Server, asked: dict[str, Any]) -> Seen:
        seen = Seen()
        with client(server) as sdk:
            try:
                read(seen, sdk, asked)
            except openai.OpenAIError as error:
                seen.fail(error)
        return seen

    return ask


def _streamed(seen: Seen, sdk: openai.OpenAI, asked: dict[str, Any]) -> None:
    with sdk.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            seen.add_chunks([chunk.model_dump()])


def _whole(seen: Seen, sdk: openai.OpenAI, asked: dict[str, Any]) -> None:
    seen.add_completion(sdk.chat.completions.create(**asked).model_dump())


def _gathered(seen: Seen, sdk: openai.OpenAI, asked: dict[str, Any]) -> None:
    with sdk.chat.completions.stream(**asked) as stream:
        seen.add_completion(stream.get_final_completion().model_dump())


def from_node(job: str) -> Callable[..., Seen]:
    def ask(node: Node, server: Server, asked: dict[str, Any]) -> Seen:
        seen = Seen()
        told = node.run(job, url=f"{server.url}/api/v1", ask=asked)
        seen.add_chunks(told.get("chunks", []))
        if told.get("completion"):
            seen.add_completion(told["completion"])
        if told["error"]:
            seen.error, seen.status, seen.code = (
                told["error"]["kinds"][0],
                told["error"]["status"],
                told["error"]["code"],
            )
        return seen

    return ask


STREAMED = {"python streamed": from_python(_streamed), "node streamed": from_node("openaiStreamed")}
GATHERED = {"python gathered": from_python(_gathered), "node gathered": from_node("openaiGathered")}
WHOLE = {"python whole": from_python(_whole), "node whole": from_node("openaiWhole")}
CLIENTS = STREAMED | GATHERED | WHOLE

each_client = pytest.mark.parametrize("name", CLIENTS)


@pytest.fixture
def server(servers: dict[str, Server], upstream: FakeUpstream) -> Server:
    return servers["choices"]


# --- several answers --------------------------------------------------------------------------------------


# Python's `stream` makes an exception of the reason "length"; its user gets no completion.
@pytest.mark.parametrize("name", [name for name in CLIENTS if name != "python gathered"])
def test_each_answer_is_whole_with_its_own_finish_reason(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("two answers", n=2))
    assert (seen.texts, seen.reasons, seen.error) == (TEXTS, REASONS, None)
    assert seen.roles == [0, 1]


def test_a_python_client_that_gathers_sees_the_limit_of_the_second_answer(node: Node, server: Server) -> None:
    seen = CLIENTS["python gathered"](node, server, ask_of("two answers", n=2))
    assert seen.error == "LengthFinishReasonError"


def test_the_model_is_asked_once_for_all_answers(node: Node, server: Server, upstream: FakeUpstream) -> None:
    CLIENTS["python whole"](
        node, server, ask_of("two probable answers", n=2, logprobs=True, top_logprobs=2, max_tokens=5)
    )
    (request,) = upstream.requests
    asked = {name: request.body[name] for name in ("n", "logprobs", "top_logprobs", "max_tokens")}
    assert asked == {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 5}


@pytest.mark.parametrize("name", [*STREAMED, *WHOLE])
def test_usage_is_that_of_all_answers_and_told_once(node: Node, server: Server, name: str) -> None:
    more = {} if name in WHOLE else {"stream_options": {"include_usage": True}}
    assert CLIENTS[name](node, server, ask_of("two answers", n=2, **more)).usage == [USAGE]


@pytest.mark.parametrize("name", WHOLE)
def test_what_the_upstream_does_not_count_is_estimated_of_all_answers(node: Node, server: Server, name: str) -> None:
    (usage,) = CLIENTS[name](node, server, ask_of("two answers that nobody counted", n=2)).usage
    said = sum(len(text) for text in TEXTS.values())
    assert usage["completion_tokens"] == -(-said // 4)


def test_answers_leave_one_record(node: Node, server: Server) -> None:
    path = f"{server.url}/api/v1/chat/completions"
    response = requests.post(path, json=ask_of("two answers", n=2, stream=True), timeout=10)
    assert response.text.endswith("data: [DONE]\n\n")
    id = response.headers["X-Response-Id"]

    def found() -> list[dict[str, str]]:
        return [record for record in server.records() if record["id"] == id]

    wait_for(lambda: bool(found()), what="the record")  # it is written when the caller has all
    (record,) = found()
    assert (record["outcome"], record["output_tokens"]) == ("completed", "10")


@each_client
@pytest.mark.parametrize("row", CUT)
def test_an_answer_of_which_one_choice_was_cut_is_an_exception(node: Node, server: Server, name: str, row: str) -> None:
    _, code, status = CUT[row]
    seen = CLIENTS[name](node, server, ask_of(row, n=2))
    assert seen.error is not None and seen.code == code
    assert set(seen.reasons) <= {0}  # the second one never ended
    if name in WHOLE:
        assert (seen.texts, seen.status) == ({}, status)
    else:
        assert (seen.error, seen.status) == ("APIError", None)


@each_client
@pytest.mark.parametrize("fault", FAULTS)
def test_who_asked_for_two_answers_sees_every_other_fault_too(
    node: Node, server: Server, name: str, fault: str
) -> None:
    seen = CLIENTS[name](node, server, ask_of(fault, n=2))
    assert seen.error is not None and seen.code == FAULTS[fault].code
    assert seen.reasons == {}


# --- probabilities ----------------------------------------------------------------------------------------


@each_client
def test_probabilities_reach_the_clients_user(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("probabilities", logprobs=True, top_logprobs=2))
    assert (seen.texts, seen.reasons, seen.error) == ({0: "Hello, world"}, {0: "stop"}, None)
    assert seen.tokens == {0: [HELLO, WORLD]}


@each_client
def test_probabilities_of_two_answers_stay_apart(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("two probable answers", n=2, logprobs=True))
    assert seen.texts == {0: "Hello", 1: ", world"}
    assert seen.tokens == {0: [HELLO], 1: [WORLD]}


def test_a_piece_and_its_probabilities_stand_in_one_chunk(server: Server) -> None:
    with client(server) as sdk:
        ask = ask_of("probabilities", logprobs=True)
        chunks = [chunk.model_dump() for chunk in sdk.chat.completions.create(**ask, stream=True)]
    told = [(choice["delta"]["content"], choice["logprobs"]) for chunk in chunks for choice in chunk["choices"]]
    assert told == [("", None), ("Hello", tokens(HELLO)), (", world", tokens(WORLD)), (None, None)]


@each_client
def test_who_did_not_ask_for_probabilities_gets_none(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("probabilities"))
    assert (seen.texts, seen.tokens) == ({0: "Hello, world"}, {})


# --- what is refused --------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "n": {"n": 2},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "more answers than one may ask for": ("choices", {"n": 9}),
    "more alternatives than there are": ("choices", {"logprobs": True, "top_logprobs": 21}),
    "alternatives without probabilities": ("choices", {"top_logprobs": 2}),
    **{f"{name} where no setting names it": ("chat", ask) for name, ask in ASKED.items()},
    **{f"{name} of the Responses API": ("responses", ask) for name, ask in ASKED.items()},
}


@pytest.mark.parametrize("name", [*STREAMED, *WHOLE])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_had_is_a_bad_request(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str, what: str
) -> None:
    where, more = REFUSED[what]
    seen = CLIENTS[name](node, servers[where], ask_of("text", **more))
    assert (seen.error, seen.status, seen.code) == ("BadRequestError", 400, "invalid_request")
    assert upstream.requests == []


@pytest.mark.parametrize("path", ["get-response", "chat"])
@pytest.mark.parametrize("field", ASKED)
def test_our_own_paths_never_take_them(server: Server, upstream: FakeUpstream, path: str, field: str) -> None:
    parts = {"role": "user", "parts": [{"type": "text", "text": "hi"}]}
    asked: dict[str, Any] = {"messages": [parts]} if path == "chat" else {"message": "hi"}
    response = requests.post(f"{server.url}/api/{path}", json=asked | ASKED[field], timeout=10)
    assert (response.status_code, response.json()["code"]) == (400, "invalid_request")
    assert upstream.requests == []
