"""An Upstream that a test asks: its environment is set, and nothing of it may be left behind.

Blocks that ask run inside the FakeUpstream's: the connections of both sides count.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import openai
import trustme

from streamchat.cancellation import Cancellation
from streamchat.events import Event, Text
from streamchat.ledger import Trail
from streamchat.loop import choose_loop
from streamchat.prompt import Prompt
from streamchat.settings import Settings
from streamchat.upstream import Reply, Upstream

KEY = "sk-canary-4711"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
PROMPT = Prompt([{"role": "user", "content": "hi"}], "fake-model", {})


class Asking:
    """One Upstream; each answer has a Trail and a Cancellation of its own, the last ones are kept here."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.trail = Trail()

    def open(self, cancellation: Cancellation | None = None, prompt: Prompt = PROMPT) -> Reply:
        self.trail = Trail()
        return self.upstream.open(self.upstream.client(), prompt, cancellation or Cancellation(), self.trail)

    def ask(self) -> list[Event]:
        """All events of one answer."""
        reply = self.open()
        try:
            return read_all(reply)
        finally:
            reply.close()

    def text(self) -> str:
        return "".join(event.text for event in self.ask() if isinstance(event, Text))


def read_all(reply: Reply, seconds: float = 10) -> list[Event]:
    """Events up to the last one, which is Finish; raises what the reply raises."""
    until, events = time.monotonic() + seconds, list[Event]()
    while not events or events[-1].type != "finish":
        read = reply.read(until)
        assert read is not None, f"no end after {seconds} s: {events}"
        events += read
    return events


@contextmanager
def asking(
    base_url: str,
    *,
    client_factory: Callable[[], openai.OpenAI] | None = None,
    environ: Mapping[str, str] | None = None,
    authority: Path | None = None,
    **settings: Any,
) -> Iterator[Asking]:
    """An Upstream for this base URL, closed at the end, when everything that it opened must be gone."""
    changed = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": KEY} | dict(environ or {})
    if authority is not None:
        changed["SSL_CERT_FILE"] = str(authority)
    with mock.patch.dict(os.environ, changed):
        for name in PROXY_VARIABLES:
            for spelling in (name, name.upper()):
                if spelling not in (environ or {}):
                    os.environ.pop(spelling, None)
        with nothing_left():
            upstream = Upstream(Settings(public=True, **settings), choose_loop(), client_factory)
            try:
                yield Asking(upstream)
            finally:
                upstream.close()


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails where descriptors or helper threads outlive the block by five seconds."""
    before = descriptors()
    yield
    until = time.monotonic() + 5
    while descriptors() > before or helpers():
        assert time.monotonic() < until, f"{descriptors() - before} descriptors, helpers {helpers()} are left"
        time.sleep(0.002)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def helpers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamchat")]


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not true after {seconds} s"
        time.sleep(0.001)


class Background:
    """A call in a thread: what it returned or raised, and when."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.error = error
        self.ended = time.monotonic()

    def join(self, seconds: float = 5) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"still running after {seconds} s"


def server_context(authority: trustme.CA, *names: str, **certificate: Any) -> ssl.SSLContext:
    """TLS for a server with a certificate for these names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **certificate).configure_cert(context)
    return context
