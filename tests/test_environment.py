"""A requirements file becomes an environment of exactly that; a failure is one sentence, and is not taken for done."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ops.environment import STAMP, EnvironmentFailure, ensure

ROOT = Path(__file__).parent.parent


def wheel(folder: Path, name: str, needs: str = "") -> Path:
    """The smallest one that pip takes."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


def requirements(folder: Path, *wheels: Path, digest: str | None = None) -> Path:
    lines = [f"{path} --hash=sha256:{digest or hashlib.sha256(path.read_bytes()).hexdigest()}" for path in wheels]
    file = folder / "requirements.txt"
    file.write_text("\n".join(lines))
    return file


def has(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0


def command(folder: Path, file: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "ops.environment", str(folder), str(file)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)


def test_it_is_made_once_and_anew_when_the_file_changes(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    first, second = wheel(tmp_path, "first"), wheel(tmp_path, "second", "Requires-Dist: not-to-be-had-anywhere\n")
    file = requirements(tmp_path, first)
    making, keeping = command(folder, file), command(folder, file)
    # `check` takes what is printed for a path.
    assert making.stdout == keeping.stdout == f"{folder}/bin/python\n"
    assert "Making environment from requirements.txt" in making.stderr
    assert keeping.stderr == ""
    python = folder / "bin" / "python"
    assert has(python, "first")
    assert ensure(folder, requirements(tmp_path, second), with_dependencies=False) == python
    assert has(python, "second")
    assert not has(python, "first")


def test_a_file_that_is_not_what_was_pinned_is_refused_and_tried_again(tmp_path: Path) -> None:
    folder, first = tmp_path / "environment", wheel(tmp_path, "first")
    with pytest.raises(EnvironmentFailure, match=r"pip could not install requirements\.txt; is the package index"):
        ensure(folder, requirements(tmp_path, first, digest="0" * 64))
    # Ours, and not done.
    assert (folder / STAMP).read_text() == ""


def test_an_environment_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(EnvironmentFailure, match=r"was not made by \./serve or \./check: move it away"):
        ensure(folder, requirements(tmp_path))
    assert (folder / "precious").exists()


def test_a_python_without_ensurepip_is_told_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFailure, match="install Debian's package python3-venv"):
        ensure(tmp_path / "environment", requirements(tmp_path))
    assert not (tmp_path / "environment").exists()


def test_the_command_ends_with_one_sentence_when_it_fails(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    folder.mkdir()
    result = command(folder, requirements(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert result.stderr.startswith(str(folder))
