"""A requirements file with hashes becomes a virtual environment of exactly that, made anew when the file changes."""

import contextlib
import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STAMP = "made-from.sha256"


class EnvironmentFailure(Exception):
    """Says in one sentence what is missing."""


def ensure(folder: Path, requirements: Path, *, with_dependencies: bool = True) -> Path:
    """The environment's Python. Costs a hash of the file where nothing has changed."""
    python = folder / "bin" / "python"
    with _alone(folder):
        wanted = _digest(requirements)
        if not (python.exists() and _read(folder / STAMP) == wanted):
            _make(folder, python, requirements, with_dependencies)
            (folder / STAMP).write_text(wanted)
    return python


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two starts at once must not build the same folder."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(requirements: Path) -> str:
    """Of the pins and of the Python that they were installed for."""
    made_for = f"{sys.version}\n{sys.base_prefix}\n".encode()
    return hashlib.sha256(made_for + requirements.read_bytes()).hexdigest()


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _make(folder: Path, python: Path, requirements: Path, with_dependencies: bool) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        raise EnvironmentFailure("This Python cannot make environments: install Debian's package python3-venv.")
    _clear(folder)
    print(f"Making {folder.name} from {requirements.name} (once; again when it changes) ...", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(folder)], f"Python could not make the environment {folder}")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    install += ["--require-hashes", "--requirement", str(requirements)]
    if not with_dependencies:
        install.append("--no-deps")
    _run(install, f"pip could not install {requirements.name}; is the package index reachable?")


def _clear(folder: Path) -> None:
    """An empty stamp says that we are at it; a folder without any is somebody else's."""
    if folder.exists():
        if not (folder / STAMP).exists():
            raise EnvironmentFailure(f"{folder} was not made by ./serve or ./check: move it away first.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / STAMP).touch()


def _run(command: list[str], failure: str) -> None:
    """What the command says on its way goes to stderr: a caller may read our stdout."""
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise EnvironmentFailure(failure)


def main() -> None:
    """`python3 -m ops.environment FOLDER REQUIREMENTS [--no-deps]` prints the environment's Python."""
    folder, requirements, *options = sys.argv[1:]
    try:
        print(ensure(Path(folder).absolute(), Path(requirements), with_dependencies="--no-deps" not in options))
    except EnvironmentFailure as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    main()
