"""What a deployment installs, requirements.txt and nothing else, starts and refuses as it should, with no test tool."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ops.environment import ensure
from tests.live.servers import Server, environment, free_port, running

# The first time of all it is made; `check` has done it before.
pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def python() -> Path:
    return ensure(ROOT / ".venv", ROOT / "requirements.txt")


@pytest.fixture(scope="module")
def server(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = [str(python), "-m", "gunicorn", "-c", "conf/gunicorn.conf.py", "-b", f"127.0.0.1:{port}", "wsgi:app"]
    folder = tmp_path_factory.mktemp("deployment")
    # Nothing listens there, and nothing of this asks.
    with running(command, port, folder, environment("http://127.0.0.1:9/v1"), "gunicorn") as started:
        yield started


def test_the_environment_holds_the_pins_and_nothing_else(python: Path) -> None:
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
    installed = {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in json.loads(listed.stdout)}
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    # What Python itself puts into a new environment; setuptools before 3.12.
    extra = installed.keys() - pins.keys()
    assert extra <= {"pip", "setuptools"}
    assert {name: installed[name] for name in installed.keys() - extra} == pins


def test_what_is_installed_lacks_nothing(python: Path) -> None:
    subprocess.run([str(python), "-m", "pip", "check"], check=True)


def test_it_takes_streams(server: Server) -> None:
    assert requests.get(f"{server.url}/api/healthz").status_code == 200


def test_it_refuses_a_request_in_the_form_of_all_refusals(server: Server) -> None:
    answer = requests.post(f"{server.url}/api/get-response", json={"message": ""})
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] == "invalid_request"
    assert answer.json()["request_id"] == answer.headers["X-Response-Id"]


def test_the_command_line_works_there(python: Path) -> None:
    command = [str(python), "-m", "flask", "--app", "wsgi", "streamchat", "settings"]
    result = subprocess.run(command, cwd=ROOT, env=environment("http://127.0.0.1:9/v1"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "STREAMCHAT_MODEL" in result.stdout
