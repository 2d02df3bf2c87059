"""setup.cfg declares what is imported, the requirements files pin it with hashes, and name no place to get it from."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ["requirements.txt", "requirements-local.txt", "requirements-dev.txt"]
OURS = {"bench", "ops", "streamchat", "tests", "wsgi"}
# Imported by another name than it is installed by.
DISTRIBUTIONS = {"opentelemetry": "opentelemetry-api", "sseclient": "sseclient-py"}


def declared(key: str) -> dict[str, str]:
    """Name -> what else the line says, of install_requires or an extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    section = "options" if key == "install_requires" else "options.extras_require"
    lines = [line.strip() for line in config[section][key].splitlines()]
    matches = [re.match(r"([a-z0-9_-]+)(.*)", line) for line in lines if line and not line.startswith("#")]
    return {match[1]: match[2] for match in matches if match}


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE))


def imported(files: Iterable[Path]) -> set[str]:
    """The distributions that these files import, wherever in the file."""
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in found - OURS - set(sys.stdlib_module_names)}


def test_what_the_package_imports_it_declares() -> None:
    files = [*(ROOT / "streamchat").rglob("*.py"), ROOT / "wsgi.py", ROOT / "conf" / "gunicorn.conf.py"]
    # Each is asked for where a setting wants it.
    extras = {name for extra in ("background", "log", "metrics", "redis", "tracing") for name in declared(extra)}
    # The environment of somebody else's app may have it, ours need not.
    assert imported(files) - {"flask-sqlalchemy"} <= declared("install_requires").keys() | extras


def test_what_it_declares_it_imports_or_runs_on() -> None:
    assert declared("install_requires").keys() - imported((ROOT / "streamchat").rglob("*.py")) <= {"gunicorn"}


def test_what_the_tests_import_is_declared() -> None:
    wanted = imported((ROOT / "tests").rglob("*.py"))
    assert wanted <= declared("install_requires").keys() | declared("test").keys()


def test_serve_imports_nothing_but_the_standard_library_and_the_local_model() -> None:
    assert imported([ROOT / "serve", *(ROOT / "ops").glob("*.py")]) == {"xllamacpp"}


def test_nothing_has_an_upper_bound() -> None:
    lines = declared("install_requires") | declared("test") | declared("local")
    assert not [name for name, rest in lines.items() if re.search(r"<|==|~=", rest)]


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("requirements.txt", ["install_requires"]),
        ("requirements-local.txt", ["local"]),
        ("requirements-dev.txt", ["install_requires", "test"]),
    ],
)
def test_everything_declared_is_pinned(file: str, keys: list[str]) -> None:
    assert {name for key in keys for name in declared(key)} <= pins(file).keys()


def test_what_is_tested_is_what_is_deployed() -> None:
    tested = pins("requirements-dev.txt")
    assert {name: tested.get(name) for name in pins("requirements.txt")} == pins("requirements.txt")


@pytest.mark.parametrize("file", FILES)
def test_every_line_is_a_pin_a_hash_or_a_comment(file: str) -> None:
    lines = (ROOT / file).read_text().splitlines()
    allowed = r"|[a-z0-9-]+==[0-9][0-9a-z.]* \\|    --hash=sha256:[0-9a-f]{64}( \\)?| *#.*"
    assert [line for line in lines if not re.fullmatch(allowed, line)] == []
    assert len(pins(file)) == sum(1 for line in lines if re.match(r"[a-z0-9-]+==", line)) > 0


@pytest.mark.parametrize("file", FILES)
def test_no_comment_names_a_place(file: str) -> None:
    comments = re.findall(r"#.*", (ROOT / file).read_text())
    assert [comment for comment in comments if re.search(r"://|/\w+/|index-url(?<!no-emit-index-url)", comment)] == []


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_the_pins_are_whole_on_the_oldest_python(file: str) -> None:
    """Python 3.11.0 to 3.11.2, Debian's among them, need one for redis that later ones do not."""
    assert re.search(r"--python-version 3\.11 ", (ROOT / file).read_text())
    assert "async-timeout" in pins(file)
