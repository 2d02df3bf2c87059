"""`flask streamchat worker` as a process of its own, ended by its process id; and an endpoint that takes webhooks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from standardwebhooks.webhooks import Webhook

from streamchat.webhooks import new_secret, verify
from streamchat.worker import command as worker_command
from tests.live.servers import ROOT, Server, environment, wait_for

READY = "worker ready for"
END_SECONDS = 10.0


class WorkerProcess(Server):
    """It listens nowhere: its port is 0."""

    def wait_ready(self, seconds: float = 60.0) -> None:
        wait_for(lambda: READY in self.log or self.process.poll() is not None, seconds, "a worker")
        assert self.process.poll() is None, self.log

    def wait_ended(self, seconds: float = END_SECONDS) -> int:
        """Its exit status."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def started(
    base_url: str,
    folder: Path,
    *arguments: str,
    app: str = "wsgi:app",
    by_flask: bool = False,
    extra: Mapping[str, str] | None = None,
    **settings: str,
) -> Iterator[WorkerProcess]:
    """In a group of its own. `arguments` are names of blueprints, none for all; `settings` STREAMCHAT_....

    Without `by_flask` what flask's command executes is started at once: it would import the app only to find that out.
    """
    command = worker_command(app, arguments)
    if by_flask:
        mounts = [word for name in arguments for word in ("--mount", name)]
        command = [sys.executable, "-m", "flask", "--app", app, "streamchat", "worker", *mounts]
    log_file = folder / f"worker-{time.monotonic_ns()}.log"
    environ = environment(base_url, **settings) | dict(extra or {})
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    worker = WorkerProcess(process, 0, log_file)
    try:
        yield worker
    finally:
        if process.poll() is None:
            worker.kill()


# --- the receiver -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delivery:
    """One POST of a webhook. `event` is what two verifiers agree on."""

    path: str
    id: str
    body: bytes
    event: dict[str, Any]

    @property
    def answer(self) -> str:
        return str(self.event["data"]["id"])


class Receiver:
    """Verifies what comes by our own `verify` and by the package standardwebhooks, and answers 204.

    `before_reply` is called with each delivery. `faults` holds what could not be verified, and is empty at the end.
    """

    def __init__(self) -> None:
        self.secret = new_secret()
        self.deliveries: list[Delivery] = []
        self.faults: list[BaseException] = []
        self.before_reply: Callable[[Delivery], object] = lambda _: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="receiver")

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def settings(self, path: str = "/hook") -> dict[str, str]:
        """STREAMCHAT_... of whoever sends webhooks here."""
        secrets = json.dumps([self.secret])
        return {"webhook_url": self.url(path), "webhook_loopback": "true", "webhook_secrets": secrets}

    def of(self, answer: str) -> list[Delivery]:
        return [delivery for delivery in list(self.deliveries) if delivery.answer == answer]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self.faults and kind is None:
            raise self.faults[0]

    def _taken(self, path: str, headers: Mapping[str, str], body: bytes) -> None:
        event = verify(body, headers, self.secret)
        assert Webhook(self.secret).verify(body, dict(headers)) == event
        delivery = Delivery(path, headers["webhook-id"], body, event)
        self.deliveries.append(delivery)
        self.before_reply(delivery)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                with contextlib.suppress(ConnectionError):  # its sender was killed
                    if len(body := self.rfile.read(length)) == length:
                        self.tell(body)
                        self.send_response(204)
                        self.end_headers()

            def tell(self, body: bytes) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                try:
                    receiver._taken(self.path, headers, body)
                except Exception as fault:  # raised again where the test ends
                    receiver.faults.append(fault)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        return Handler
