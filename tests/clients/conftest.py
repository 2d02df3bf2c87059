"""The clients' Node process, and servers for them: real gunicorns, one for each API that the fake upstream speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.clients.node import Node
from tests.clients.node import node as start_node
from tests.clients.upstream import script_of
from tests.fake_upstream import FakeUpstream
from tests.live.servers import Server, gunicorn

MODEL = "gpt-4.1-mini"
TOKEN = "token-of-ada"
SETTINGS: dict[str, Any] = {
    "gateway": "true",
    "max_retries": "0",
    "idle_timeout": "0.3",
    "status_hold": "2",
    "params": '["temperature", "max_output_tokens", "tools", "tool_choice", "seed"]',
}

# Servers with this one allow several answers and probabilities; the Responses API has neither.
NAMES_ALL = SETTINGS["params"].replace("]", ', "n", "logprobs", "top_logprobs"]')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.live)


@pytest.fixture(scope="package")
def node() -> Iterator[Node]:
    with start_node() as running:
        yield running


@pytest.fixture(scope="package")
def upstream_server() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture
def upstream(upstream_server: FakeUpstream) -> FakeUpstream:
    upstream_server.requests.clear()
    upstream_server.scripts.clear()
    upstream_server.choose = script_of
    return upstream_server


@pytest.fixture(scope="package")
def servers(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A server for each API of the upstream; "hasty" soon tells that it lives, "keeping" keeps answers.

    "tokens" wants one.
    """
    url = upstream_server.base_url
    special = {
        "hasty": {"status_hold": "0.1", "heartbeat": "0.05", "idle_timeout": "5"},
        "chat": {"upstream_api": "chat"},
        "keeping": {"store_url": "memory://", "on_disconnect": "finish"},
        "responses": {"upstream_api": "responses", "params": NAMES_ALL},
        "choices": {"params": NAMES_ALL},
        "tokens": {
            "tokens": f'{{"ada": "{TOKEN}"}}',
            "public": "false",
            "max_streams": "1",
            "system_prompt": "Be kind.",
        },
    }
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(gunicorn(url, tmp_path_factory.mktemp(name), **SETTINGS | own))
            for name, own in special.items()
        }
        yield started
        for server in started.values():
            server.terminate()  # all at once: each takes a moment to end
            assert "Traceback" not in server.log and "ERROR" not in server.log
            assert "sk-canary" not in server.log


@pytest.fixture(params=["chat", "responses"])
def api(request: pytest.FixtureRequest) -> str:
    """What the upstream speaks."""
    return str(request.param)


@pytest.fixture
def server(servers: dict[str, Server], api: str, upstream: FakeUpstream) -> Server:
    return servers[api]
