"""`flask streamchat doctor` as an operator types it: what cannot be tested, its help, and what it reads of a stream."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from flask import Flask

from streamchat import StreamChat
from streamchat.diagnostics import check_token
from streamchat.doctor import NDJSON, READ_LINE, REASONS, SSE, TEXT, _pieces
from tests.live.servers import free_port
from tests.shop import KEY, Shop, open_shop, serve

SECRET = "the secret of this shop"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")


def shop_with(secret: str | None, diagnostics: bool = True) -> Shop:
    app = Flask("shop")
    app.secret_key = secret
    StreamChat(app, public=True, diagnostics=diagnostics)
    return Shop(app)


@pytest.fixture
def shop() -> Iterator[Shop]:
    """The operator's own: it only signs."""
    with open_shop() as opened:
        opened.app.secret_key = SECRET
        yield opened


def typed(shop: Shop, *arguments: str) -> Result:
    return shop.app.test_cli_runner().invoke(args=["streamchat", *arguments], catch_exceptions=False)


def examined(shop: Shop, there: Shop, path: str = "/api") -> Result:
    try:
        with serve(there.app) as port:
            return typed(shop, "doctor", f"http://127.0.0.1:{port}{path}", "--timeout", "5")
    finally:
        there.close()


def test_an_address_where_nobody_listens_cannot_be_tested(shop: Shop) -> None:
    result = typed(shop, "doctor", f"http://127.0.0.1:{free_port()}/api")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("could not test: ConnectError")


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1/api", "http://127.0.0.1:99999/api"])
def test_what_is_no_address_cannot_be_tested(shop: Shop, url: str) -> None:
    assert typed(shop, "doctor", url).exit_code == 2


def test_diagnostics_that_are_off_cannot_be_tested(shop: Shop) -> None:
    result = examined(shop, shop_with(SECRET, diagnostics=False))
    assert (result.exit_code, REASONS[404] in result.stderr) == (2, True)


def test_an_address_without_the_prefix_cannot_be_tested(shop: Shop) -> None:
    assert examined(shop, shop_with(SECRET), path="/other").exit_code == 2


def test_a_silence_longer_than_any_answer_cannot_be_tested(shop: Shop) -> None:
    there = shop_with(SECRET)
    try:
        with serve(there.app) as port:
            result = typed(shop, "doctor", f"http://127.0.0.1:{port}/api", "--gap", "600")
    finally:
        there.close()
    assert (result.exit_code, REASONS[400] in result.stderr) == (2, True)


@pytest.mark.parametrize("secret", ["another secret", None])
def test_an_app_with_another_secret_cannot_be_tested(shop: Shop, secret: str | None) -> None:
    result = examined(shop, shop_with(secret))
    assert (result.exit_code, REASONS[401] in result.stderr) == (2, True)


def test_without_a_secret_of_its_own_it_says_so(shop: Shop) -> None:
    shop.app.secret_key = None
    result = typed(shop, "doctor", "http://127.0.0.1:9/api")
    assert (result.exit_code, "SECRET_KEY" in result.stderr) == (2, True)
    assert typed(shop, "doctor-token").exit_code == 1


def test_a_program_is_told_in_json_that_nothing_was_tested(shop: Shop) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    document = json.loads(typed(shop, "doctor", url, "--json").stdout)
    assert (document["url"], document["exit"]) == (url, 2)
    assert "ConnectError" in document["error"]


def test_the_token_for_another_machine_is_one_that_the_app_takes(shop: Shop) -> None:
    check_token(f"Bearer {typed(shop, 'doctor-token').stdout.strip()}", SECRET)


class Strange(BaseHTTPRequestHandler):
    """Not our app: what it answers stands in its path."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = {
            "/page": (200, b"<html>hello</html>"),
            "/list": (200, b"[]"),
            "/object": (200, b"{}"),
            "/moved": (308, b""),
            "/full": (503, b""),
        }[self.path.removesuffix("/diagnostics/stream")]
        self.send_response(status)
        self.send_header("Location", "https://elsewhere.example/api")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """To nobody."""


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("page", REASONS[404]),
        ("list", REASONS[404]),
        ("object", REASONS[404]),
        ("moved", "https://elsewhere.example/api"),
        ("full", REASONS[503]),
    ],
)
def test_another_server_cannot_be_tested(shop: Shop, path: str, words: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            result = typed(shop, "doctor", f"http://127.0.0.1:{server.server_address[1]}/{path}/")
        finally:
            server.shutdown()
            thread.join()
    assert (result.exit_code, words in result.stderr) == (2, True)


def test_the_help_says_what_is_needed_and_what_the_exit_status_means(shop: Shop) -> None:
    text = " ".join(typed(shop, "doctor", "--help").stdout.split())
    for words in ("STREAMCHAT_DIAGNOSTICS", "SECRET_KEY", "0 nothing breaks streaming", "2 it could not be tested"):
        assert words in text
    for option in ("--gap", "--timeout", "--token", "--json"):
        assert option in text


PIECE = '{"n":0,"at":0.5}\n'
AS_EVENT = json.dumps({"type": "text", "seq": 1, "text": PIECE})
WRITTEN = {
    TEXT: PIECE,
    NDJSON: f'{{"type":"start","seq":0}}\n{AS_EVENT}\n{{"type":"heartbeat"}}\n',
    SSE: f'id: 0\nevent: start\ndata: {{"type":"start"}}\n\n: keep-alive\nid: 1\nevent: text\ndata: {AS_EVENT}\n\n',
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_piece_has_come_when_its_line_is_whole_however_it_was_split(kind: str) -> None:
    body = WRITTEN[kind].encode()
    line_end = body.index(b"\n", body.index(b'"at') if kind == TEXT else body.index(b'\\"at')) + 1
    one_by_one = [(float(at), body[at : at + 1]) for at in range(len(body))]
    assert _pieces(READ_LINE[kind], one_by_one) == ((0.5,), (float(line_end - 1),))
    assert _pieces(READ_LINE[kind], [(7.0, body)]) == ((0.5,), (7.0,))


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("body", [b"<html>\n", b"data: <html>\n", b"data: 7\n\n", b"\xff\n", b"7\n", b"data: []\n"])
def test_what_is_none_of_our_lines_brings_no_piece(kind: str, body: bytes) -> None:
    assert _pieces(READ_LINE[kind], [(1.0, body)]) == ((), ())
