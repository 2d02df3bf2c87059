"""A request as the SDK builds it, learned once, becomes requests that cost little: only the body is another each time.

The SDK names the address, authenticates and describes itself; nothing of that changes while its client lives.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from .connection import write_head
from .transport import Route

# Of the body, which is another each time; and what the SDK says of its own timeout and retries, which are ours.
OWN_HEADERS = ("content-length", "x-stainless-read-timeout")
ACCEPT = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode  # as httpx2 does


@dataclass(frozen=True, slots=True)
class Template:
    """Where a POST goes, and its head up to the length of the body. It holds the key."""

    route: Route
    _head: bytes = field(repr=False)

    def request(self, body: dict[str, Any]) -> bytes:
        content = _encode(body).encode()
        return b"%sContent-Length: %d\r\n\r\n%s" % (self._head, len(content), content)


class _Recorder(httpx2.BaseTransport):
    """Keeps the request that it is given, and answers with nothing."""

    request: httpx2.Request

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.request = request
        return httpx2.Response(200)


def learn(client: openai.OpenAI, path: str) -> Template:
    """What the client sends to `path`. Raises what the SDK raises, or httpx2.LocalProtocolError."""
    recorder = _Recorder()
    with httpx2.Client(transport=recorder, trust_env=False) as http_client:
        client.with_options(http_client=http_client).post(
            path,
            body={},
            cast_to=httpx2.Response,
            stream=True,
            stream_cls=openai.Stream[Any],
            options={"headers": ACCEPT},
        )
    request = recorder.request
    for name in OWN_HEADERS:
        request.headers.pop(name, None)
    return Template(Route.of(request.url), write_head(request).removesuffix(b"\r\n"))
