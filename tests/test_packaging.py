"""The wheel and the sdist carry what they should."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "build", "dist", "*.egg-info")
# As pip does it, without an environment of its own; setuptools changes sys.argv on its way.
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds both, made from a copy: the build writes beside its sources."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "checkout", ignore=LEFT_OUT)
    (folder / "dist").mkdir()
    for hook in ("build_sdist", "build_wheel"):
        command = [sys.executable, "-c", BUILD, hook, str(folder / "dist")]
        result = subprocess.run(command, cwd=folder / "checkout", capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Deprecat" not in result.stderr, result.stderr
    return folder / "dist"


def package_files() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "streamchat"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(listed.stdout.split())


def test_the_wheel_carries_every_file_of_the_package_and_no_other(built: Path) -> None:
    (wheel,) = built.glob("flask_streamchat-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "streamchat/py.typed" in names
    assert names == package_files()


def test_the_wheel_carries_the_licence_and_what_it_needs(built: Path) -> None:
    (wheel,) = built.glob("flask_streamchat-*.whl")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    assert [name for name in archive.namelist() if name.endswith("/LICENSE")]
    for line in (
        "Name: flask-streamchat",
        "Requires-Python: >=3.11",
        "Requires-Dist: gunicorn[gevent]>=27",
        "License: MIT",
    ):
        assert line in metadata.splitlines()


def test_the_sdist_carries_what_a_deployment_and_a_check_need(built: Path) -> None:
    (sdist,) = built.glob("flask_streamchat-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "wsgi.py",
        "serve",
        "check",
        "conf/nginx.conf",
        "conf/gunicorn.conf.py",
        "requirements.txt",
        "ops/serve.py",
    }
    assert wanted | {"tests/test_packaging.py", "README.md", "CHANGELOG.md", "ruff.toml"} <= names
