"""What is secret stays in: key, organisation, base URL and system prompt, in no response and no log, whatever fails."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fake_upstream import (
    FakeUpstream,
    Fin,
    RecordedRequest,
    Rst,
    Step,
    answer,
    done,
    error,
    head,
    http_chunk,
    key_echoing_401,
    last_chunk,
    sse,
    text,
)
from tests.live.readers import FORMATS, Seen, by_http_client, by_socket
from tests.live.servers import Server, flask_run, gunicorn, wait_for
from tests.live.test_cuts import EARLY, FAULTS

pytestmark = pytest.mark.live

KEY = "sk-canary-0123456789"  # what servers.environment() sets
ORGANISATION, PROJECT = "org-canary-4711", "proj-canary-4712"
PATH = "path-of-the-canary"
PROMPT = "You are the canary of the shop."
SECRETS = ("canary", "Bearer sk-")  # each secret has the bird in it
ECHO = f"Incorrect API key {KEY} of {ORGANISATION} at /{PATH}/v1; prompt: {PROMPT}"

# Everything that an upstream can say about itself, said with the secrets in it.
TOLD: dict[str, Step] = {
    "401 with the key": key_echoing_401,
    "400 with all": error(400, KEY, ECHO, kind=KEY),
    "403 with all": error(403, "some_code", ECHO, kind=KEY, headers={"x-request-id": f"{KEY} {PROMPT}"}),
    "404 with all": error(404, None, ECHO, kind=ECHO),
    "429 with all": error(429, "rate_limit_exceeded", ECHO, headers={"Retry-After": KEY}),
    "500 with all": error(500, ECHO, ECHO),
    "500 as a page": [head(500, content_type="text/html"), http_chunk(ECHO.encode()), last_chunk()],
    "a redirect": [head(302, {"Location": f"http://127.0.0.1:1/{KEY}", "Content-Length": "0"}, chunked=False)],
    "not HTTP": [f"{ECHO}\r\n\r\n".encode(), Fin()],
    "a bad head": [f"HTTP/1.1 200 OK\r\nbad header {KEY}\r\n\r\n".encode(), Fin()],
    "another type": [head(content_type="text/html"), http_chunk(ECHO.encode()), last_chunk()],
    "an encoding": [head(headers={"Content-Encoding": KEY}), http_chunk(ECHO.encode()), last_chunk()],
    "an error object": [head(), text("Hel"), http_chunk(sse({"error": {"message": ECHO, "code": KEY, "type": ECHO}}))],
    "an error text": [head(), text("Hel"), http_chunk(sse({"error": ECHO}))],
    "an error event": [head(), text("Hel"), http_chunk(b"event: error\n" + sse({"message": ECHO}))],
    "bad JSON": [head(), text("Hel"), http_chunk(f'data: {{"choices": [{KEY} {ECHO}\n\n'.encode())],
    "bad UTF-8": [head(), text("Hel"), http_chunk(b"data: \xff" + ECHO.encode() + b"\n\n")],
    "no object": [head(), text("Hel"), http_chunk(sse([ECHO]))],
    "a wrong type": [head(), text("Hel"), http_chunk(sse({"choices": [{"delta": {"content": {KEY: ECHO}}}]}))],
    "a strange usage": [head(), text("Hel"), http_chunk(sse({"usage": {"prompt_tokens": ECHO}, "choices": []}))],
    "a bad chunk": [head(), text("Hel"), f"{KEY}\r\n{ECHO}".encode(), Fin()],
    "a reset after all": [head(), text("Hel"), http_chunk(f": {ECHO}\n\n".encode()), Rst()],
    "DONE too soon": [head(headers={"openai-organization": ORGANISATION}), text("Hel"), done(), last_chunk()],
    "a good answer": answer(["Hel", "lo"]),
}
SETTINGS = {
    "system_prompt": PROMPT,
    "idle_timeout": "0.3",
    "first_token_timeout": "0.4",
    "max_retries": "1",
    "status_hold": "3",
}
IDENTITY = {"OPENAI_ORG_ID": ORGANISATION, "OPENAI_PROJECT_ID": PROJECT}
# None of them has an upstream that answers: nothing listens, not TLS, no such host, no such scheme.
UNREACHABLE = ("http://127.0.0.1:1", "https://127.0.0.1:{port}", "http://canary-host.invalid", "ftp://127.0.0.1:{port}")


def script_of(request: RecordedRequest) -> Step:
    name = request.message
    if name in EARLY:
        return EARLY[name].step
    return TOLD[name] if name in TOLD else [head(), text("Hel"), *FAULTS[name].steps]


ROWS = [(name, accept) for name in [*TOLD, *FAULTS, *EARLY] for accept in FORMATS]


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        fake.choose = script_of
        yield fake


def secret_base(upstream: FakeUpstream) -> str:
    return upstream.base_url.replace("/v1", f"/{PATH}/v1")


def ask_everything(server: Server) -> None:
    """Every row, judged: the response whole with its headers, then all that was logged of it."""
    with ThreadPoolExecutor(16) as pool:
        for (name, accept), seen in zip(ROWS, pool.map(lambda row: by_socket(server.port, *row), ROWS), strict=True):
            assert_keeps(repr((seen, dict(seen.headers))), f"{name} as {accept}")


def assert_keeps(said: str, place: str) -> None:
    for secret in SECRETS:
        assert secret not in said, f"{secret!r} in {place}: {said[:2000]}"


def assert_all_arrived(upstream: FakeUpstream) -> None:
    """The upstream did get what may not come back: else there would be nothing to leak."""
    request = upstream.requests[0]
    assert request.path.startswith(f"/{PATH}/v1/")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["openai-organization"] == ORGANISATION
    assert request.headers["openai-project"] == PROJECT
    assert request.body["messages"][0] == {"role": "system", "content": PROMPT}


GTHREAD = ("-k", "gthread", "--threads", "20")


@pytest.mark.parametrize("arguments", [(), ("--log-level", "debug"), GTHREAD], ids=" ".join)
def test_no_secret_is_in_an_answer_or_in_gunicorns_log(
    upstream: FakeUpstream, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with gunicorn(secret_base(upstream), tmp_path, *arguments, extra=IDENTITY, **SETTINGS) as server:
        ask_everything(server)
        wait_for(lambda: len(server.records()) == len(ROWS), what="the records")
    assert_all_arrived(upstream)
    if "debug" in arguments:
        assert " DEBUG " in server.log
    assert_keeps(server.log, "the log")
    assert "Traceback" not in server.log


@pytest.mark.parametrize("mode", [(), ("--debug",)], ids=["", "debug"])
def test_no_secret_is_in_an_answer_or_in_the_log_of_flask_run(
    upstream: FakeUpstream, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    with flask_run(secret_base(upstream), tmp_path, *mode, **SETTINGS) as server:
        ask_everything(server)
    assert_keeps(server.log, "the log")
    assert "Traceback" not in server.log


@pytest.mark.parametrize("base", UNREACHABLE)
@pytest.mark.parametrize("http", ["fast", "sdk"])
def test_no_secret_is_told_where_the_upstream_cannot_be_reached(
    upstream: FakeUpstream, tmp_path: Path, base: str, http: str
) -> None:
    url = f"{base.format(port=upstream.port)}/{PATH}/v1"
    settings = SETTINGS | {"http": http, "max_retries": "0", "first_token_timeout": "5", "connect_timeout": "0.5"}
    with gunicorn(url, tmp_path, extra=IDENTITY, **settings) as server:
        for accept in FORMATS:
            seen: Seen = by_http_client(server.port, "hi", accept)
            assert (seen.status, seen.document["code"]) == (502, "upstream_unreachable"), seen
            assert_keeps(repr((seen, dict(seen.headers))), accept)
    assert_keeps(server.log, "the log")
    assert "Traceback" not in server.log


def test_no_secret_is_in_an_answer_or_log_of_the_sdks_own_http(upstream: FakeUpstream, tmp_path: Path) -> None:
    with gunicorn(secret_base(upstream), tmp_path, extra=IDENTITY, http="sdk", **SETTINGS) as server:
        ask_everything(server)
        wait_for(lambda: len(server.records()) == len(ROWS), what="the records")
    assert_all_arrived(upstream)
    assert_keeps(server.log, "the log")
    assert "Traceback" not in server.log
