"""conf/*.service: the right command, signals, limits, and a longer patience than the processes have with themselves."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from streamchat.settings import Settings

CONF = Path(__file__).parent.parent / "conf"
COMMANDS = {
    "web": "gunicorn -c conf/gunicorn.conf.py -b 127.0.0.1:8000 wsgi:app",
    "worker": "flask --app wsgi streamchat worker",
}


class _Unit(configparser.ConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr


def service(name: str) -> configparser.SectionProxy:
    unit = _Unit(interpolation=None)
    unit.read(CONF / f"streamchat-{name}.service")
    assert unit.sections() == ["Unit", "Service", "Install"]
    return unit["Service"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_unit_starts_what_the_readme_starts(name: str) -> None:
    assert service(name)["ExecStart"].partition("/bin/")[2] == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_systemd_waits_longer_than_a_stopping_process_takes(name: str) -> None:
    assert int(service(name)["TimeoutStopSec"]) >= Settings().grace + 20
    assert service(name)["KillSignal"] == "SIGTERM"
    # The master tells its workers itself; systemd kills what is left of the group.
    assert service(name)["KillMode"] == "mixed"


@pytest.mark.parametrize("name", COMMANDS)
def test_there_are_descriptors_for_all_answers(name: str) -> None:
    assert int(service(name)["LimitNOFILE"]) >= 2 * 16 * Settings().max_streams


def test_both_units_differ_in_what_they_start_alone() -> None:
    web, worker = dict(service("web")), dict(service("worker"))
    of_gunicorn = {"Type", "NotifyAccess", "ExecReload", "ExecStart"}
    assert {name for name in web.keys() | worker.keys() if web.get(name) != worker.get(name)} == of_gunicorn
