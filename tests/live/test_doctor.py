"""The doctor against real chains: each wrong nginx is found and named; the shipped one is fine, and other servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.live.hops import speak_http10
from tests.live.servers import ROOT, Server, flask_run, gunicorn, nginx

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]

SECRET = "the secret of this shop"
NOWHERE = "http://127.0.0.1:9/v1"  # nobody may ask the model
GAP = "2"
AT_A_TIME = 3  # chains that are examined side by side

Change = Callable[[str], str]


def replaced(old: str, new: str) -> Change:
    def change(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return change


buffering = replaced("proxy_buffering off;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;")
buffering_where_asked = replaced("proxy_buffering off;", "proxy_buffering on;")
keeping_the_header = replaced("proxy_pass_header X-Accel-Buffering;", "")


def as_debian_has_it(text: str) -> str:
    """Buffering and HTTP/1.0 are what nginx 1.22 does without being told."""
    return speak_http10(buffering_where_asked(text))


@dataclass(frozen=True)
class Chain:
    """`hops` are nginxes, the one nearest to the server first."""

    hops: tuple[Change | None, ...] = ()
    server: str = "gevent"


CHAINS = {
    "shipped": Chain((None,)),
    "flask run": Chain(server="flask run"),
    "gthread": Chain((None,), server="gthread"),
    "buffering on": Chain((buffering,)),
    "buffering on, but for the header": Chain((buffering_where_asked,)),
    "HTTP/1.0": Chain((speak_http10,)),
    "gzip": Chain((replaced("gzip off;", "gzip on; gzip_types *; gzip_min_length 0;"),)),
    "short read timeout": Chain((replaced("proxy_read_timeout 600s;", "proxy_read_timeout 1s;"),)),
    "ignore client abort": Chain(
        (replaced("proxy_buffering off;", "proxy_buffering off; proxy_ignore_client_abort on;"),)
    ),
    "double nginx": Chain((keeping_the_header, as_debian_has_it)),
}


@dataclass(frozen=True)
class Diagnosis:
    """What the command left: its exit status, and the JSON that it printed."""

    status: int
    document: dict[str, Any]
    log: str

    @property
    def broken(self) -> dict[str, str]:
        """Check -> finding."""
        return {each["check"]: each["finding"] for each in self.document["verdicts"] if each["level"] == "broken"}

    def words(self, check: str) -> str:
        (words,) = (each["words"] for each in self.document["verdicts"] if each["check"] == check)
        return str(words)


def doctor(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    own = {"SECRET_KEY": SECRET, "OPENAI_API_KEY": "sk-nobody", "STREAMCHAT_PUBLIC": "true"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMCHAT_", "OPENAI_"))}
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "streamchat", "doctor", url, *options]
    return subprocess.run(command, cwd=ROOT, env=kept | own, capture_output=True, text=True, check=False)


def started(server: str, folder: Path, stack: ExitStack) -> Server:
    if server == "flask run":
        # The secret of `flask run` comes from the environment of this process.
        return stack.enter_context(flask_run(NOWHERE, folder, diagnostics="true"))
    threads = ("-k", "gthread", "--threads", "30") if server == "gthread" else ()
    return stack.enter_context(gunicorn(NOWHERE, folder, *threads, extra={"SECRET_KEY": SECRET}, diagnostics="true"))


def examined(chain: Chain, folder: Path) -> Diagnosis:
    with ExitStack() as stack:
        server = front = started(chain.server, folder, stack)
        for change in chain.hops:
            front = stack.enter_context(nginx(front, folder, change=change))
        ended = doctor(f"{front.url}/api", "--gap", GAP, "--json")
        assert ended.stdout, ended.stderr
        return Diagnosis(ended.returncode, json.loads(ended.stdout), server.log)


@pytest.fixture(scope="module")
def diagnoses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Diagnosis]]]:
    """All chains, a few at a time: a test waits for its own."""
    before = os.environ.get("SECRET_KEY")
    os.environ["SECRET_KEY"] = SECRET
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(examined, chain, tmp_path_factory.mktemp("chain")) for name, chain in CHAINS.items()}
    if before is None:
        del os.environ["SECRET_KEY"]
    else:
        os.environ["SECRET_KEY"] = before


@pytest.mark.parametrize("name", ["shipped", "flask run", "gthread", "buffering on, but for the header"])
def test_nothing_breaks_streaming_there(diagnoses: dict[str, Future[Diagnosis]], name: str) -> None:
    found = diagnoses[name].result()
    assert (found.status, found.broken) == (0, {})
    assert "ERROR" not in found.log and "Traceback" not in found.log


def test_the_shipped_chain_has_not_even_advice(diagnoses: dict[str, Future[Diagnosis]]) -> None:
    found = diagnoses["shipped"].result()
    advice = [each["words"] for each in found.document["verdicts"] if each["level"] != "ok"]
    # How many files may be open is this machine's affair.
    assert [words for words in advice if "open files" not in words] == []
    assert found.document["proxies"] == ["nginx"]
    assert found.document["server"]["worker"] == "gevent"


WRONG = {
    "buffering on": {"a caller that stops reading": "buffered"},
    "HTTP/1.0": {"cut by a dying hop": "http10"},
    "gzip": {"compression": "compressed"},
    "short read timeout": {"silence": "silence"},
    "ignore client abort": {"hang-up": "hangup"},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_nginx_is_found_and_nothing_else_is(diagnoses: dict[str, Future[Diagnosis]], name: str) -> None:
    found = diagnoses[name].result()
    assert (found.status, found.broken) == (1, WRONG[name])
    (finding,) = WRONG[name].values()
    assert next(iter(found.document["remedies"][finding])) == "nginx"  # it has made itself known


def test_an_nginx_behind_an_nginx_is_found_by_what_it_holds_back(diagnoses: dict[str, Future[Diagnosis]]) -> None:
    found = diagnoses["double nginx"].result()
    assert found.status == 1
    for kind in ("text/event-stream", "text/plain", "application/x-ndjson"):
        assert found.broken[f"pieces, {kind}"] == "buffered"
        assert "X-Accel-Buffering was lost on the way" in found.words(f"pieces, {kind}")
    assert "proxy_pass_header X-Accel-Buffering" in found.document["remedies"]["buffered"]["nginx"]


def test_that_only_the_header_keeps_a_hop_from_buffering_is_advice(diagnoses: dict[str, Future[Diagnosis]]) -> None:
    found = diagnoses["buffering on, but for the header"].result()
    assert "X-Accel-Buffering: no alone" in found.words("a caller that stops reading")


def test_how_long_a_silence_lasted_is_told(diagnoses: dict[str, Future[Diagnosis]]) -> None:
    assert diagnoses["short read timeout"].result().words("silence").startswith("cut after 1.")


def test_a_caller_of_another_machine_gets_nothing_through_nginx_and_no_verdict(tmp_path: Path) -> None:
    with gunicorn(NOWHERE, tmp_path, extra={"SECRET_KEY": SECRET}, diagnostics="true") as server:
        closed = replaced("allow 127.0.0.1;", "")
        with nginx(server, tmp_path, change=closed) as front:
            ended = doctor(f"{front.url}/api")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "conf/nginx.conf" in ended.stderr
