"""Request bodies: what becomes a ChatRequest, and how everything else is refused."""

from __future__ import annotations

import dataclasses
import json
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.errors import InvalidRequest, PayloadTooLarge, Refused
from streamchat.schema import ChatRequest, Message, parse_request
from streamchat.settings import Settings

CANARY = "canary-7f3a"
PLAIN = Settings()
OPEN = Settings(models=("big",), params=("temperature", "top_p", "max_output_tokens"), max_input_chars=20)


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def user(content: object, **more: object) -> dict[str, object]:
    return {"role": "user", "content": content, **more}


def parse(data: bytes, settings: Settings = PLAIN) -> ChatRequest:
    return parse_request(data, settings)


def test_a_message_is_the_users() -> None:
    assert parse(body(message="hi")) == ChatRequest((Message("user", "hi"),), "gpt-4.1-mini", {}, {})


def test_a_conversation_keeps_its_order() -> None:
    sent = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    found = parse(body(messages=sent)).messages
    assert found == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


def test_a_request_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(body(message="hi")).model = "x"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["é 👋", "\x00", "a\u2028", "\ufeffa", "a\r\nb", " leading and trailing "])
def test_text_arrives_as_it_was_sent(text: str) -> None:
    for data in (body(message=text), json.dumps({"message": text}, ensure_ascii=False).encode()):
        assert parse(data).messages[0].content == text


def test_whitespace_around_the_body_is_no_fault() -> None:
    assert parse(b' \r\n{"message": "hi"}\n').messages[0].content == "hi"


def test_the_servers_own_model_is_always_allowed_by_name_and_listed_ones_too() -> None:
    assert parse(body(message="hi", model="gpt-4.1-mini")).model == "gpt-4.1-mini"
    assert parse(body(message="hi", model="big"), OPEN).model == "big"
    assert parse(body(message="hi"), OPEN).model == "gpt-4.1-mini"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 0.5),
        ("temperature", 2),
        ("top_p", 0.1),
        ("top_p", 1),
        ("max_output_tokens", 7),
    ],
)
def test_what_the_settings_let_callers_set_is_passed_on(name: str, value: float) -> None:
    assert parse(body(message="hi", **{name: value}), OPEN).params == {name: value}


def test_a_caller_cannot_ask_for_more_tokens_than_the_server_allows() -> None:
    assert parse(body(message="hi", max_output_tokens=4096), OPEN).params == {"max_output_tokens": 4096}
    assert "max_output_tokens" in str(refusal(body(message="hi", max_output_tokens=4097), OPEN))


def test_context_is_handed_through_untouched() -> None:
    context = {"conversation": 7, "deep": {"list": [1, None, "é"]}}
    assert parse(body(message="hi", context=context)).context == context


# What each refusal must name: the field as the caller wrote it.
REFUSED: list[tuple[bytes, tuple[str, ...]]] = [
    (b"", ("body",)),
    (b"hi", ("body",)),
    (b"{", ("body",)),
    (b'{"message": "hi"} {}', ("body",)),
    (b"{'message': 'hi'}", ("body",)),
    (b'{"message": "hi",}', ("body",)),
    (b"[]", ("body",)),
    (b'["hi"]', ("body",)),
    (b'"hi"', ("body",)),
    (b"null", ("body",)),
    (b"5", ("body",)),
    (b'{"message": "\xff"}', ("body",)),
    (b'{"message": "\xed\xa0\xbd"}', ("body",)),
    ('{"message": "hi"}'.encode("utf-16"), ("body",)),
    ('{"message": "hi"}'.encode("utf-32"), ("body",)),
    (b"[" * 100_000, ("body",)),
    (b'{"message":' * 50_000, ("body",)),
    (b'{"context":' + b"[" * 50_000 + b"]" * 50_000 + b',"message":"hi"}', ()),
    (b'{"message":"hi","context":{"a":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001 + b"}", ()),
    (b'{"message":"hi","context":{"a":NaN}}', ()),
    (b'{"message":"hi","context":{"a":' + b"1" * 5000 + b"}}", ()),
    (b'{"message":"hi","max_output_tokens":' + b"1" * 5000 + b"}", ()),
    (b'{"message":"hi","temperature":1e999}', ()),
    (b'{"message":"hi","temperature":NaN}', ()),
    (b"{}", ("message",)),
    (body(messages=[]), ("messages",)),
    (body(message=""), ("message",)),
    (body(message=" \n\t"), ("message",)),
    (body(message="\u00a0\u2003"), ("message",)),
    (body(message=None), ("message",)),
    (body(message=5), ("message",)),
    (body(message=True), ("message",)),
    (body(message=["hi"]), ("message",)),
    (body(message={"content": CANARY}), ("message",)),
    (body(message="hi", messages=[user("hi")]), ("message",)),
    (body(messages="hi"), ("messages",)),
    (body(messages={"0": user("hi")}), ("messages",)),
    (body(messages=None), ("message",)),
    (body(messages=["hi"]), ("messages", "0")),
    (body(messages=[None]), ("messages", "0")),
    (body(messages=[{}]), ("messages", "0")),
    (body(messages=[{"role": "user"}]), ("messages", "0", "content")),
    (body(messages=[{"content": "hi"}]), ("messages", "0", "role")),
    (body(messages=[user("hi"), user("")]), ("messages", "1", "content")),
    (body(messages=[user("hi"), user(" ")]), ("messages", "1", "content")),
    (body(messages=[user(None)]), ("messages", "0", "content")),
    (body(messages=[user([{"type": "text", "text": CANARY}])]), ("messages", "0", "content")),
    (body(messages=[user("hi", name=CANARY)]), ("messages", "0", "name")),
    (body(messages=[user("hi", tool_calls=[CANARY])]), ("messages", "0", "tool_calls")),
    *(
        (body(messages=[user("hi"), {"role": role, "content": CANARY}]), ("messages", "1", "role"))
        for role in ("system", "developer", "tool", "function", "User", "user ", "", CANARY, None, 1, ["user"])
    ),
    (body(message="hi", model=CANARY), ("model",)),
    (body(message="hi", model=""), ("model",)),
    (body(message="hi", model=5), ("model",)),
    (body(message="hi", model=["gpt-4.1-mini"]), ("model",)),
    (body(message="hi", temperature=0.5), ("temperature",)),
    (body(message="hi", top_p=0.5), ("top_p",)),
    (body(message="hi", max_output_tokens=5), ("max_output_tokens",)),
    (body(message="hi", context=[]), ("context",)),
    (body(message="hi", context=CANARY), ("context",)),
    (body(message="hi", context=5), ("context",)),
    (body(message="hi", stream=True), ("stream",)),
    (body(message="hi", system=CANARY), ("system",)),
    (body(message="hi", tools=[CANARY]), ("tools",)),
    (body(message="hi", Message=CANARY), ("Message",)),
    # They come with later versions; until then they are fields that nobody knows.
    (body(message="hi", background=True), ("background",)),
    (body(message="hi", webhook_url=f"https://{CANARY}"), ("webhook_url",)),
]


def refusal(data: bytes, settings: Settings = PLAIN) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(data, settings)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(vars(caught.value))
    assert "canary" not in shown
    return caught.value


@pytest.mark.parametrize(("data", "names"), REFUSED, ids=lambda part: repr(part)[:60])
def test_a_bad_body_is_refused_by_the_fields_name_and_repeats_nothing(data: bytes, names: tuple[str, ...]) -> None:
    error = refusal(data)
    assert (error.status, error.code) == (400, "invalid_request")
    for name in names:
        assert name in str(error)
    assert str(error).endswith(".") and "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", True), ("temperature", "0.5"), ("temperature", []),
        ("top_p", -0.1), ("top_p", 1.1), ("top_p", False), ("top_p", CANARY),
        ("max_output_tokens", 0), ("max_output_tokens", -1), ("max_output_tokens", 1.5), ("max_output_tokens", True),
        ("max_output_tokens", "7"), ("max_output_tokens", 10**30),
    ],
)  # fmt: skip
def test_a_parameter_that_may_be_set_is_still_checked(name: str, value: object) -> None:
    error = refusal(body(message="hi", **{name: value}), OPEN)
    assert error.status == 400
    assert name in str(error)


def test_the_first_of_several_faults_is_enough() -> None:
    error = refusal(body(messages=[{"role": CANARY, "content": 5, CANARY[:0] + "x": CANARY}], model=5))
    assert "messages" in str(error) or "model" in str(error)


def test_the_name_of_an_unknown_field_is_not_repeated_at_any_length() -> None:
    for name in ("x" * 100_000, "a\nb\r\nc", "\x1b[31m", "é" * 5000):
        error = refusal(body(message="hi", **{name: 1}))
        assert len(str(error)) < 1000
        assert str(error).isprintable()


@pytest.mark.parametrize(
    ("data", "fits"),
    [
        (body(message="x" * 20), True),
        (body(message="x" * 21), False),
        (body(message="é" * 20), True),
        (body(message="👋" * 20), True),
        (body(messages=[user("x" * 10), user("x" * 10)]), True),
        (body(messages=[user("x" * 10), user("x" * 11)]), False),
    ],
)
def test_the_text_of_all_messages_is_counted_in_characters(data: bytes, fits: bool) -> None:
    if fits:
        assert parse(data, OPEN).messages
        return
    with pytest.raises(PayloadTooLarge) as caught:
        parse(data, OPEN)
    assert (caught.value.status, caught.value.code) == (413, "payload_too_large")
    assert "message" in str(caught.value)


def test_a_context_of_four_kilobytes_fits_and_a_larger_one_does_not() -> None:
    small = {"a": "x" * (4096 - len('{"a":""}'))}
    assert parse(json.dumps({"message": "hi", "context": small}, separators=(",", ":")).encode()).context == small
    for large in ({"a": "x" * 4097}, {"a": "é" * 4000}, {str(number): 1 for number in range(2000)}):
        error = refusal(json.dumps({"message": "hi", "context": large}, ensure_ascii=False).encode())
        assert error.status in (400, 413)
        assert "context" in str(error)


@pytest.mark.parametrize("half", ["\ud83d", "x\ude00", "a\ud83db"])
def test_half_an_emoji_is_refused_or_mended_but_never_passed_on(half: str) -> None:
    for data in (body(message=half), body(messages=[user(half)]), body(message="hi", context={"a": half})):
        try:
            request = parse(data)
        except InvalidRequest:
            continue
        assert json.dumps([message.content for message in request.messages], ensure_ascii=False).encode()
        assert json.dumps(request.context, ensure_ascii=False).encode()


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=10,
)
fields = st.sampled_from(
    ["message", "messages", "model", "temperature", "top_p", "max_output_tokens", "context", "role", "content", "x"]
)


def taken_or_refused(data: bytes) -> None:
    try:
        request = parse(data, OPEN)
    except (InvalidRequest, PayloadTooLarge):
        return
    assert request.messages
    assert all(message.role in ("user", "assistant") and message.content.strip() for message in request.messages)
    assert request.model in ("gpt-4.1-mini", "big")
    assert request.params.keys() <= {"temperature", "top_p", "max_output_tokens"}


@given(st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    taken_or_refused(data)


@given(st.dictionaries(fields, values, max_size=4) | values)
def test_any_json_is_taken_or_refused(value: object) -> None:
    taken_or_refused(json.dumps(value).encode())


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["role", "content", "x"]), st.just("user") | values, max_size=3), max_size=3
    )
)
def test_any_messages_are_taken_or_refused(messages: list[object]) -> None:
    taken_or_refused(body(messages=messages))
