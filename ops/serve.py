"""`./serve`: this checkout as a running server, with a local model where no other is named, and nginx where wanted."""

import argparse
import ctypes
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from ops import local_model, nginx_conf
from ops.environment import EnvironmentFailure, ensure
from ops.services import ServiceFailure, Services, on_stop_signals

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".serve"
LOG = "answers.db"
WORKER = ("-m", "flask", "--app", "wsgi", "streamchat", "worker")
# The page tries for 15.5 s to take a broken answer up again. Who does not come back by then has left: the model is
# stopped, and not paid for until the end. Its Stop button stops the model at once.
ON_DISCONNECT = "20"

HELP = f"""Starts streamchat on this machine and for this machine: it listens on 127.0.0.1 only.

The first start makes .venv from requirements.txt. With neither OPENAI_API_KEY nor OPENAI_BASE_URL set it also
makes .venv-local and lets a small model answer that runs here ({local_model.NAME}, a download of 122 MB).
Every STREAMCHAT_... variable is passed on; without STREAMCHAT_TOKENS, STREAMCHAT_PUBLIC is set to true.
Answers are kept for a day in {STATE.name}/{LOG}, which only your account can read; STREAMCHAT_STORE_URL names
another log, and an empty one none. With a log a worker makes background answers, unless STREAMCHAT_BACKGROUND is
false.
Ctrl-C stops everything that was started; a second one does not wait for running answers."""


class PortTaken(Exception):
    """Another process listens where it was asked to."""


class ProgramMissing(Exception):
    """Names the package that has it."""


def main() -> None:
    options = _options()
    on_stop_signals(signal.default_int_handler)
    try:
        _serve(options)
    except (EnvironmentFailure, ServiceFailure, PortTaken, ProgramMissing) as failure:
        sys.exit(f"serve: {failure}")
    except KeyboardInterrupt:
        print("serve: stopped.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./serve", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, help="gunicorn's port (default: 8000, or the next free one)")
    parser.add_argument("--nginx", action="store_true", help="put nginx with conf/nginx.conf in front of gunicorn")
    parser.add_argument("--nginx-port", type=int, help="nginx's port (default: 8080, or the next free one)")
    return parser.parse_args()


def _serve(options: argparse.Namespace) -> None:
    nginx = find_nginx() if options.nginx else None
    port = choose_port(options.port, 8000)
    front = choose_port(options.nginx_port, 8080) if nginx else port
    python = ensure(ROOT / ".venv", ROOT / "requirements.txt")
    with Services(ROOT) as services:
        environment = _environment(services)
        if nginx:
            _start_nginx(services, nginx, front, port)
        server = ["-m", "gunicorn", "-c", "conf/gunicorn.conf.py", "-b", f"127.0.0.1:{port}", "wsgi:app"]
        services.start("gunicorn", [str(python), *server], environment)
        services.wait_until_healthy("gunicorn", port)
        if environment.get("STREAMCHAT_BACKGROUND", "").lower() in ("true", "1"):
            services.start("the worker", [str(python), *WORKER], environment)  # the settings are good
        if nginx:
            services.wait_until_healthy("nginx", front)
        print(_welcome(front, environment), flush=True)
        services.watch()


def _environment(services: Services) -> dict[str, str]:
    """gunicorn's: ours, and what a start on one's own machine needs beside it."""
    environment = dict(os.environ)
    if not environment.get("STREAMCHAT_TOKENS"):
        environment.setdefault("STREAMCHAT_PUBLIC", "true")
    # Whoever presses Ctrl-C waits for it; behind a load balancer two minutes are better, which is the default.
    environment.setdefault("STREAMCHAT_GRACE", "10")
    environment |= log_of(environment)
    if not (environment.get("OPENAI_API_KEY") or environment.get("OPENAI_BASE_URL")):
        environment |= _start_local_model(services)
    return environment


def log_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What is added so that answers are kept. An empty STREAMCHAT_STORE_URL is somebody's wish to keep none."""
    if "STREAMCHAT_STORE_URL" not in environment:
        STATE.mkdir(exist_ok=True)
        url = _own_log()
    else:
        url = environment["STREAMCHAT_STORE_URL"]
    wait = environment.get("STREAMCHAT_ON_DISCONNECT", ON_DISCONNECT if url else "")
    background = environment.get("STREAMCHAT_BACKGROUND") or ("" if not url or url.startswith("memory:") else "true")
    return {"STREAMCHAT_STORE_URL": url, "STREAMCHAT_ON_DISCONNECT": wait, "STREAMCHAT_BACKGROUND": background}


def _own_log() -> str:
    return f"sqlite:///{quote(str(STATE / LOG))}"


def _start_local_model(services: Services) -> dict[str, str]:
    """What the environment says of a model that runs here; first it is started."""
    find_openmp()
    python = ensure(ROOT / ".venv-local", ROOT / "requirements-local.txt", with_dependencies=False)
    key = {"OPENAI_API_KEY": secrets.token_hex(16)}
    model = services.start(
        "the local model", [str(python), str(ROOT / "ops" / "local_model.py")], os.environ | key, piped=True
    )
    ours = key | {"OPENAI_BASE_URL": f"{model.first_line()}/v1", "STREAMCHAT_MODEL": local_model.NAME}
    # A proxy that the machine has for the rest of the world does not reach this address.
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"]))
    # It seldom finds an end by itself.
    tokens = os.environ.get("STREAMCHAT_MAX_OUTPUT_TOKENS") or "512"
    return ours | {"NO_PROXY": no_proxy, "no_proxy": no_proxy, "STREAMCHAT_MAX_OUTPUT_TOKENS": tokens}


def find_openmp() -> None:
    """llama.cpp's wheel for Linux is linked to GCC's; slim images lack it. Known before 122 MB have come."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libgomp.so.1")
        except OSError:
            raise ProgramMissing(
                "The local model needs libgomp: install Debian's package libgomp1, or set OPENAI_API_KEY."
            ) from None


def find_nginx() -> str:
    # Debian keeps it where only root's PATH leads.
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ProgramMissing("There is no nginx on this machine: install Debian's package nginx.")
    return found


def _start_nginx(services: Services, nginx: str, front: int, port: int) -> None:
    copy = nginx_conf.write_copy(STATE / f"nginx-{front}", listen=f"127.0.0.1:{front}", upstream=f"127.0.0.1:{port}")
    services.start("nginx", nginx_conf.command(nginx, copy), os.environ)


def choose_port(wanted: int | None, default: int) -> int:
    if wanted is not None:
        if not _is_free(wanted):
            raise PortTaken(f"Port {wanted} is taken by another process.")
        return wanted
    for port in range(default, default + 100):
        if _is_free(port):
            return port
    raise PortTaken(f"The ports {default} to {default + 99} are all taken: name one with --port or --nginx-port.")


def _is_free(port: int) -> bool:
    """Binds as gunicorn and nginx do: a port that only waits for old connections to fade is free to them."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _welcome(port: int, environment: Mapping[str, str]) -> str:
    address = f"http://127.0.0.1:{port}"
    local = environment.get("STREAMCHAT_MODEL") == local_model.NAME
    model = f"{local_model.NAME}, on this machine; set OPENAI_API_KEY for OpenAI's" if local else "the one you have set"
    token = " -H 'Authorization: Bearer <token>'" if environment.get("STREAMCHAT_TOKENS") else ""
    body = """-d '{"message": "Tell me a story about the sea."}'"""
    return f"""
streamchat listens on {address}
page:  {address}/
model: {model}
ask:   curl -N {address}/api/get-response{token} -H 'Content-Type: application/json' {body}
{_kept(environment)}stop:  Ctrl-C
"""


def _kept(environment: Mapping[str, str]) -> str:
    """And how the log is summed from another shell: the command is the app's, which starts only with these settings."""
    if environment["STREAMCHAT_STORE_URL"] != _own_log():
        return ""
    seconds = environment.get("STREAMCHAT_RETENTION")
    long = f"{seconds} s" if seconds else "a day"
    return f"""\
kept:  answers, for {long}, in {STATE.name}/{LOG}; none where STREAMCHAT_STORE_URL is empty
sums:  OPENAI_API_KEY=x STREAMCHAT_PUBLIC=true STREAMCHAT_STORE_URL=sqlite:///{STATE.name}/{LOG} \\
       .venv/bin/flask --app wsgi streamchat usage
"""
