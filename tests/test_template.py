"""What is sent again and again is what the SDK would send, byte for byte but for its own timeout."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.connection import write_head
from streamchat.template import ACCEPT, OWN_HEADERS, Template, learn
from streamchat.transport import Route

BASE = "http://models.example:8000/v1"
KEY = "sk-canary-3141"


class Sent(httpx2.BaseTransport):
    """An upstream that keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        return httpx2.Response(200)


def client(sent: Sent, base_url: str = BASE, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(api_key=KEY, base_url=base_url, http_client=httpx2.Client(transport=sent), **options)


def parts(request: bytes) -> tuple[list[bytes], bytes]:
    head, _, content = request.partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    names = tuple(name.encode() for name in OWN_HEADERS if name != "content-length")
    return [first, *sorted(line.lower() for line in headers if not line.lower().startswith(names))], content


def sent_by_the_sdk(body: dict[str, Any], **options: Any) -> tuple[list[bytes], bytes]:
    sent = Sent()
    client(sent, **options).post(
        "/chat/completions",
        body=body,
        cast_to=httpx2.Response,
        stream=True,
        stream_cls=openai.Stream[Any],
        options={"headers": ACCEPT},
    )
    (request,) = sent.requests
    return parts(write_head(request) + request.content)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none() | st.booleans() | st.lists(TEXTS), max_size=3))
def test_a_request_is_the_one_that_the_sdk_would_send(body: dict[str, Any]) -> None:
    template = learn(client(Sent()), "/chat/completions")
    assert parts(template.request(body)) == sent_by_the_sdk(body)


def test_what_the_operator_gave_the_sdk_is_in_it() -> None:
    options: dict[str, Any] = {
        "base_url": "https://models.example/openai/v1",
        "organization": "org-1",
        "project": "proj-1",
        "default_headers": {"X-Team": "shop"},
        "default_query": {"api-version": "7"},
    }
    template = learn(client(Sent(), **options), "/chat/completions")
    assert template.route == Route("https", "models.example", 443)
    assert parts(template.request({"a": 1})) == sent_by_the_sdk({"a": 1}, **options)
    assert b"POST /openai/v1/chat/completions?api-version=7 HTTP/1.1\r\n" in template.request({})


def test_learning_sends_nothing() -> None:
    sent = Sent()
    learn(client(sent), "/chat/completions")
    assert sent.requests == []


def test_the_client_can_be_used_when_it_was_learned_from() -> None:
    sent = Sent()
    used = client(sent)
    learn(used, "/chat/completions")
    used.post("/x", body={}, cast_to=httpx2.Response)
    assert len(sent.requests) == 1


def test_the_length_is_that_of_the_content() -> None:
    request = learn(client(Sent()), "/chat/completions").request({"text": "Grüße \u2028"})
    head, _, content = request.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(content) in head
    assert json.loads(content) == {"text": "Grüße \u2028"}


def test_the_key_is_not_in_the_repr() -> None:
    template = learn(client(Sent()), "/chat/completions")
    assert KEY.encode() in template.request({})
    assert KEY not in repr(template)


def test_a_header_that_would_split_the_head_is_refused_without_its_words() -> None:
    broken = client(Sent(), default_headers={"X-Team": "a\r\nX-Admin: " + KEY})
    with pytest.raises((httpx2.LocalProtocolError, openai.APIConnectionError, ValueError)) as failure:
        learn(broken, "/chat/completions")
    assert KEY not in str(failure.value)


def test_a_number_that_json_does_not_have_is_refused() -> None:
    template = Template(Route("http", "a", 1), b"POST / HTTP/1.1\r\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        template.request({"temperature": float("nan")})
