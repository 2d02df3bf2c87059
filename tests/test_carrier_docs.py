"""docs/carriers.md is true: both recipes take an answer in and make it, and its numbers are the code's.

Celery and RQ are fakes that keep what they are given: what they do with it themselves is not looked at here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from streamchat.background import BEAT, SWEEP_AFTER
from streamchat.carrier import KEPT, MOST_CARRIED, POPPERS, PREFIX, PUSHERS
from streamchat.settings import Settings
from tests.documents import blocks, read
from tests.fake_upstream import FakeUpstream, answer
from tests.shop import KEY, Shop

TEXT = read("carriers.md")
CELERY, RQ = blocks(TEXT)
JOB = {"message": "hi", "background": True}


class Broker:
    """Keeps ids until `work` hands them to the task."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.tasks: dict[str, Callable[[str], None]] = {}

    def push(self, task: str, id: str) -> None:
        assert task == "shop.make"
        self.ids.append(id)


class Task:
    def __init__(self, broker: Broker, name: str, function: Callable[[str], None]) -> None:
        broker.tasks[name] = function
        self._broker, self._name = broker, name

    def apply_async(self, args: tuple[str], retry: bool) -> None:
        assert not retry
        self._broker.push(self._name, *args)


def module(name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made


def celery(broker: Broker) -> ModuleType:
    class Celery:
        def __init__(self, main: str, broker: str) -> None:
            assert broker == "redis://127.0.0.1:9/1"

        def task(self, name: str, ignore_result: bool) -> Callable[[Callable[[str], None]], Task]:
            assert ignore_result
            return lambda function: Task(broker, name, function)

    return module("celery", Celery=Celery)


def rq(broker: Broker) -> ModuleType:
    class Queue:
        def __init__(self, name: str, connection: Any) -> None:
            pass

        def enqueue(self, task: str, id: str, job_timeout: int, result_ttl: int) -> None:
            assert job_timeout > Settings().total_timeout
            broker.push(task, id)

    return module("rq", Queue=Queue)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.script = answer(["Hello"])
        yield server


@pytest.mark.parametrize(("recipe", "fake"), [(CELERY, celery), (RQ, rq)], ids=["celery", "rq"])
def test_a_recipe_takes_an_answer_in_and_makes_it_once(
    recipe: str,
    fake: Callable[[Broker], ModuleType],
    upstream: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    broker = Broker()
    library = fake(broker)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setenv("BROKER_URL", "redis://127.0.0.1:9/1")
    monkeypatch.setenv("STREAMCHAT_STORE_URL", f"sqlite:///{tmp_path}/log.db")
    names: dict[str, Any] = {"__name__": "shop"}
    exec(compile(recipe, "carriers.md", "exec"), names)
    shop = Shop(names["app"])
    make = broker.tasks.get("shop.make", names["make"])
    try:
        response = shop.ask(json=JOB)
        assert response.status_code == 202, response.text
        [id] = broker.ids
        assert shop.mounts[0]._process is not None
        make(id)
        make(id)
        document = shop.app.test_client().get(f"/api/responses/{id}").json
    finally:
        shop.close()
    assert document is not None
    assert (document["status"], document["text"]) == ("completed", "Hello")
    assert len(upstream.requests) == 1


def test_to_import_a_recipe_begins_nothing_that_a_fork_would_lose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "celery", celery(Broker()))
    monkeypatch.setenv("BROKER_URL", "redis://127.0.0.1:9/1")
    monkeypatch.setenv("STREAMCHAT_STORE_URL", f"sqlite:///{tmp_path}/log.db")
    names: dict[str, Any] = {"__name__": "shop"}
    exec(compile(CELERY, "carriers.md", "exec"), names)
    [mount] = names["app"].extensions["streamchat"].values()
    assert mount._process is None


def test_the_numbers_are_the_codes() -> None:
    assert f"`{PREFIX}<name>`" in TEXT
    assert f"most {MOST_CARRIED:,} ids" in TEXT and "after an hour" in TEXT and KEPT == 3600
    assert f"keeps {POPPERS} connections" in TEXT and f"at most {PUSHERS}, beside" in TEXT
    assert BEAT == 1 and "at most 1 s: the worker looks once a second" in TEXT
    late = f"{SWEEP_AFTER:.0f} to {SWEEP_AFTER + BEAT:.0f} s"
    assert TEXT.count(late) == 3 and f"begin within {SWEEP_AFTER:.0f} s" in TEXT
