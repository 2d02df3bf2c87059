"""OpenAI's own clients, of Python and of Node, against /v1: streamed, gathered, whole, and as typed exceptions.

They see true statuses, an exception where an answer was cut, and no word of the upstream's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import requests

from tests.clients.conftest import MODEL, TOKEN
from tests.clients.corpus import expected
from tests.clients.node import Node
from tests.clients.upstream import FAULTS, WORDS, Fault, messages_of
from tests.fake_upstream import FakeUpstream
from tests.live.servers import Server, wait_for

WHOLE = expected("text", "text.txt").decode()
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
USAGE = {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}


@dataclass
class Seen:
    """What the client's user has in the end. `kinds`: the classes of the exception, its own first."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tools: dict[int, list[str]] = field(default_factory=dict)  # index -> id, name, arguments
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    usage_chunks: int = 0
    kinds: list[str] = field(default_factory=list)
    status: int | None = None
    code: str | None = None
    message: str = ""

    def add(self, chunk: dict[str, Any]) -> None:
        if chunk.get("usage"):
            self.usage = {name: chunk["usage"][name] for name in USAGE}
            self.usage_chunks += 1
            assert chunk["choices"] == []
        for choice in chunk["choices"]:
            self.add_message(choice["delta"])
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    def add_message(self, message: dict[str, Any]) -> None:
        self.text += message.get("content") or ""
        self.reasoning += message.get("reasoning_content") or ""
        self.refusal += message.get("refusal") or ""
        for place, call in enumerate(message.get("tool_calls") or ()):
            known = self.tools.setdefault(call.get("index", place), ["", "", ""])
            known[0] = call.get("id") or known[0]
            known[1] = call["function"].get("name") or known[1]
            known[2] += call["function"].get("arguments") or ""

    def add_completion(self, completion: dict[str, Any]) -> None:
        (choice,) = completion["choices"]
        self.add_message(choice["message"])
        self.finish_reason = choice["finish_reason"]
        usage = completion.get("usage")
        self.usage = usage and {name: usage[name] for name in USAGE}


def ask_of(message: str | list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": message}] if isinstance(message, str) else message
    return {"model": MODEL, "messages": messages, **more}


# --- the clients ------------------------------------------------------------------------------------------


def client(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/api/v1", api_key=key, max_retries=0, timeout=20)


def caught(seen: Seen, error: openai.OpenAIError) -> Seen:
    seen.kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("openai")]
    seen.status = error.status_code if isinstance(error, openai.APIStatusError) else None
    seen.code, seen.message = getattr(error, "code", None), f"{error} {getattr(error, 'body', '')}"
    return seen


def python_streamed(node: Node, server: Server, ask: dict[str, Any], key: str = "none") -> Seen:
    seen = Seen()
    with client(server, key) as sdk:
        try:
            with sdk.chat.completions.create(**ask, stream=True) as stream:
                for chunk in stream:
                    seen.add(chunk.model_dump())
        except openai.OpenAIError as error:
            return caught(seen, error)
    return seen


def python_whole(node: Node, server: Server, ask: dict[str, Any], key: str = "none") -> Seen:
    seen = Seen()
    with client(server, key) as sdk:
        try:
            seen.add_completion(sdk.chat.completions.create(**ask).model_dump())
        except openai.OpenAIError as error:
            return caught(seen, error)
    return seen


def python_gathered(node: Node, server: Server, ask: dict[str, Any], key: str = "none") -> Seen:
    """`chat.completions.stream`: it holds the answer together by itself."""
    seen, deltas = Seen(), ""
    with client(server, key) as sdk:
        try:
            with sdk.chat.completions.stream(**ask) as stream:
                for event in stream:
                    deltas += event.delta if event.type == "content.delta" else ""
                seen.add_completion(stream.get_final_completion().model_dump())
                assert seen.text == deltas
        except openai.OpenAIError as error:
            seen.text = deltas
            return caught(seen, error)
    return seen


def from_node(seen: Seen, error: dict[str, Any] | None) -> Seen:
    if error is not None:
        seen.kinds, seen.status, seen.code = error["kinds"], error["status"], error["code"]
        seen.message = json.dumps(error, ensure_ascii=False)
    return seen


def node_streamed(node: Node, server: Server, ask: dict[str, Any], key: str = "none") -> Seen:
    seen = Seen()
    told = node.run("openaiStreamed", url=f"{server.url}/api/v1", key=key, ask=ask)
    for chunk in told["chunks"]:
        seen.add(chunk)
    return from_node(seen, told["error"])


def node_whole(node: Node, server: Server, ask: dict[str, Any], key: str = "none") -> Seen:
    seen = Seen()
    told = node.run("openaiWhole", url=f"{server.url}/api/v1", key=key, ask=ask)
    if told["completion"]:
        seen.add_completion(told["completion"])
    return from_node(seen, told["error"])


def node_gathered(node: Node, server: Server, ask: dict[str, Any], key: str = "none") -> Seen:
    seen = Seen()
    told = node.run("openaiGathered", url=f"{server.url}/api/v1", key=key, ask=ask)
    if told["completion"]:
        seen.add_completion(told["completion"])
        assert seen.text == "".join(told["deltas"])
    else:
        seen.text = "".join(told["deltas"])
    return from_node(seen, told["error"])


Client = Callable[..., Seen]
STREAMING: dict[str, Client] = {
    "python streamed": python_streamed,
    "python gathered": python_gathered,
    "node streamed": node_streamed,
    "node gathered": node_gathered,
}
WHOLES: dict[str, Client] = {"python whole": python_whole, "node whole": node_whole}
CLIENTS = STREAMING | WHOLES

each_client = pytest.mark.parametrize("name", CLIENTS)
each_streaming = pytest.mark.parametrize("name", STREAMING)
each_whole = pytest.mark.parametrize("name", WHOLES)
each_fault = pytest.mark.parametrize("fault_name", FAULTS)


def assert_failed(seen: Seen) -> None:
    assert seen.kinds, "no exception"
    assert seen.finish_reason is None
    assert not [word for word in WORDS if word in seen.message]


# --- a whole answer ---------------------------------------------------------------------------------------


@each_client
def test_an_answer_is_whole_with_its_finish_reason(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("text"))
    assert (seen.text, seen.finish_reason, seen.kinds) == (WHOLE, "stop", [])


# What Python's `chat.completions.stream` makes of a limit by itself; the others leave it to their user.
RAISED = {"length": "LengthFinishReasonError", "content_filter": "ContentFilterFinishReasonError"}


@each_client
@pytest.mark.parametrize("reason", RAISED)
def test_an_answer_that_met_a_limit_says_so(node: Node, server: Server, name: str, reason: str) -> None:
    seen = CLIENTS[name](node, server, ask_of(reason))
    assert seen.text == expected(reason, "text.txt").decode()
    if name == "python gathered":
        assert seen.kinds[0] == RAISED[reason]
    else:
        assert (seen.finish_reason, seen.kinds) == (reason, [])


@each_client
def test_a_refusal_is_no_content(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("refusal"))
    assert (seen.refusal, seen.text, seen.finish_reason) == ("I'm sorry, no.", "", "stop")


@pytest.mark.parametrize("name", ["python streamed", "node streamed", *WHOLES])
def test_reasoning_is_told_where_others_tell_it(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("reasoning"))
    assert (seen.reasoning, seen.text) == ("Two and two...", "Four.")


@each_client
def test_tool_calls_are_whole(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("tools", tools=[TOOL]))
    assert list(seen.tools.values()) == [
        ["call_fJ1", "get_weather", '{"city":"K\u00f6ln"}'],
        ["call_fJ2", "get_time", "{}"],
    ]
    assert seen.finish_reason == "tool_calls"


@pytest.mark.parametrize("name", ["python streamed", "node streamed"])
def test_usage_comes_in_a_chunk_of_its_own_if_it_is_asked_for(node: Node, server: Server, name: str) -> None:
    seen = CLIENTS[name](node, server, ask_of("text", stream_options={"include_usage": True}))
    assert (seen.usage, seen.usage_chunks) == (USAGE, 1)
    assert CLIENTS[name](node, server, ask_of("text")).usage is None


@each_whole
def test_a_whole_answer_has_its_usage(node: Node, server: Server, name: str) -> None:
    assert CLIENTS[name](node, server, ask_of("text")).usage == USAGE


@each_streaming
def test_a_long_silence_disturbs_no_client(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str
) -> None:
    seen = STREAMING[name](node, servers["hasty"], ask_of("slow"))
    assert (seen.text, seen.finish_reason) == (WHOLE, "stop")


# --- conversations ----------------------------------------------------------------------------------------


@each_client
def test_a_conversation_with_a_tool_has_three_turns(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str
) -> None:
    call = {"id": "call_fJ1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "text_then_tool"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_fJ1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}]},
    ]
    seen = CLIENTS[name](node, servers["chat"], ask_of(messages, tools=[TOOL], seed=7, temperature=0.5))
    assert seen.text == WHOLE
    (request,) = upstream.requests
    assert messages_of(request) == messages
    assert (request.body["tools"], request.body["seed"], request.body["temperature"]) == ([TOOL], 7, 0.5)


def test_the_same_conversation_reaches_a_responses_upstream(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream
) -> None:
    call = {"id": "call_fJ1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "text_then_tool"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_fJ1", "content": "sunny"},
        {"role": "user", "content": [{"type": "text", "text": "text"}]},
    ]
    seen = python_streamed(node, servers["responses"], ask_of(messages, tools=[TOOL]))
    assert seen.text == WHOLE
    (request,) = upstream.requests
    assert request.path == "/v1/responses"
    assert messages_of(request) == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "text_then_tool"},
        {"role": "assistant", "content": "Let me look."},
        {"type": "function_call", "call_id": "call_fJ1", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_fJ1", "output": "sunny"},
        {"role": "user", "content": "text"},
    ]
    assert request.body["tools"] == [{"type": "function", **TOOL["function"]}]
    assert (request.body["stream"], request.body["store"]) == (True, False)


def test_a_python_client_that_leaves_ends_the_upstreams_answer(server: Server, upstream: FakeUpstream) -> None:
    with client(server) as sdk, sdk.chat.completions.create(**ask_of("endless"), stream=True) as stream:
        assert any(chunk.choices[0].delta.content for chunk in stream)
    upstream.requests[0].wait_left(1)


def test_a_node_client_that_leaves_ends_the_upstreams_answer(
    node: Node, server: Server, upstream: FakeUpstream
) -> None:
    left = node.run("openaiLeft", url=f"{server.url}/api/v1", ask=ask_of("endless"))
    assert left["content"] == "Hello"
    upstream.requests[0].wait_left(1)


# --- what goes wrong --------------------------------------------------------------------------------------

# The class of a status, in both clients; others are an APIStatusError, in Node an APIError, by itself.
CLASSES = {413: None, 502: "InternalServerError", 503: "InternalServerError", 504: "InternalServerError"}


def assert_status_error(seen: Seen, fault: Fault) -> None:
    assert (seen.status, seen.code) == (fault.status, fault.code)
    wanted = CLASSES[fault.status]
    assert wanted is None or seen.kinds[0] == wanted
    assert fault.message in seen.message


@each_streaming
@each_fault
def test_a_cut_stream_is_an_exception(node: Node, server: Server, name: str, fault_name: str) -> None:
    fault = FAULTS[fault_name]
    seen = STREAMING[name](node, server, ask_of(fault_name))
    assert_failed(seen)
    if fault.early:
        assert_status_error(seen, fault)
        return
    assert (seen.kinds[0], seen.status, seen.code) == ("APIError", None, fault.code)
    assert fault.message in seen.message
    assert seen.text == fault.text


@each_whole
@each_fault
def test_a_cut_answer_that_was_to_be_whole_has_its_true_status(
    node: Node, server: Server, name: str, fault_name: str
) -> None:
    seen = WHOLES[name](node, server, ask_of(fault_name))
    assert_failed(seen)
    assert_status_error(seen, FAULTS[fault_name])
    assert seen.text == ""


REFUSED: dict[str, dict[str, Any]] = {
    "another model": {"model": "gpt-9"},
    "a parameter that the settings do not name": {"top_p": 0.5},
    "two answers": {"n": 2},
    "logprobs": {"logprobs": True},
    "a field that is none": {"extra_body": {"speed": 9}},
    "no message": {"messages": []},
    "an image": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}
        ]
    },
}


@pytest.mark.parametrize("name", ["python streamed", "python whole", "node streamed", "node whole"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_allowed_is_a_bad_request(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str, what: str
) -> None:
    more = dict(REFUSED[what])
    if name.startswith("node"):
        more |= more.pop("extra_body", {})
    seen = CLIENTS[name](node, servers["chat"], ask_of("text") | more)
    assert (seen.kinds[0], seen.status, seen.code) == ("BadRequestError", 400, "invalid_request")
    assert upstream.requests == []


@each_client
def test_a_wrong_key_is_an_authentication_error(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str
) -> None:
    seen = CLIENTS[name](node, servers["tokens"], ask_of("text"), key="wrong")
    assert (seen.kinds[0], seen.status, seen.code) == ("AuthenticationError", 401, "unauthorized")
    assert upstream.requests == []


@each_client
def test_the_token_is_the_key(node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str) -> None:
    seen = CLIENTS[name](node, servers["tokens"], ask_of("text"), key=TOKEN)
    assert (seen.text, seen.finish_reason) == (WHOLE, "stop")
    assert messages_of(upstream.requests[0])[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("name", ["python streamed", "node whole"])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_where_the_server_owns_the_system_prompt_no_client_sets_one(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str, role: str
) -> None:
    messages = [{"role": role, "content": "Be rude."}, {"role": "user", "content": "text"}]
    seen = CLIENTS[name](node, servers["tokens"], ask_of(messages), key=TOKEN)
    assert (seen.kinds[0], seen.status) == ("BadRequestError", 400)
    assert upstream.requests == []


@each_client
def test_a_full_server_is_an_exception_that_can_be_retried(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, name: str
) -> None:
    server = servers["tokens"]
    # The slot of an answer that has just ended is given back with its last byte, or a moment after it.
    with client(server, TOKEN) as sdk, until_free(sdk) as stream:
        next(stream)
        seen = CLIENTS[name](node, server, ask_of("text"), key=TOKEN)
        assert (seen.kinds[0], seen.status, seen.code) == ("InternalServerError", 503, "overloaded")
    upstream.requests[-1].wait_left(1)


def until_free(sdk: openai.OpenAI) -> Any:
    found: list[Any] = []

    def ask() -> bool:
        try:
            found.append(sdk.chat.completions.create(**ask_of("endless"), stream=True))
        except openai.InternalServerError:
            return False
        return True

    wait_for(ask, what="a free slot")
    return found[0]


# --- models, and what stands on the wire ------------------------------------------------------------------


def test_both_clients_list_the_models(node: Node, servers: dict[str, Server]) -> None:
    with client(servers["chat"]) as sdk:
        (model,) = sdk.models.list()
    assert (model.id, model.object) == (MODEL, "model")
    assert isinstance(model.created, int) and isinstance(model.owned_by, str)
    assert node.run("openaiListed", url=f"{servers['chat'].url}/api/v1")["models"] == [
        model.model_dump(exclude_unset=True)
    ]


def test_models_are_listed_for_those_who_may_ask(node: Node, servers: dict[str, Server]) -> None:
    with client(servers["tokens"], "wrong") as sdk, pytest.raises(openai.AuthenticationError):
        sdk.models.list()
    listed = node.run("openaiListed", url=f"{servers['tokens'].url}/api/v1", key="wrong")
    assert listed["error"]["kinds"][0] == "AuthenticationError"
    assert node.run("openaiListed", url=f"{servers['tokens'].url}/api/v1", key=TOKEN)["error"] is None


PATHS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "own": ("get-response", {"message": "{}"}, {"Accept": "text/event-stream"}),
    "ui": ("chat", {"messages": [{"role": "user", "parts": [{"type": "text", "text": "{}"}]}]}, {}),
    "openai": ("v1/chat/completions", ask_of("{}", stream=True), {}),
}


def parsed(node: Node, server: Server, way: str, message: str) -> dict[str, Any]:
    """What eventsource-parser makes of the stream that one of the paths answers with."""
    path, body, headers = PATHS[way]
    filled = json.loads(json.dumps(body).replace("{}", message))
    return dict(node.run("parsed", url=f"{server.url}/api/{path}", body=filled, headers=headers))


@pytest.mark.parametrize("message", ["text", "split_emoji", "reasoning", "tools", "error", "cut"])
@pytest.mark.parametrize("way", PATHS)
def test_a_strict_parser_reads_every_event_however_the_stream_is_split(
    node: Node, server: Server, way: str, message: str
) -> None:
    seen = parsed(node, server, way, message)
    assert (seen["status"], seen["errors"], seen["comments"], seen["same"]) == (200, [], [], True)
    assert len(seen["events"]) >= 3


@pytest.mark.parametrize("way", PATHS)
def test_a_strict_parser_takes_heartbeats_for_comments(
    node: Node, servers: dict[str, Server], upstream: FakeUpstream, way: str
) -> None:
    seen = parsed(node, servers["hasty"], way, "slow")
    assert (seen["status"], seen["errors"], set(seen["comments"]), seen["same"]) == (200, [], {"keep-alive"}, True)


def test_an_answer_that_was_cut_has_no_end_mark_on_the_wire(server: Server) -> None:
    path, body, _ = PATHS["openai"]
    filled = json.loads(json.dumps(body).replace("{}", "cut"))
    response = requests.post(f"{server.url}/api/{path}", json=filled, timeout=10)
    assert response.text.rstrip().split("\n\n")[-1].startswith('data: {"error":')
    assert "[DONE]" not in response.text and '"finish_reason":"' not in response.text
