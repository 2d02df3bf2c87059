"""The route that `flask streamchat doctor` asks: signed probes of the way that answers take. Asks no model."""

from __future__ import annotations

import json
from collections.abc import Callable

from flask import Response, current_app, request
from werkzeug.exceptions import RequestEntityTooLarge

from .departures import Departures
from .diagnostics import Probe, ProbeStream, check_token, parse_probe
from .dialects import OWN, Dialect
from .encoders import choose_encoder
from .errors import NotAcceptable, PayloadTooLarge
from .hangup import Caller
from .inspection import inspect
from .mount import Mount
from .responses import ANSWER, ERROR_HEADERS, in_dialect, streamed

MOST_BYTES = 1000  # of a probe; the longest has 150


def diagnostics_stream() -> Response:
    """Streams one probe, or tells of the worker. For a token signed with the app's SECRET_KEY."""
    return in_dialect(OWN, _probed)


def _probed(mount: Mount, id: str, _: Dialect) -> Response:
    request.max_content_length = MOST_BYTES
    check_token(request.headers.get("Authorization"), current_app.secret_key)
    try:
        body = request.get_data()
    except RequestEntityTooLarge:
        raise PayloadTooLarge(f"The body is larger than {MOST_BYTES} bytes.") from None
    probe = parse_probe(body, mount.settings.heartbeat, mount.settings.total_timeout)
    tell = TOLD.get(probe.probe)
    if tell is None:
        return _stream(mount, id, probe)
    return Response(json.dumps(tell(mount, probe)) + "\n", content_type="application/json", headers=ERROR_HEADERS)


def _report(mount: Mount, probe: Probe) -> dict[str, object]:
    process = mount.process
    return inspect(request.environ, mount.settings, process.live, process.connections)


def _departed(mount: Mount, probe: Probe) -> dict[str, object]:
    return Departures().find(probe.id)


TOLD: dict[str, Callable[[Mount, Probe], dict[str, object]]] = {"report": _report, "departed": _departed}


def _stream(mount: Mount, id: str, probe: Probe) -> Response:
    encoder = choose_encoder(request.headers.get("Accept"))()
    if encoder.whole:
        raise NotAcceptable("A probe is streamed.")
    process, locale = mount.process, request.accept_languages.best
    # A connection that just ends is no reset, whatever the hop before this one speaks.
    environ = request.environ | ({"SERVER_PROTOCOL": "HTTP/1.1"} if probe.probe == "lapse" else {})
    stream = ProbeStream(
        probe,
        id,
        encoder,
        Caller.from_environ(environ),
        process.live,
        process.probes,
        lambda error: mount.error_text(error, locale),
    )
    stream.begin()
    request.environ[ANSWER] = stream
    response = streamed(stream, encoder, {})
    if not probe.accel:
        del response.headers["X-Accel-Buffering"]
    return response
