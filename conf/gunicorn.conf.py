"""gunicorn for streams: gevent workers that hold many open answers, and end them truthfully when they stop.

    gunicorn -c conf/gunicorn.conf.py -b 127.0.0.1:8000 wsgi:app

Anything here can be overridden on gunicorn's command line.
"""

from __future__ import annotations

# First of all: what is imported before the patch keeps blocking sockets, and TLS to the upstream then fails.
from gevent import monkey

monkey.patch_all()

import contextlib  # noqa: E402
import gc  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from typing import Any, ClassVar  # noqa: E402

import gevent  # noqa: E402
from gunicorn import glogging  # noqa: E402

worker_class = "gevent"
workers = int(os.environ.get("WEB_CONCURRENCY", os.cpu_count() or 1))

# One connection is one greenlet; answers take at most nine tenths, the rest is for health checks and idle connections.
worker_connections = 1000
ANSWERS_OF_TEN = 9
FILES_A_STREAM = 2  # the caller's socket and the upstream's
OTHER_FILES = 256  # idle connections to the upstream, logs, libraries

# nginx keeps idle connections for 60 s. If gunicorn closed first, a POST on such a connection would be lost.
keepalive = 75

# A worker that is told to stop has this long. Answers that cannot end by then get the error `draining` before that.
try:
    graceful_timeout = int(float(os.environ.get("STREAMCHAT_GRACE") or 120))
except ValueError:
    graceful_timeout = 120  # on_starting says what is wrong with the value
# The master kills when its clock ends. A worker's own clock starts up to a second later, and it needs two to end.
WORKER_MARGIN = 3
# Answers are told before that: the stop is seen up to a second later, a second after it each whose time is up is told,
# and a second later the worker sees that all are gone.
MARGIN = min(10.0, max(WORKER_MARGIN + 3.0, graceful_timeout / 4))

# A stopping worker answers one more request on each kept-alive connection, with 503, and closes those that send none
# for so long: gunicorn's threaded worker has the same 2 s. By itself a gevent worker waits for all of `keepalive`.
LINGER = 2.0

# Recycling by request count closes the door first and waits for the longest stream: an outage, not a hygiene.
max_requests = 0
# HTTP/2 under gevent serves the streams of one connection one after the other. nginx speaks it to browsers.
http_protocols = "h1"
# One control socket for all gunicorns of a user: they would steal it from each other.
control_socket_disable = True


class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's own, but for its access log: a logconfig_dict turns it on for everybody, and it costs each request.

    nginx has one, and each answer has its record. `--access-logfile -` turns it on.
    """

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        if self.cfg.accesslog:
            super().access(resp, req, environ, request_time)


logger_class = Logger

# The line of each answer is logged by `streamchat` at INFO, which logging would drop by default. httpx2 and openai
# would log the upstream's address with every request: warnings only.
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s [%(process)d] %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "loggers": {
        # Without a level here it is the one of --log-level.
        "gunicorn.error": {"handlers": ["stderr"], "propagate": False},
        "gunicorn.access": {"level": "INFO", "handlers": ["stderr"], "propagate": False},
        "streamchat": {"level": "INFO", "handlers": ["stderr"], "propagate": False},
        "httpx2": {"level": "WARNING"},
        "httpcore2": {"level": "WARNING"},
        "openai": {"level": "WARNING"},
    },
}


def on_starting(server: Any) -> None:
    """Ends at once, with one sentence, where the app could not start: workers would only die one after the other."""
    share_figures(server)  # before anything imports prometheus_client, which looks once
    if server.app.app_uri == "wsgi:app":
        from streamchat.errors import SettingsError
        from streamchat.mount import check_environ

        try:
            check_environ(os.environ)
        except SettingsError as error:
            on_exit(server)
            sys.exit(f"streamchat cannot start: {error}")
    fit_files(server)


# The workers' figures stand in files of one folder, by which each can tell those of all; see docs/operations.md.
FIGURES = "PROMETHEUS_MULTIPROC_DIR"
FOLDER = "streamchat-metrics-"


def share_figures(server: Any) -> None:
    """Makes the folder, a new one at each start, unless one is named. A master that follows another inherits its
    folder's name, and makes its own.
    """
    named = os.environ.get(FIGURES, "")
    wanted = os.environ.get("STREAMCHAT_METRICS", "").lower() in ("true", "1")
    if wanted and (not named or os.path.basename(named).startswith(FOLDER)):
        os.environ[FIGURES] = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-")
        os.chown(os.environ[FIGURES], server.cfg.uid, server.cfg.gid)


def child_exit(server: Any, worker: Any) -> None:
    """What a worker counted stays; what it held is gone with it."""
    if os.environ.get(FIGURES):
        with contextlib.suppress(ImportError, OSError):
            from prometheus_client.multiprocess import mark_process_dead

            mark_process_dead(worker.pid)


def on_exit(server: Any) -> None:
    """The folder goes with the master that made it."""
    folder = os.environ.get(FIGURES, "")
    if os.path.basename(folder).startswith(f"{FOLDER}{os.getpid()}-"):
        shutil.rmtree(folder, ignore_errors=True)


def fit_files(server: Any) -> None:
    """Raises the limit of open files as far as it goes, and takes fewer connections where that is not enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = server.cfg.worker_connections
    fitting = wanted if hard == resource.RLIM_INFINITY else (hard - OTHER_FILES) // FILES_A_STREAM
    if fitting < wanted:
        server.cfg.set("worker_connections", max(1, fitting))
        server.log.warning(
            "The limit of %d open files allows %d connections a worker, not %d: raise it (ulimit -n, LimitNOFILE).",
            hard,
            max(1, fitting),
            wanted,
        )


def post_fork(server: Any, worker: Any) -> None:
    """Only the worker's copy: its own clock must end before the master's, or its answers die without cleanup."""
    worker.cfg.set("graceful_timeout", max(1, server.cfg.graceful_timeout - WORKER_MARGIN))


class RequestTimeout(gevent.Timeout):  # type: ignore[misc]  # gevent has no types
    """Waits for the next request on a connection; knows all that wait."""

    waiting: ClassVar[set[RequestTimeout]] = set()

    def __enter__(self) -> RequestTimeout:
        self.greenlet = gevent.getcurrent()
        self.waiting.add(self)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> Any:
        self.waiting.discard(self)
        return super().__exit__(*raised)

    def end(self) -> None:
        """As if its time were up. Runs in the hub, where nobody can have left since."""
        if self in self.waiting:
            self.greenlet.throw(self)


def end_idle_connections(worker: Any) -> None:
    """Runs beside the worker: once it is told to stop, connections without a request do not keep it for long."""
    while worker.alive:
        gevent.sleep(0.5)
    while True:
        gevent.sleep(LINGER)
        for timeout in list(RequestTimeout.waiting):
            gevent.get_hub().loop.run_callback(timeout.end)


def post_worker_init(worker: Any) -> None:
    """The app is loaded: warm its client up, cap its answers, let it see when the worker is told to stop."""
    from streamchat.extension import end_worker, follow_worker

    most = max(1, worker.worker_connections * ANSWERS_OF_TEN // 10)
    follow_worker(worker.wsgi, lambda: not worker.alive, most, graceful_timeout - MARGIN, worker.worker_connections)
    if hasattr(worker, "timeout_ctx"):  # the gevent worker's way to wait for a request
        worker.timeout_ctx = lambda: RequestTimeout(worker.cfg.keepalive, False)
        gevent.spawn(end_idle_connections, worker)
    run = worker.run

    def run_to_the_end() -> None:
        run()  # until no connection has a request
        end_worker(worker.wsgi, worker.notify)

    worker.run = run_to_the_end
    gc.collect()
    gc.freeze()  # what is loaded by now lives as long as the worker: no collection has to look at it again
