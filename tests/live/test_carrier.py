"""One server accepts, two workers of their own processes make: over one Redis, each answer once and in time."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamchat.carrier import POPPERS, PREFIX
from tests.fake_upstream import FakeUpstream, RecordedRequest, Step, answer
from tests.live.pair import look
from tests.live.servers import ROOT, Server, environment, gunicorn, wait_for
from tests.redis_server import RedisServer

pytestmark = pytest.mark.live

QUEUE = PREFIX + "streamchat"
START_SECONDS = 60.0  # two interpreters and a server at once
BEFORE_A_LOOK = 2.0  # seconds: what is begun sooner was carried
FOUND_WITHIN = 5.0
DRAINED_WITHIN = 4.0


@dataclass
class Shop:
    """A web server, two workers, their Redis and what the model was asked."""

    server: Server
    workers: list[subprocess.Popen[bytes]]
    redis: RedisServer
    upstream: FakeUpstream

    def accept(self, *messages: str) -> list[str]:
        """Their ids, by one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        ids = []
        for message in messages:
            body = json.dumps({"message": message, "background": True})
            connection.request("POST", "/api/get-response", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            document = json.loads(response.read())
            assert response.status == 202, document
            ids.append(document["id"])
        connection.close()
        return ids

    def completed(self, ids: list[str]) -> bool:
        return all(look(self.server, id)["status"] == "completed" for id in ids)

    def asked(self) -> Counter[str]:
        return Counter(request.message for request in self.upstream.requests)

    def popping(self) -> int:
        return sum(client["cmd"] == "brpop" for client in self.redis.connections())


def script_of(request: RecordedRequest) -> Step:
    return answer([request.message])


@contextmanager
def working(environ: Mapping[str, str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`flask --app wsgi streamchat worker`, ready."""
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "streamchat", "worker"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(environ), stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("carried")
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream())
        upstream.choose = script_of
        redis = stack.enter_context(RedisServer(folder))
        given = {"background": "true", "store_url": redis.url, "max_streams_per_user": "0"}
        environ = environment(upstream.base_url, **given)
        logs = [folder / f"worker-{number}.log" for number in range(2)]
        workers = [stack.enter_context(working(environ, log)) for log in logs]
        server = stack.enter_context(gunicorn(upstream.base_url, folder, **given))  # type: ignore[arg-type]
        wait_for(lambda: all("worker ready" in log.read_text() for log in logs), START_SECONDS, "two workers")
        made = Shop(server, workers, redis, upstream)
        wait_for(lambda: made.popping() == 2 * POPPERS, what="workers that wait for ids")
        yield made
        assert "Traceback" not in server.log + "".join(log.read_text() for log in logs)


@pytest.fixture(autouse=True)
def nothing_asked(shop: Shop) -> None:
    shop.upstream.requests.clear()


def test_fifty_answers_are_each_made_once_and_begun_before_a_look_would_find_them(shop: Shop) -> None:
    messages = [f"carried {number}" for number in range(50)]
    began = time.monotonic()
    ids = shop.accept(*messages)
    wait_for(lambda: sum(shop.asked().values()) == 50, what="all are asked for")
    took = time.monotonic() - began
    wait_for(lambda: shop.completed(ids), what="all are made")
    assert shop.asked() == Counter(messages)
    assert [look(shop.server, id)["text"] for id in ids] == messages
    assert took < BEFORE_A_LOOK
    assert shop.popping() == 2 * POPPERS


def test_answers_whose_messages_are_lost_are_made_within_five_seconds(shop: Shop) -> None:
    for worker in shop.workers:
        os.kill(worker.pid, signal.SIGSTOP)
    wait_for(lambda: not blocked(shop), what="pops that ended while their workers stood")
    messages = [f"lost {number}" for number in range(10)]
    ids = shop.accept(*messages)
    assert shop.redis.client.delete(QUEUE) == 1
    for worker in shop.workers:
        os.kill(worker.pid, signal.SIGCONT)
    wait_for(lambda: shop.completed(ids), FOUND_WITHIN, "all are made")
    assert shop.asked() == Counter(messages)


def blocked(shop: Shop) -> int:
    return int(shop.redis.client.info("clients")["blocked_clients"])


def test_a_redis_that_was_started_again_carries_again(shop: Shop) -> None:
    before = shop.accept("before")
    wait_for(lambda: shop.completed(before), what="the one before")
    shop.redis.kill()
    shop.redis.start()
    wait_for(lambda: shop.popping() == 2 * POPPERS, what="workers that wait for ids")
    messages = [f"after {number}" for number in range(10)]
    began = time.monotonic()
    ids = shop.accept(*messages)
    wait_for(lambda: sum(shop.asked().values()) == 11, what="all are asked for")
    assert time.monotonic() - began < BEFORE_A_LOOK
    wait_for(lambda: shop.completed(ids), what="all are made")
    assert shop.asked() == Counter(["before", *messages])


def test_a_worker_that_is_told_to_stop_leaves_the_ids_to_the_other(shop: Shop) -> None:
    """The last: it costs the others a worker."""
    stopping, other = shop.workers
    stopping.terminate()
    ids = shop.accept("while one stops")
    assert stopping.wait(DRAINED_WITHIN) == 0
    wait_for(lambda: shop.completed(ids), what="the one that came meanwhile")
    assert (other.poll(), shop.popping()) == (None, POPPERS)
    assert shop.asked() == Counter(["while one stops"])
