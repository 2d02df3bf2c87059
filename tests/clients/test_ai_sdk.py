"""useChat's state machine and both its transports, by three generations of the AI SDK: what the chat's user sees.

A cut answer is never a finished one to them, and they read no word of the upstream's.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from tests.clients.corpus import expected
from tests.clients.node import Node
from tests.clients.upstream import FAULTS, WORDS, Fault, messages_of
from tests.fake_upstream import FakeUpstream
from tests.live.servers import Server

VERSIONS = ("ai5", "ai6", "ai7")
WHOLE = expected("text", "text.txt").decode()
PIECES = ("Hello", ", w\u00f6rld \U0001f30a")

each_version = pytest.mark.parametrize("version", VERSIONS)
each_transport = pytest.mark.parametrize("transport", ["ui", "text"])
each_fault = pytest.mark.parametrize("name", FAULTS)


# What an assistant's turn may hold besides its text, in one version or another.
OTHER_PARTS: list[dict[str, Any]] = [
    {"type": "step-start"},
    {"type": "reasoning", "text": "Hm.", "state": "done", "providerMetadata": {"openai": {"itemId": "rs_1"}}},
    {"type": "tool-get_weather", "toolCallId": "c1", "state": "output-available", "input": {}, "output": {"sun": True}},
    {"type": "dynamic-tool", "toolName": "look", "toolCallId": "c2", "state": "output-error", "errorText": "No."},
    {"type": "source-url", "sourceId": "s1", "url": "https://example.com", "title": "Example"},
    {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,AA=="},
    {"type": "data-weather", "id": "d1", "data": {"text": "sunny", "list": [1]}},
]


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "state": "done"}


def talk(node: Node, server: Server, version: str, *turns: str | dict[str, Any], **options: Any) -> list[Any]:
    """A conversation; a text is a message that the user sends. The option `messages`: those of before."""
    said = [{"say": turn} if isinstance(turn, str) else turn for turn in turns]
    return list(node.run("talk", version=version, url=f"{server.url}/api/chat", turns=said, **options))


def text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def shown(turn: dict[str, Any]) -> list[tuple[str, str]]:
    """The conversation as the page would show it."""
    return [(message["role"], text_of(message)) for message in turn["messages"]]


def sent(upstream: FakeUpstream) -> list[list[tuple[str, str]]]:
    """What the model was told, answer by answer."""
    return [
        [(message["role"], message["content"]) for message in messages_of(request)] for request in upstream.requests
    ]


def assert_succeeded(turn: dict[str, Any]) -> None:
    assert (turn["status"], turn["error"]) == ("ready", None)
    assert turn["statuses"][-1] == "ready" and "error" not in turn["statuses"]
    assert not any((turn["finish"] or {}).values())


def assert_failed(turn: dict[str, Any]) -> None:
    assert turn["status"] == "error" and turn["error"] is not None
    assert "ready" not in turn["statuses"]
    assert not [word for word in WORDS if word in json.dumps(turn, ensure_ascii=False)]


# --- a whole answer ---------------------------------------------------------------------------------------


@each_version
def test_a_question_is_answered_piece_by_piece_and_the_chat_is_ready_again(
    node: Node, server: Server, version: str
) -> None:
    (turn,) = talk(node, server, version, "text")
    assert_succeeded(turn)
    assert turn["statuses"] == ["submitted", "streaming", "ready"]
    assert shown(turn) == [("user", "text"), ("assistant", WHOLE)]
    answer = turn["messages"][-1]
    assert answer["id"].startswith("resp_")
    (part,) = [part for part in answer["parts"] if part["type"] == "text"]
    assert part["state"] == "done"
    usage = {"input_tokens": 19, "output_tokens": 10, "total_tokens": 29, "estimated": False}
    assert answer["metadata"] == {"finishReason": "stop", "usage": usage}


@each_version
def test_the_text_transport_shows_the_same_text(node: Node, server: Server, version: str) -> None:
    (turn,) = talk(node, server, version, "text", transport="text")
    assert_succeeded(turn)
    assert shown(turn) == [("user", "text"), ("assistant", WHOLE)]


@each_version
def test_reasoning_and_text_are_parts_of_their_own(node: Node, server: Server, version: str) -> None:
    (turn,) = talk(node, server, version, "reasoning")
    assert_succeeded(turn)
    reasoning, text = [part for part in turn["messages"][-1]["parts"] if part["type"] != "step-start"]
    assert (reasoning["type"], reasoning["text"], reasoning["state"]) == ("reasoning", "Two and two...", "done")
    assert (text["type"], text["text"], text["state"]) == ("text", "Four.", "done")


@each_version
def test_a_refusal_is_text(node: Node, server: Server, version: str) -> None:
    (turn,) = talk(node, server, version, "refusal")
    assert_succeeded(turn)
    assert shown(turn)[-1] == ("assistant", "I'm sorry, no.")


@each_version
def test_tool_calls_arrive_with_their_whole_input(node: Node, server: Server, version: str) -> None:
    (turn,) = talk(node, server, version, "tools")
    assert_succeeded(turn)
    calls = [part for part in turn["messages"][-1]["parts"] if part["type"].startswith("tool-")]
    told = [(call["type"], call["toolCallId"], call["state"], call["input"]) for call in calls]
    assert told == [
        ("tool-get_weather", "call_fJ1", "input-available", {"city": "K\u00f6ln"}),
        ("tool-get_time", "call_fJ2", "input-available", {}),
    ]


@each_version
def test_a_tool_call_whose_input_is_no_json_breaks_no_chat(node: Node, server: Server, version: str) -> None:
    (turn,) = talk(node, server, version, "broken arguments")
    assert_succeeded(turn)
    assert shown(turn)[-1] == ("assistant", "Let me look.")
    call = turn["messages"][-1]["parts"][-1]
    assert (call["type"], call["state"], call["errorText"]) == (
        "tool-get_weather",
        "output-error",
        "The input is not JSON.",
    )


@each_version
@pytest.mark.parametrize("name", ["length", "content_filter"])
def test_an_answer_that_met_a_limit_says_so_in_its_metadata(
    node: Node, server: Server, version: str, name: str
) -> None:
    (turn,) = talk(node, server, version, name)
    assert_succeeded(turn)
    assert turn["messages"][-1]["metadata"]["finishReason"] == name


def test_a_long_silence_disturbs_no_chat(node: Node, servers: dict[str, Server], upstream: FakeUpstream) -> None:
    url = f"{servers['hasty'].url}/api/chat"
    turns = [{"say": "slow"}]
    rows = [(version, transport) for version in VERSIONS for transport in ("ui", "text")]
    jobs = [
        {"job": "talk", "version": version, "transport": transport, "url": url, "turns": turns}
        for version, transport in rows
    ]
    for seen in node.run_all(jobs):
        assert_succeeded(seen[0])
        assert shown(seen[0])[-1] == ("assistant", WHOLE)


def test_heartbeats_are_comments(servers: dict[str, Server], upstream: FakeUpstream) -> None:
    parts = [{"type": "text", "text": "slow"}]
    body = {"id": "chat-1", "messages": [{"id": "1", "role": "user", "parts": parts}], "trigger": "submit-message"}
    response = requests.post(f"{servers['hasty'].url}/api/chat", json=body, timeout=10)
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = set(response.text.split("\n")) - {""}
    assert {line for line in lines if not line.startswith("data: ")} == {": keep-alive"}


@each_version
def test_the_transport_alone_reads_the_chunks_of_the_corpus(node: Node, server: Server, version: str) -> None:
    seen = node.run("read", version=version, url=f"{server.url}/api/chat", say="text")
    assert (seen["broken"], seen["errors"]) == (None, [])
    lines = [line[6:] for line in expected("text", "ui.sse").decode().split("\n") if line.startswith("data: {")]
    wanted = [json.loads(line) for line in lines]
    wanted[0]["messageId"] = seen["chunks"][0]["messageId"]  # made anew for each answer
    assert seen["chunks"] == wanted
    assert text_of(seen["message"]) == WHOLE


# --- conversations of three turns -------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize(
    ("first", "answer"),
    [("reasoning", "Four."), ("tools", ""), ("text_then_tool", "Let me look."), ("refusal", "I'm sorry, no.")],
)
def test_a_conversation_goes_on_after(
    node: Node, server: Server, upstream: FakeUpstream, version: str, first: str, answer: str
) -> None:
    turns = talk(node, server, version, first, "text", "length")
    for turn in turns:
        assert_succeeded(turn)
    assert shown(turns[-1])[-2:] == [("user", "length"), ("assistant", "Once upon a")]
    told = [("user", first), *([("assistant", answer)] if answer else []), ("user", "text")]
    assert sent(upstream) == [
        [("user", first)],
        told,
        [*told, ("assistant", WHOLE), ("user", "length")],
    ]


@each_version
@each_transport
@pytest.mark.parametrize("first", ["cut", "reset", "error", "500"])
def test_a_conversation_goes_on_after_a_failed_answer(
    node: Node, server: Server, upstream: FakeUpstream, version: str, first: str, transport: str
) -> None:
    failed, *others = talk(node, server, version, first, "text", "length", transport=transport)
    assert_failed(failed)
    for turn in others:
        assert_succeeded(turn)
    kept = shown(failed)[1:]
    assert kept == ([] if FAULTS[first].early else [("assistant", FAULTS[first].text)])
    told = [("user", first), *kept, ("user", "text")]
    assert sent(upstream)[1:] == [told, [*told, ("assistant", WHOLE), ("user", "length")]]


@each_version
@each_transport
def test_stop_ends_the_upstreams_answer_and_the_conversation_goes_on(
    node: Node, server: Server, upstream: FakeUpstream, version: str, transport: str
) -> None:
    stopping = {"say": "endless", "stop": PIECES[1]}
    stopped, *others = talk(node, server, version, stopping, "text", "length", transport=transport)
    assert (stopped["status"], stopped["error"]) == ("ready", None)
    assert shown(stopped) == [("user", "endless"), ("assistant", "".join(PIECES))]
    upstream.requests[0].wait_left(1)
    for turn in others:
        assert_succeeded(turn)
    told = [("user", "endless"), ("assistant", "".join(PIECES)), ("user", "text")]
    assert sent(upstream)[1:] == [told, [*told, ("assistant", WHOLE), ("user", "length")]]


@each_version
def test_stop_before_the_first_piece_ends_the_upstreams_answer_too(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, version: str
) -> None:
    stopped, goes_on = talk(node, servers["hasty"], version, {"say": "silent", "stop": ""}, "text")
    assert (stopped["status"], stopped["error"]) == ("ready", None)
    upstream.requests[0].wait_left(1)
    assert_succeeded(goes_on)
    assert sent(upstream)[1] == [("user", "silent"), ("user", "text")]


@each_version
def test_parts_that_are_no_text_stay_out_of_what_the_model_is_told(
    node: Node, server: Server, upstream: FakeUpstream, version: str
) -> None:
    user = {"id": "1", "role": "user", "parts": [{"type": "data-draft", "data": {"text": "no"}}, text_part("Hi")]}
    answer = {"id": "2", "role": "assistant", "metadata": {"a": 1}, "parts": [*OTHER_PARTS, text_part("Hello.")]}
    (turn,) = talk(node, server, version, "text", messages=[user, answer])
    assert_succeeded(turn)
    assert sent(upstream) == [[("user", "Hi"), ("assistant", "Hello."), ("user", "text")]]


@each_version
def test_a_file_of_the_users_is_refused_and_not_dropped_in_silence(
    node: Node, server: Server, upstream: FakeUpstream, version: str
) -> None:
    file = {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,AA=="}
    (turn,) = talk(node, server, version, {"parts": [text_part("text"), file]})
    assert_failed(turn)
    problem = json.loads(turn["error"]["message"])
    assert (problem["status"], problem["code"]) == (400, "invalid_request")
    assert "messages.0.parts" in problem["detail"]
    assert upstream.requests == []


@each_version
@each_transport
def test_regenerate_asks_again_without_the_last_answer(
    node: Node, server: Server, upstream: FakeUpstream, version: str, transport: str
) -> None:
    turns = talk(node, server, version, "length", "text", {"regenerate": True}, transport=transport)
    for turn in turns:
        assert_succeeded(turn)
    assert shown(turns[2]) == shown(turns[1])
    before, again = (turn["messages"][-1]["id"] for turn in turns[1:])
    assert before != again
    told = [("user", "length"), ("assistant", "Once upon a"), ("user", "text")]
    assert sent(upstream) == [told[:1], told, told]


@each_version
def test_regenerate_after_a_cut_answer_replaces_what_was_left_of_it(
    node: Node, server: Server, upstream: FakeUpstream, version: str
) -> None:
    first, failed, again = talk(node, server, version, "text", "cut", {"regenerate": True})
    assert_succeeded(first)
    assert_failed(failed)
    assert_failed(again)
    assert shown(again) == shown(failed)
    assert sent(upstream)[1] == sent(upstream)[2] == [("user", "text"), ("assistant", WHOLE), ("user", "cut")]


# --- what goes wrong --------------------------------------------------------------------------------------


@each_version
@each_fault
def test_a_failure_is_an_error_to_the_chats_user(node: Node, server: Server, version: str, name: str) -> None:
    fault = FAULTS[name]
    (turn,) = talk(node, server, version, name)
    assert_failed(turn)
    if fault.early:
        assert_told_early(turn, fault, version)
        return
    assert turn["error"]["message"] == fault.message
    assert "streaming" in turn["statuses"]
    answer = turn["messages"][-1]
    assert (answer["role"], text_of(answer)) == ("assistant", fault.text)
    assert not answer.get("metadata")
    assert {part["state"] for part in answer["parts"] if part["type"] in ("text", "reasoning")} <= {"done"}


@each_version
@each_fault
def test_a_failure_is_an_error_to_the_text_transport_too(node: Node, server: Server, version: str, name: str) -> None:
    fault = FAULTS[name]
    (turn,) = talk(node, server, version, name, transport="text")
    assert_failed(turn)
    if fault.early or not fault.text:  # nothing that is text was written
        assert_told_early(turn, fault, version)
        return
    assert shown(turn)[-1] == ("assistant", fault.text)


def assert_told_early(turn: dict[str, Any], fault: Fault, version: str) -> None:
    """The SDK shows the body as it came: nothing of an answer, and a problem document that names the code."""
    assert [message["role"] for message in turn["messages"]] == ["user"]
    assert "streaming" not in turn["statuses"]
    problem = json.loads(turn["error"]["message"])
    assert (problem["code"], problem["status"]) == (fault.code, fault.status)
    assert turn["error"]["status"] == (fault.status if version == "ai7" else None)  # older ones do not tell it


@each_version
def test_a_caller_without_a_token_is_told_so(node: Node, servers: dict[str, Server], version: str) -> None:
    (turn,) = talk(node, servers["tokens"], version, "text")
    assert_failed(turn)
    assert json.loads(turn["error"]["message"])["code"] == "unauthorized"


@each_version
def test_a_body_of_the_page_may_hold_what_the_settings_allow(
    node: Node, server: Server, upstream: FakeUpstream, version: str
) -> None:
    body = {"temperature": 0.5, "context": {"conversation": 7}}
    (turn,) = talk(node, server, version, "text", body=body)
    assert_succeeded(turn)
    assert upstream.requests[0].body["temperature"] == 0.5
    (turn,) = talk(node, server, version, "text", body={"top_p": 0.5})
    assert_failed(turn)
    assert len(upstream.requests) == 1


# --- resuming ---------------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("chat_id", ["chat-1", "a b/c"])
def test_there_is_no_stream_to_resume(
    node: Node, server: Server, upstream: FakeUpstream, version: str, chat_id: str
) -> None:
    seen = node.run("reconnect", version=version, url=f"{server.url}/api/chat", chatId=chat_id)
    assert seen["stream"] is None
    assert upstream.requests == []


# 5.0.0 forgets to be ready again, whatever the server says.
@pytest.mark.parametrize("version", ["ai6", "ai7"])
def test_a_chat_that_tries_to_resume_stays_ready(node: Node, server: Server, version: str) -> None:
    asked, resumed = talk(node, server, version, "text", {"resume": True})
    assert_succeeded(asked)
    assert (resumed["status"], resumed["error"]) == ("ready", None)
    assert resumed["messages"] == asked["messages"]
