"""The promises of the upstream side under gevent: a script of its own process patches first, then asks.

The fake upstream runs in the test's process, so its clock is not held up by the hub that is judged.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.asking import KEY, PROXY_VARIABLES
from tests.fake_upstream import (
    FakeUpstream,
    Fin,
    Hang,
    Pause,
    RecordedRequest,
    Repeat,
    Step,
    answer,
    done,
    error,
    finish,
    head,
    http_chunk,
    text,
    tls_pair,
)

ROOT = Path(__file__).resolve().parents[1]

PROLOGUE = """
    from gevent import monkey
    monkey.patch_all()
    import faulthandler
    faulthandler.dump_traceback_later(20, exit=True)  # where it hangs
    import gevent, json, psutil, sys, time
    from streamchat.cancellation import Cancellation
    from streamchat.errors import CallerGone, StreamChatError
    from streamchat.gevent_loop import GeventLoop
    from streamchat.loop import choose_loop
    from streamchat.settings import Settings
    from streamchat.ledger import Trail
    from streamchat.prompt import Prompt
    from streamchat.upstream import Upstream

    loop = choose_loop()
    assert isinstance(loop, GeventLoop)
    settings = json.loads(sys.argv[1])
    upstream = Upstream(Settings(public=True, **settings), loop, None)

    def open_reply(cancellation=None, message="hi", trail=None):
        prompt = Prompt([{"role": "user", "content": message}], "m", {})
        return upstream.open(upstream.client(), prompt, cancellation or Cancellation(), trail or Trail())

    def read_all(reply):
        events, until = [], time.monotonic() + 10
        while not events or events[-1].type != "finish":
            read = reply.read(until)
            assert read is not None
            events += read
        return events

    def ask(message="hi", cancellation=None):
        reply = open_reply(cancellation, message)
        try:
            return "".join(event.text for event in read_all(reply) if event.type == "text")
        finally:
            reply.close()

    def code_of(call):
        try:
            call()
        except StreamChatError as error:
            return error.code

    def tell(**facts):
        print(json.dumps(facts), flush=True)

    def wait_for_word():
        "Until the test has seen what it waits for."
        gevent.get_hub().threadpool.apply(sys.stdin.readline)

    def say_and_cancel(cancellation):
        tell(cancelled=time.monotonic())
        cancellation.cancel(CallerGone())

    def left():
        "TCP sockets that this process still has, once they had time to go."
        until = time.monotonic() + 3
        while (count := len(psutil.Process().net_connections("tcp"))) and time.monotonic() < until:
            gevent.sleep(0.01)
        return count
"""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    return tls_pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest, tls: tuple[ssl.SSLContext, Path]) -> Iterator[FakeUpstream]:
    with FakeUpstream(tls[0] if request.param == "tls" else None) as upstream:
        yield upstream


# A process each: what does not depend on the way is tried over two of the four.
EVERY_WAY = pytest.mark.parametrize(
    ("server", "http"), [(line, http) for line in ("plain", "tls") for http in ("fast", "sdk")], indirect=["server"]
)
TWO_WAYS = pytest.mark.parametrize(("server", "http"), [("tls", "fast"), ("plain", "sdk")], indirect=["server"])
TLS_ONLY = pytest.mark.parametrize("server", ["tls"], indirect=True)


@contextmanager
def script(base_url: str, authority: Path, body: str, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """The prologue and this body in a process that asks this base URL; its error output is empty at the end."""
    environ = {name: value for name, value in os.environ.items() if name.lower() not in PROXY_VARIABLES}
    environ |= {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": KEY, "SSL_CERT_FILE": str(authority)}
    source = textwrap.dedent(PROLOGUE) + textwrap.dedent(body)
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", source, json.dumps(settings)]
    with subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **PIPES) as process:
        try:
            yield process
            _, complaints = process.communicate(timeout=20)
            assert (process.returncode, complaints) == (0, "")
        finally:
            process.kill()


PIPES: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def give_word(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next facts that the script tells."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, complaints = process.communicate(timeout=20)
        raise AssertionError(complaints)
    facts: dict[str, Any] = json.loads(line)
    return facts


@TWO_WAYS
def test_answers_are_whole_and_connections_kept_and_let_go(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    body = """
        texts = {ask() for _ in range(100 if settings["http"] == "fast" else 5)}
        upstream.close()
        tell(texts=list(texts), left=left())
    """
    with script(server.base_url, tls[1], body, http=http) as process:
        assert told(process) == {"texts": ["Hello, world!"], "left": 0}
    assert server.connections <= 2 or http == "sdk"


@TWO_WAYS
def test_many_greenlets_get_their_own_answers(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    server.choose = lambda request: answer([request.message, "!"] * 3, pause=0.01)
    body = """
        def check(number):
            return ask(f"m{number}") == f"m{number}!" * 3

        jobs = [gevent.spawn(check, number) for number in range(60)]
        gevent.joinall(jobs)
        upstream.close()
        tell(right=[job.value for job in jobs].count(True), left=left())
    """
    with script(server.base_url, tls[1], body, http=http) as process:
        assert told(process) == {"right": 60, "left": 0}


@TWO_WAYS
def test_other_greenlets_run_while_one_waits_and_reads_end_in_time(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    whole = answer(["a", "b"])
    server.script = [whole[:3], Pause(0.6), whole[3:]]
    body = """
        ticks, gaps = [], []

        def tick():
            while True:
                ticks.append(time.monotonic())
                gevent.sleep(0.01)

        upstream.client()
        ticker = gevent.spawn(tick)
        reply = open_reply()
        events = []
        while not events:
            events += reply.read(time.monotonic() + 5)
        started = time.monotonic()
        timed_out = reply.read(started + 0.1) is None
        late = time.monotonic() - started - 0.1
        rest = [event.type for event in read_all(reply)]
        reply.close()
        ticker.kill()
        upstream.close()
        tell(timed_out=timed_out, late=late, rest=rest, ticks=len(ticks))
    """
    with script(server.base_url, tls[1], body, http=http) as process:
        facts = told(process)
    assert facts["timed_out"]
    assert 0 <= facts["late"] < 0.3
    assert facts["rest"] == ["text", "finish"]
    assert facts["ticks"] > 25


STATES: dict[str, Step] = {
    "before headers": Hang(),
    "before the first event": [head(), Hang()],
    "between pieces": [head(), text("a"), Hang()],
    "while pieces flow": [head(), Repeat([Pause(0.001), text("a")], 100_000)],
    "at full speed": [head(), Repeat(text("a") * 20, 100_000)],
    "before a retry": error(429, headers={"Retry-After": "3"}),
}


@EVERY_WAY
def test_a_hang_up_in_each_state_closes_the_upstream_within_50_ms_and_leaves_one_post(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    server.choose = lambda request: STATES[request.message]
    body = f"""
        upstream.client()
        for state in {list(STATES)!r}:
            for _ in range(5):
                cancellation = Cancellation()
                asking = gevent.spawn(code_of, lambda: ask(state, cancellation))
                wait_for_word()
                say_and_cancel(cancellation)
                asking.join(2)
                tell(code=asking.value, took=time.monotonic())
        upstream.close()
        tell(left=left())
    """
    with script(server.base_url, tls[1], body, http=http) as process:
        for number, state in enumerate(state for state in STATES for _ in range(5)):
            if number % 5 == 0:
                delays = []
            server.wait_for_requests(number + 1, 20)  # the first: once the process has started
            time.sleep(0.03)  # what follows the request is on its way
            give_word(process)
            cancelled = told(process)["cancelled"]
            ended = told(process)
            assert ended["code"] == "caller_left", state
            request: RecordedRequest = server.requests[number]
            closed = ended["took"] if state == "before a retry" else request.wait_left()
            delays.append(closed - cancelled)
            if number % 5 == 4:
                assert sorted(delays)[2] < 0.05, (state, delays)
        assert told(process) == {"left": 0}
    assert len(server.requests) == 5 * len(STATES)


@TWO_WAYS
def test_a_hang_up_from_the_loop_itself_works_too(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    """That is where the watch on the callers runs: nothing there may wait."""
    server.script = [head(), text("a"), Hang()]
    body = """
        cancellation = Cancellation()
        asking = gevent.spawn(code_of, lambda: ask("hi", cancellation))
        wait_for_word()
        timer = gevent.get_hub().loop.timer(0.01)
        timer.start(lambda: say_and_cancel(cancellation))
        asking.join(2)
        timer.close()
        upstream.close()
        tell(code=asking.value, left=left())
    """
    with script(server.base_url, tls[1], body, http=http) as process:
        server.wait_for_requests(1, 20)[0].wait_sent(len(head() + text("a")))
        give_word(process)
        cancelled = told(process)["cancelled"]
        assert told(process) == {"code": "caller_left", "left": 0}
    assert server.requests[0].wait_left() - cancelled < 0.1


@TLS_ONLY
@pytest.mark.parametrize("end", [Hang(), Repeat([Pause(0.005), http_chunk(b": trickle\n\n")], 1000)])
def test_an_end_that_does_not_come_after_done_costs_less_than_100_ms(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], end: Step
) -> None:
    server.script = [head(), text("a"), finish(), done(), end]
    body = """
        took = []
        for _ in range(3):
            reply = open_reply()
            read_all(reply)
            started = time.monotonic()
            reply.close()
            took.append(time.monotonic() - started)
        tell(median=sorted(took)[1])
    """
    with script(server.base_url, tls[1], body) as process:
        assert told(process)["median"] < 0.1


@TLS_ONLY
def test_a_pooled_connection_that_died_idle_costs_no_second_post(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path]
) -> None:
    body = """
        first = ask()
        tell(first=first)
        kept = next(iter(upstream.client()._client._transport._idle.values()))[0]
        while not kept.is_stale(time.monotonic(), 60):
            gevent.sleep(0.005)
        tell(second=ask())
        upstream.close()
    """
    with script(server.base_url, tls[1], body) as process:
        assert told(process) == {"first": "Hello, world!"}
        server.requests[0].wait_finished()
        server.close_idle()
        assert told(process) == {"second": "Hello, world!"}
    assert (len(server.requests), server.connections) == (2, 2)


ROWS: dict[str, tuple[Step, str]] = {
    "unauthorized": (error(401), "upstream_auth"),
    "overflow": (error(400, "context_length_exceeded"), "input_too_long"),
    "quota": (error(429, "insufficient_quota"), "upstream_quota"),
    "fails": (error(500), "upstream_error"),
    "cut": ([head(), text("a"), Fin()], "upstream_incomplete"),
    "html": (head(content_type="text/html"), "upstream_malformed"),
    "garbage": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "upstream_malformed"),
    "silent": (Hang(), "upstream_timeout"),
}


@TWO_WAYS
def test_faults_have_the_same_codes_under_gevent(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    server.choose = lambda request: ROWS[request.message][0]
    body = f"""
        upstream.client()
        tell(codes=[code_of(lambda: ask(row)) for row in {list(ROWS)!r}])
        upstream.close()
        tell(left=left())
    """
    with script(server.base_url, tls[1], body, http=http, max_retries=0, first_token_timeout=1) as process:
        assert told(process) == {"codes": [code for _, code in ROWS.values()]}
        assert told(process) == {"left": 0}


@TLS_ONLY
def test_bytes_without_end_do_not_starve_the_other_greenlets(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path]
) -> None:
    server.script = [head(), b"1;", Repeat(b"x" * 60_000, 1_000_000)]
    body = """
        cancellation = Cancellation()
        reply = open_reply(cancellation)
        started = time.monotonic()
        in_time = reply.read(started + 0.2) is None and time.monotonic() - started < 1
        gevent.spawn_later(0.1, cancellation.cancel, CallerGone())
        code = code_of(lambda: reply.read(time.monotonic() + 5))
        reply.close()
        tell(in_time=in_time, code=code)
    """
    started = time.monotonic()
    with script(server.base_url, tls[1], body) as process:
        assert told(process) == {"in_time": True, "code": "caller_left"}
    assert time.monotonic() - started < 10
