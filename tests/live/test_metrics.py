"""The figures of gunicorn's workers are one set: they add up over workers, and outlive a worker that dies."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_upstream import FakeUpstream, Hang, answer, head, text
from tests.live.servers import ROOT, Server, gunicorn, wait_for

pytestmark = [pytest.mark.live]

ENDED = "streamchat_answers_total gen_ai_request_model=gpt-4.1-mini outcome=completed"
BEGUN = "streamchat_answers_started_total gen_ai_request_model=gpt-4.1-mini"
MOST = 900  # of a worker
STREAMS = 8


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        server.script = answer(["Hello"])
        yield server


def scraped(server: Server) -> dict[str, float]:
    """By a connection of its own: any worker may answer."""
    response = requests.get(f"{server.url}/metrics", timeout=10)
    assert response.status_code == 200, response.text
    return {
        " ".join([sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def folder_of(server: Server) -> Path:
    """Where the workers count, as one of them has it in its environment."""
    (worker, *_) = server.workers()
    environ = Path(f"/proc/{worker}/maps").read_text()
    found = re.search(r"(/\S*)/[a-z]+_?[a-z]*_\d+\.db", environ)
    assert found is not None
    return Path(found[1])


def makers(server: Server) -> set[int]:
    """The workers that made the answers so far."""
    return {int(pid) for pid in re.findall(r"\[(\d+)\] INFO streamchat: answer ", server.log)}


@contextmanager
def asking(server: Server) -> Iterator[http.client.HTTPResponse]:
    """A caller that reads what there is so far."""
    caller = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    caller.request("POST", "/api/get-response", b'{"message": "hi"}', {"Content-Type": "application/json"})
    response = caller.getresponse()
    assert response.read(3) == b"Hel"
    try:
        yield response
    finally:
        caller.close()


def ask_until(server: Server, is_enough: Callable[[], bool]) -> int:
    for count in range(1, 200):
        assert requests.post(f"{server.url}/api/get-response", json={"message": "hi"}, timeout=10).text == "Hello"
        if is_enough():
            return count
    raise AssertionError("one worker got them all")


def test_figures_add_up_over_workers_and_outlive_one(upstream: FakeUpstream, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/log.db"
    with gunicorn(upstream.base_url, tmp_path, "-w", "2", metrics="true", store_url=store) as server:
        wait_for(
            lambda: scraped(server)["streamchat_most_live_answers"] == 2 * MOST, seconds=30, what="the second's gauges"
        )
        count = ask_until(server, lambda: len(makers(server)) == 2)
        # An answer is counted when its caller has all of it already.
        wait_for(lambda: scraped(server).get(ENDED) == count, what="the last answer's count")
        wait_for(lambda: scraped(server)["streamchat_store_live"] == 0, what="the last answer's end")
        told = [scraped(server) for _ in range(6)]  # by either worker
        assert {each[ENDED] for each in told} == {count}
        assert {(each["streamchat_store_answers"], each["streamchat_store_owners"]) for each in told} == {(count, 2)}
        with ExitStack() as callers:
            upstream.script = [head(), text("Hel"), Hang()]
            for _ in range(STREAMS):
                callers.enter_context(asking(server))
            wait_for(lambda: scraped(server)["streamchat_live_answers"] == STREAMS, what="all live answers")
            assert scraped(server)["streamchat_upstream_connections state=active"] == STREAMS
            for worker in server.workers():
                kill(server, worker)
        wait_for(
            lambda: scraped(server)["streamchat_live_answers"] == 0,
            seconds=30,
            what="the end of the dead workers' answers",
        )
        wait_for(
            lambda: scraped(server)["streamchat_most_live_answers"] == 2 * MOST,
            seconds=30,
            what="the gauges of the living",
        )
        upstream.script = answer(["Hello"])
        again = ask_until(server, lambda: True)
        wait_for(lambda: scraped(server)[ENDED] == count + again, what="the last answer's count")
        told = [scraped(server) for _ in range(6)]
        assert {each[ENDED] for each in told} == {count + again}
        assert {each[BEGUN] for each in told} == {count + STREAMS + again}  # those that died with a worker, too
        folder = folder_of(server)
        assert folder.stat().st_mode & 0o777 == 0o700
        server.terminate()
        server.process.wait(20)
    assert not folder.exists()


def kill(server: Server, worker: int) -> None:
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: worker not in server.workers() and len(server.workers()) == 2, seconds=30, what="another worker")


def test_threads_count_too_and_a_folder_that_is_named_is_used_and_kept(upstream: FakeUpstream, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    extra = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    threads = ("-k", "gthread", "--threads", "4")
    with gunicorn(upstream.base_url, tmp_path, *threads, extra=extra, metrics="1") as server:
        ask_until(server, lambda: True)
        wait_for(lambda: scraped(server).get(ENDED) == 1, what="the answer's count")
        assert folder_of(server) == folder
        server.terminate()
        server.process.wait(20)
    left = {path.name.split("_")[0] for path in folder.iterdir()}
    assert {"counter", "histogram"} <= left and not list(folder.glob("gauge_live*"))


MASTER = """
import os, runpy, types
conf = types.SimpleNamespace(**runpy.run_path("conf/gunicorn.conf.py"))
server = types.SimpleNamespace(cfg=types.SimpleNamespace(uid=os.geteuid(), gid=os.getegid()))
name, folders = "PROMETHEUS_MULTIPROC_DIR", []

def start(wanted, named=""):
    os.environ.update({"STREAMCHAT_METRICS": wanted, name: named})
    conf.share_figures(server)
    return os.environ[name]

assert start("") == start("false") == ""
assert start("true", "/named") == "/named"
first, second = start("true"), start("1", "/tmp/streamchat-metrics-1-inherited")
assert first != second and os.path.isdir(first) and os.path.isdir(second)
conf.on_exit(server)
assert os.path.isdir(first) and not os.path.exists(second)
os.environ[name] = first
conf.on_exit(server)
os.environ[name] = os.environ["TMPDIR"]
conf.on_exit(server)
assert os.listdir(os.environ["TMPDIR"]) == []

os.environ.update({name: "", "STREAMCHAT_METRICS": "true", "STREAMCHAT_HEARTBEAT": "never"})
server.app = types.SimpleNamespace(app_uri="wsgi:app")
try:
    conf.on_starting(server)
except SystemExit as refused:
    assert "STREAMCHAT_HEARTBEAT" in str(refused)
assert os.environ[name] and os.listdir(os.environ["TMPDIR"]) == []
"""


def test_a_master_makes_a_folder_of_its_own_and_leaves_none_behind(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", MASTER], cwd=ROOT, env=environ, check=True, timeout=60)
