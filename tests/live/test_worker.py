"""Background answers from a caller's side: a web server takes them, another process makes them and tells their ends."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fake_upstream import FakeUpstream, Gate, Hang, head, text
from tests.live.killed_app import APP
from tests.live.pair import LEASE, Model, Reading, looking, seqs, text_of, words
from tests.live.servers import Server, environment, gunicorn, wait_for
from tests.live.worker_process import Delivery, Receiver, WorkerProcess, started
from tests.redis_server import RedisServer

pytestmark = pytest.mark.live

QUEUES = ("shop", "drained")
NDJSON = "application/x-ndjson"
PROMPT = "canary system prompt: the cook is a spy"
SECONDS = 20.0
GRACE = 7.0  # of the worker that is drained: 5 of them are for what did not end by itself


@dataclass
class Shop:
    """`early` was accepted before the worker was started, `stopped` was cancelled then."""

    model: Model
    receiver: Receiver
    web: Server
    queues: str
    settings: dict[str, str]
    folder: Path
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    made_within: float = 0.0  # seconds from the worker's start until `early` was told

    def post(self, queue: str, message: str, **headers: str) -> requests.Response:
        body = {"message": message, "background": True}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return requests.post(f"{self.web.url}/{queue}/get-response", json=body, headers=named, timeout=SECONDS)

    def accept(self, queue: str, message: str) -> dict[str, Any]:
        return object_of(self.post(queue, message), 202)

    def look(self, queue: str, id: str) -> dict[str, Any]:
        return object_of(requests.get(f"{self.web.url}/{queue}/responses/{id}", timeout=SECONDS), 200)

    def cancel(self, queue: str, id: str) -> dict[str, Any]:
        return object_of(requests.post(f"{self.web.url}/{queue}/responses/{id}/cancel", timeout=SECONDS), 200)

    def watch(self, queue: str, id: str) -> Reading:
        return Reading(self.web.port, f"/{queue}/responses/{id}/stream", None, {})

    def wait_status(self, queue: str, id: str, status: str, seconds: float = SECONDS) -> None:
        wait_for(lambda: self.look(queue, id)["status"] == status, seconds, f"the status {status}")

    def wait_told(self, id: str) -> Delivery:
        """The webhook of an answer: the only one."""
        wait_for(lambda: bool(self.receiver.of(id)), SECONDS, "the webhook")
        (delivery,) = self.receiver.of(id)
        return delivery

    def hang(self, message: str) -> str:
        """A message whose answer never ends."""
        self.model.scripts[message] = [head(), *map(text, words(0, 3)), Hang()]
        return message

    @contextmanager
    def worker(self, queue: str, by_flask: bool = False, **settings: str) -> Iterator[WorkerProcess]:
        """Ready."""
        url, extra = self.model.fake.base_url, {"QUEUES": self.queues}
        given = self.settings | settings
        with started(url, self.folder, queue, app=APP, by_flask=by_flask, extra=extra, **given) as process:
            process.wait_ready()
            yield process


def object_of(response: requests.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    document = response.json()
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("worker")
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        model = Model(stack.enter_context(FakeUpstream()))
        urls = {queue: f"sqlite:///{folder}/{queue}.db" for queue in QUEUES}
        queues = json.dumps({queue: {"store_url": url} for queue, url in urls.items()})
        own = {"store_url": urls["shop"], "background": "true", "lease": str(LEASE), "system_prompt": PROMPT}
        settings = receiver.settings() | own
        url, extra = model.fake.base_url, {"QUEUES": queues}
        web = stack.enter_context(gunicorn(url, folder, app=APP, extra=extra, **settings))
        yield Shop(model, receiver, web, queues, settings, folder)


@pytest.fixture(scope="module")
def worker(shop: Shop) -> Iterator[WorkerProcess]:
    """Of the queue `shop`, in which two answers waited when it was started."""
    early, stopped = shop.model.say("early", words(0, 3)), shop.model.say("stopped", words(0, 3))
    shop.documents = {message: shop.accept("shop", message) for message in (early, stopped)}
    shop.documents["cancelled"] = shop.cancel("shop", shop.documents["stopped"]["id"])
    with shop.worker("shop", by_flask=True) as process:
        began = time.monotonic()
        shop.wait_status("shop", shop.documents["early"]["id"], "completed")
        shop.made_within = time.monotonic() - began
        yield process


def test_what_waits_is_queued_and_made_within_two_seconds_of_a_workers_start(shop: Shop, worker: WorkerProcess) -> None:
    accepted = shop.documents["early"]
    assert (accepted["status"], accepted["text"], accepted["usage"]) == ("queued", "", None)
    assert shop.made_within < 2, shop.made_within
    told = shop.wait_told(accepted["id"])
    assert (told.event["type"], told.event["data"]["created_at"]) == ("response.completed", accepted["created_at"])
    assert len(shop.model.asked("early")) == 1


def test_what_is_cancelled_in_its_queue_ends_at_once_and_no_model_is_asked(shop: Shop, worker: WorkerProcess) -> None:
    cancelled = shop.documents["cancelled"]
    assert (cancelled["status"], cancelled["error"]["code"]) == ("cancelled", "cancelled")
    assert shop.wait_told(cancelled["id"]).event["type"] == "response.cancelled"
    assert shop.model.asked("stopped") == []


def test_an_answer_is_watched_in_one_process_while_another_makes_it(shop: Shop, worker: WorkerProcess) -> None:
    gate = Gate()
    response = shop.post("shop", shop.model.say("watched", words(0, 3), gate, words(3, 6)))
    document = object_of(response, 202)
    assert response.headers["Location"] == f"/shop/responses/{document['id']}"
    assert response.headers["X-Response-Id"] == document["id"]
    with Reading(shop.web.port, response.headers["Location"] + "/stream", None, {}) as reading:
        assert text_of(reading.until(3)) == "".join(words(0, 3))
        assert shop.look("shop", document["id"])["status"] == "in_progress"
        gate.open()
        rest = reading.rest()
    assert (seqs(rest), rest[-1]["type"]) == ([4, 5, 6, 7], "finish")
    told = shop.look("shop", document["id"])
    assert (told["status"], told["text"]) == ("completed", "".join(words(0, 6)))
    event = shop.wait_told(document["id"]).event
    assert event["type"] == "response.completed"
    assert {key: event["data"][key] for key in ("id", "status", "usage")} == {
        key: told[key] for key in ("id", "status", "usage")
    }
    assert "text" not in event["data"]


def test_a_running_answer_is_cancelled_within_a_second(shop: Shop, worker: WorkerProcess) -> None:
    id = shop.accept("shop", shop.hang("cancelled"))["id"]
    with shop.watch("shop", id) as reading:
        reading.until(3)
        began = time.monotonic()
        shop.cancel("shop", id)
        (end,) = reading.rest()
    (asked,) = shop.model.asked("cancelled")
    assert asked.wait_left() - began < 1
    assert end["code"] == "cancelled"
    assert shop.look("shop", id)["status"] == "cancelled"
    assert shop.wait_told(id).event["type"] == "response.cancelled"


def test_an_idempotency_key_gives_the_same_answer_again(shop: Shop, worker: WorkerProcess) -> None:
    message = shop.model.say("with a key", words(0, 3))
    first, second = (shop.post("shop", message, Idempotency_Key="k1") for _ in range(2))
    assert object_of(second, 202)["id"] == first.json()["id"] == second.headers["X-Response-Id"]
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert shop.post("shop", "another message", Idempotency_Key="k1").status_code == 422
    shop.wait_status("shop", first.json()["id"], "completed")
    assert len(shop.model.asked(message)) == 1
    assert shop.wait_told(first.json()["id"]).event["type"] == "response.completed"


def test_the_worker_writes_one_line_for_each_answer_and_no_secrets(shop: Shop, worker: WorkerProcess) -> None:
    document = shop.accept("shop", shop.model.say("in the log", words(0, 3)))
    told = shop.wait_told(document["id"])
    wait_for(lambda: told.id in worker.log, what="the line of the webhook")
    (record,) = [record for record in worker.records() if record["id"] == document["id"]]
    assert record["outcome"] == "completed"
    assert len({record["id"] for record in worker.records()}) == len(worker.records())
    assert document["id"] not in shop.web.log
    key, secret = environment("")["OPENAI_API_KEY"], shop.receiver.secret
    for canary in (key, secret, secret.removeprefix("whsec_"), PROMPT, "in the log", "w0", "Traceback", "ERROR"):
        assert canary not in worker.log


def test_term_lets_answers_end_and_a_second_one_does_not_wait(shop: Shop) -> None:
    """What does not end is interrupted; what was not begun is made by the next worker, which tells all ends."""
    gate = Gate()
    ends = shop.accept("drained", shop.model.say("ends", words(0, 3), gate, words(3, 6)))["id"]
    hangs = shop.accept("drained", shop.hang("hangs"))["id"]
    with shop.worker("drained", grace=str(GRACE)) as first:
        shop.model.fake.wait_for(lambda: len(shop.model.asked("ends") + shop.model.asked("hangs")) == 2, SECONDS)
        first.terminate()
        waits = shop.accept("drained", shop.model.say("waits", words(0, 3)))["id"]
        gate.open()
        assert first.wait_ended(GRACE + 2) == 0, first.log
    looks = {id: shop.look("drained", id) for id in (ends, hangs, waits)}
    assert [looks[id]["status"] for id in (ends, hangs, waits)] == ["completed", "failed", "queued"]
    assert looks[hangs]["error"]["code"] == "interrupted"
    with shop.worker("drained") as second, looking(f"sqlite:///{shop.folder}/drained.db") as store:
        shop.wait_status("drained", waits, "completed")
        types = [shop.wait_told(id).event["type"] for id in (ends, hangs, waits)]
        assert types == ["response.completed", "response.failed", "response.completed"]
        again = shop.accept("drained", shop.hang("hangs on"))["id"]
        shop.model.fake.wait_for(lambda: len(shop.model.asked("hangs on")) == 1, SECONDS)
        second.terminate()
        with pytest.raises(subprocess.TimeoutExpired):  # it has 120 s
            second.process.wait(0.5)
        second.terminate()
        assert second.wait_ended() == 0, second.log
        assert store.gauges()["live"] == 0
    assert shop.look("drained", again)["error"]["code"] == "interrupted"
    for message in ("ends", "hangs", "waits", "hangs on"):
        assert len(shop.model.asked(message)) == 1


def test_a_worker_whose_redis_is_away_waits_for_it(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    settings = {"store_url": redis.url, "background": "true", "lease": str(LEASE)}
    with started("http://127.0.0.1:9/v1", tmp_path, **settings) as worker:  # type: ignore[arg-type]
        worker.wait_ready()
        wait_for(lambda: "the response log does not answer" in worker.log, what="a word of the log")
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(0.5)
        with redis, looking(redis.url) as store:
            wait_for(lambda: store.gauges()["owners"] == 1, what="the worker's lease")
        worker.terminate()
        assert worker.wait_ended() == 0, worker.log
    assert "Traceback" not in worker.log
