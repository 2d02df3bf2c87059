"""conf/nginx.conf by its text: nginx takes it, each line has its reason, its numbers fit gunicorn's and the app's."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ops import nginx_conf
from streamchat.settings import Settings

ROOT = Path(__file__).parent.parent
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "nginx"
TEXT = nginx_conf.SHIPPED.read_text()
SETTINGS = Settings(public=True)
# Blocks, and what they are there for; everything else says why it is there.
STRUCTURE = {"events", "http", "upstream", "server", "location", "map", "proxy_pass"}
# In time units, sizes and plain numbers of the file.
UNITS = {"s": 1, "k": 1024, "m": 1024**2, "": 1}


def directives() -> list[tuple[str, str, str]]:
    """(name, value, the line above) of each line that opens a directive."""
    lines = [line.strip() for line in TEXT.splitlines()]
    found = []
    for above, line in itertools.pairwise(["", *lines]):
        if match := re.match(r"([a-z_]+) ?(.*?) ?[;{]?$", line):
            found.append((match[1], match[2], above))
    return found


def number(name: str, nth: int = 0) -> int:
    values = [value for key, value, _ in directives() if key == name]
    match = re.search(r"(\d+)([skm]?)$", values[nth])
    assert match, values
    return int(match[1]) * UNITS[match[2]]


def gunicorn_constant(name: str) -> int:
    """Read, not imported: the file patches the process that imports it."""
    for node in ast.parse((ROOT / "conf" / "gunicorn.conf.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            value = ast.literal_eval(node.value)
            assert isinstance(value, int)
            return value
    raise AssertionError(f"conf/gunicorn.conf.py sets no {name}")


def check(conf: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [NGINX, "-t", "-e", str(folder / "error.log"), "-c", str(conf)]
    return subprocess.run(command, capture_output=True, text=True)


def test_nginx_takes_the_file_as_it_is(tmp_path: Path) -> None:
    result = check(nginx_conf.SHIPPED, tmp_path)
    assert "syntax is ok" in result.stderr, result.stderr
    # Nobody but root may write to its logs.
    assert (result.returncode == 0) == (os.geteuid() == 0), result.stderr
    assert "[warn]" not in result.stderr


@pytest.mark.parametrize("limits", [True, False])
def test_nginx_takes_a_copy_with_other_ports_and_paths_from_any_account(tmp_path: Path, limits: bool) -> None:
    folder = tmp_path / "with a space"
    copy = nginx_conf.write_copy(folder, listen="127.0.0.1:18080", upstream="127.0.0.1:18000", limits=limits)
    result = check(copy, folder)
    assert result.returncode == 0, result.stderr
    assert "[warn]" not in result.stderr


def test_a_copy_differs_in_ports_paths_and_account_alone(tmp_path: Path) -> None:
    copy = nginx_conf.write_copy(tmp_path, listen="127.0.0.1:18080", upstream="127.0.0.1:18000")
    shipped, copied = TEXT.splitlines(), copy.read_text().splitlines()
    changed = [line.split()[0] for line in shipped if line not in copied]
    assert changed == ["user", "pid", "error_log", "access_log", "server", "listen"]
    added = [line.split()[0] for line in copied if line not in shipped and line]
    assert sorted({*added} - {*changed}) == ["client_body_temp_path"]


def test_a_copy_without_limits_has_lost_these_lines_and_no_others(tmp_path: Path) -> None:
    def lines(limits: bool) -> list[str]:
        copy = nginx_conf.write_copy(tmp_path, listen="127.0.0.1:18080", upstream="127.0.0.1:18000", limits=limits)
        return copy.read_text().splitlines()

    without = lines(limits=False)
    lost = [line.strip() for line in lines(limits=True) if line not in without]
    assert lost == ["limit_conn streams 100;", "limit_req zone=requests burst=120 nodelay;"]


def test_a_line_that_a_copy_must_change_and_does_not_find_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped.conf"
    shipped.write_text(TEXT.replace("listen 80 ", "listen 81 "))
    monkeypatch.setattr(nginx_conf, "SHIPPED", shipped)
    with pytest.raises(ValueError, match="listen 80"):
        nginx_conf.write_copy(tmp_path, listen="127.0.0.1:18080", upstream="127.0.0.1:18000")


def test_every_directive_has_its_reason_above_it() -> None:
    """A comment, or a directive of the same family that has one: `proxy_read_timeout`, then `proxy_send_timeout`."""
    found = [entry for entry in directives() if entry[0] not in STRUCTURE]
    assert len(found) > 40
    bare = [
        name
        for name, _, above in found
        if not above.startswith("#") and name.split("_")[0] != re.split(r"[_ ]", above)[0]
    ]
    assert bare == []


@pytest.mark.parametrize(
    "line",
    [
        "proxy_buffering off;",
        "proxy_read_timeout 600s;",
        "proxy_send_timeout 600s;",
        "proxy_connect_timeout 5s;",
        "send_timeout 60s;",
        "proxy_http_version 1.1;",
        'proxy_set_header Connection "";',
        "proxy_next_upstream off;",
        "proxy_request_buffering on;",
        "gzip off;",
    ],
)
def test_what_streaming_rests_on_is_set_once(line: str) -> None:
    name = line.split()[0]
    lines = [other.strip() for other in TEXT.splitlines()]
    assert lines.count(line) == 1
    assert name == "proxy_set_header" or [other.split()[0] for other in lines if other].count(name) == 1


def test_nginx_waits_longer_than_the_longest_answer() -> None:
    assert number("proxy_read_timeout") > SETTINGS.total_timeout


def test_nginx_ends_a_stalled_caller_after_the_app_has_had_its_time() -> None:
    assert number("send_timeout") > SETTINGS.write_timeout


def test_nginx_lets_go_of_an_idle_connection_before_gunicorn_does() -> None:
    assert number("keepalive_timeout") + 10 <= gunicorn_constant("keepalive")


def test_idle_connections_and_streams_fit_into_gunicorns_connections() -> None:
    assert 12 * number("keepalive") <= gunicorn_constant("worker_connections") - SETTINGS.max_streams


def test_a_body_that_the_app_refuses_gets_as_far_as_the_app() -> None:
    assert SETTINGS.max_body_bytes < number("client_max_body_size") < 1.2 * SETTINGS.max_body_bytes


def test_the_longest_question_in_ascii_stays_in_memory() -> None:
    assert number("client_body_buffer_size") > SETTINGS.max_input_chars


def test_one_nginx_worker_can_hold_the_streams_of_two_gunicorn_workers() -> None:
    streams = 2 * SETTINGS.max_streams
    assert number("worker_connections") > 2 * streams
    assert number("worker_rlimit_nofile") >= 2 * number("worker_connections")


def test_one_address_cannot_take_all_streams_of_a_worker() -> None:
    assert number("limit_conn") * 9 <= SETTINGS.max_streams
