"""What is done to processes, files and Redis while answers run. Each is done once, for all formats at a time."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tests.live.servers import Server, wait_for
from tests.sqlite_lock import locked

from .cells import NAMES
from .chain import Chain
from .model import message_of, user_of

# --- processes ------------------------------------------------------------------------------------------------


def _worker(server: Server) -> int:
    (worker,) = server.workers()
    return worker


def kill_worker(chain: Chain) -> None:
    worker = _worker(chain.first)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: chain.first.workers() not in ([], [worker]), what="another worker")


def stop_worker(chain: Chain) -> None:
    os.kill(_worker(chain.first), signal.SIGTERM)


def stop_master(chain: Chain) -> None:
    chain.first.terminate()


def reload_master(chain: Chain) -> None:
    chain.first.process.send_signal(signal.SIGHUP)


def kill_nginx(chain: Chain) -> None:
    """Its workers, which hold the connections; the master makes others."""
    for worker in chain.front.workers():
        os.kill(worker, signal.SIGKILL)


def stop_nginx(chain: Chain) -> None:
    """As `nginx -s stop`: at once."""
    chain.front.terminate()
    chain.front.process.wait(10)
    chain.restart_nginx()


def reload_nginx(chain: Chain) -> None:
    chain.front.process.send_signal(signal.SIGHUP)


# --- the log --------------------------------------------------------------------------------------------------


def restart_redis(chain: Chain) -> None:
    assert chain.redis is not None
    chain.redis.kill()
    time.sleep(1)
    chain.redis.start()


def pause_redis(chain: Chain) -> None:
    assert chain.redis is not None
    chain.redis.pause(2.5)
    time.sleep(2.5)


def fill_redis(chain: Chain) -> None:
    assert chain.redis is not None
    chain.redis.fill()
    time.sleep(1.5)
    chain.redis.unfill()


def hang_redis(chain: Chain) -> None:
    """For longer than an answer waits for its log: 5 s, and what one attempt may take."""
    assert chain.redis is not None
    chain.redis.stop()
    time.sleep(7.5)
    chain.redis.go_on()


@contextmanager
def without_redis(chain: Chain) -> Iterator[None]:
    assert chain.redis is not None
    chain.redis.kill()
    try:
        yield
    finally:
        chain.redis.start()


def lock_file(chain: Chain) -> None:
    with locked(str(chain.path)):
        time.sleep(2)


@contextmanager
def with_locked_file(chain: Chain) -> Iterator[None]:
    wait_for(lambda: chain.path is not None and chain.path.exists(), what="the log's file")
    with locked(str(chain.path)):
        yield


def fill_disk(chain: Chain) -> None:
    """For longer than an answer waits for its log; a disk says no at once."""
    assert chain.path is not None
    filler = Path(chain.path).with_name("filler")
    with suppress(OSError):
        filler.write_bytes(bytes(2 << 20))
    time.sleep(6.5)
    filler.unlink()


# --- other callers --------------------------------------------------------------------------------------------


def cancel_elsewhere(chain: Chain) -> None:
    """Each running answer, by its own user, at the other server."""
    assert chain.second is not None
    for name in NAMES:
        user = user_of(message_of("cancelled elsewhere", name))
        connection = http.client.HTTPConnection("127.0.0.1", chain.second.port, timeout=10)
        with closing(connection):
            fields = {"Authorization": f"Bearer {chain.tokens[user]}"}
            connection.request("POST", f"/api/responses/{chain.running(user)}/cancel", b"", fields)
            assert connection.getresponse().status == 200


@contextmanager
def with_full_worker(chain: Chain) -> Iterator[None]:
    """Other users hold all the answers that the worker may run."""
    held: list[socket.socket] = []
    try:
        for number in range(6):
            caller = socket.create_connection(("127.0.0.1", chain.front.port), timeout=10)
            held.append(caller)
            body = b'{"message": "worker full, held | 0"}'
            caller.sendall(
                b"POST /api/get-response HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
                % (chain.tokens[f"holder {number}"].encode(), len(body), body)
            )
            assert caller.recv(65536).startswith(b"HTTP/1.1 200")
        yield
    finally:
        for caller in held:
            caller.close()
