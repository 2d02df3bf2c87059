"""A shop's app under chaos: three mounts of streamchat, an after_request that misbehaves on demand, a leak report.

CHAOS_PLAIN and CHAOS_TLS name the upstreams, CHAOS_AUTHORITY the file of the one that signed the second's certificate.
"""

from __future__ import annotations

import gc
import os
import ssl
import threading
from functools import cache
from typing import Any

import greenlet
import httpx2
import openai
from flask import Flask, Response, jsonify, request

from streamchat import Record, answer_finished, answer_started, create_blueprint
from streamchat.answer import Answer
from streamchat.loop import choose_loop
from streamchat.transport import FastTransport
from streamchat.upstream import Reply

MOST = 200
LIMITS: dict[str, Any] = {
    "public": True,
    "max_streams": MOST,
    "first_token_timeout": 0.8,
    "idle_timeout": 0.6,
    "total_timeout": 1.5,
    "write_timeout": 1.0,
    "connect_timeout": 2.0,
    "status_hold": 0.2,
    "heartbeat": 0.2,
    "max_retries": 1,
}
started: list[str] = []
finished: list[str] = []


@cache
def tls_client() -> openai.OpenAI:
    """Our own transport over TLS. Made in the worker, at its first answer."""
    authority = ssl.create_default_context(cafile=os.environ["CHAOS_AUTHORITY"])
    http_client = httpx2.Client(transport=FastTransport(choose_loop(), MOST + 32, tls=authority), trust_env=False)
    return openai.OpenAI(base_url=os.environ["CHAOS_TLS"], api_key="none", max_retries=0, http_client=http_client)


@cache
def own_client() -> openai.OpenAI:
    """A client as shops make them: the library's own HTTP."""
    authority = ssl.create_default_context(cafile=os.environ["CHAOS_AUTHORITY"])
    http_client = openai.DefaultHttpx2Client(verify=authority, trust_env=False)
    return openai.OpenAI(base_url=os.environ["CHAOS_TLS"], api_key="none", max_retries=0, http_client=http_client)


def caller_id() -> str:
    return request.headers["X-Chaos-Id"]


def create_app() -> Flask:
    app = Flask(__name__)
    for name, factory in (("plain", None), ("tls", tls_client), ("own", own_client)):
        blueprint = create_blueprint(name, make_id=caller_id, client_factory=factory, **LIMITS)
        app.register_blueprint(blueprint, url_prefix=f"/{name}")
    app.after_request(misbehave)
    app.add_url_rule("/report", view_func=report)
    app.add_url_rule("/drop-idle", view_func=drop_idle, methods=["POST"])
    answer_started.connect(note_start, app)
    answer_finished.connect(note_finish, app)
    return app


def misbehave(response: Response) -> Response:
    match request.headers.get("X-Chaos"):
        case "raise":
            raise RuntimeError("a shop's after_request function failed")
        case "replace":
            return Response("replaced\n", 200)
        case "close":
            response.close()
    return response


def note_start(_: Flask, id: str, **__: Any) -> None:
    started.append(id)


def note_finish(_: Flask, record: Record) -> None:
    finished.append(record.id)


def report() -> Response:
    """What this worker holds at the moment, itself left out."""
    gc.collect()
    objects = gc.get_objects()
    mounts = app.extensions["streamchat"].values()
    return jsonify(
        slots={name: len(mount.process.live) for name, mount in app.extensions["streamchat"].items()},
        watched=sum(len(mount.process.live.hangups._watched) for mount in mounts),
        pooled={"plain": live_of(pool("plain")), "tls": live_of(tls_client())},
        greenlets=sum(isinstance(each, greenlet.greenlet) and bool(each) for each in objects),
        answers=sum(isinstance(each, Answer) for each in objects),
        replies=sum(isinstance(each, Reply) for each in objects),
        threads=threading.active_count(),
        sockets=count_sockets() - sum(idle_of(client) for client in (pool("plain"), tls_client())),
        started=sorted(started),
        finished=sorted(finished),
    )


def pool(name: str) -> openai.OpenAI:
    client = app.extensions["streamchat"][name].process.upstream.client()
    assert isinstance(client, openai.OpenAI)
    return client


def transport_of(client: openai.OpenAI) -> FastTransport:
    transport = client._client._transport
    assert isinstance(transport, FastTransport)
    return transport


def live_of(client: openai.OpenAI) -> int:
    return transport_of(client)._live


def idle_of(client: openai.OpenAI) -> int:
    """Connections that wait for the next answer: the transport owns and knows them."""
    return sum(len(each) for each in transport_of(client)._idle.values())


def count_sockets() -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        except FileNotFoundError:  # the one of listdir itself
            continue
    return count


def drop_idle() -> Response:
    """Closes what the library's own pool keeps: it is the shop's client, and not streamchat's to clean up."""
    own_client().close()
    own_client.cache_clear()
    return Response(status=204)


app = create_app()
