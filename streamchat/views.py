"""The blueprint: HTTP requests become plain values, answers become WSGI responses.

The only file with `request`, `Response` and `stream_with_context`. The generator it hands out uses none of them.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from flask import Blueprint, Flask, Response, current_app, request, stream_with_context
from flask.blueprints import BlueprintSetupState
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from .access import SITE_HEADERS, check_site, cors_headers, from_abort, preflight_headers
from .answer import Answer
from .cli import commands
from .dialects import OPENAI, OWN, UI, Dialect
from .encoders import Encoder
from .errors import CallerGone, Interrupted, PayloadTooLarge, StreamChatError, UnsupportedMediaType
from .hangup import Caller
from .ledger import Record
from .mount import Hooks, Mount
from .page import add_page
from .schema import ChatRequest
from .upstream import ClientFactory

EXTENSION = "streamchat"
# In the WSGI environ: the answer of this request, for its teardown; headers that each response of this request has.
ANSWER = "streamchat.answer"
HEADERS = "streamchat.headers"

# Each keeps one hop from holding pieces back, or a browser from guessing what it reads.
STREAM_HEADERS = {
    "X-Accel-Buffering": "no",
    "Cache-Control": "no-cache, no-transform",
    "X-Content-Type-Options": "nosniff",
    "Content-Encoding": "identity",
}
ERROR_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class StreamResponse(Response):
    """A response that no extension may swallow whole.

    `.data` in an after_request function would read the stream to its end: it raises instead. Flask-Compress would hold
    pieces back: it leaves a response alone that names an encoding, and the name is taken off on the way out.
    """

    implicit_sequence_conversion = False

    def get_wsgi_headers(self, environ: Any) -> Headers:
        headers = super().get_wsgi_headers(environ)
        if headers.get("Content-Encoding") == "identity":
            del headers["Content-Encoding"]
        return headers


def create_blueprint(
    name: str = EXTENSION,
    *,
    authorize: Callable[[Any], str | None] | None = None,
    build_messages: Callable[[ChatRequest, str | None], Sequence[Any]] | None = None,
    before_wait: Callable[[], None] | None = None,
    client_factory: ClientFactory | None = None,
    on_finish: Callable[[Record, str], None] | None = None,
    error_text: Callable[[str, str | None], str | None] | None = None,
    make_id: Callable[[], str] | None = None,
    decorators: Sequence[Callable[[Any], Any]] = (),
    page: bool | str = False,
    **overrides: Any,
) -> Blueprint:
    """A blueprint with `POST /get-response` and `GET /healthz`, to be registered under any prefix.

    `overrides` are settings without their prefix, such as model="gpt-4.1"; they win over app.config. Settings are
    read when the blueprint is registered; a bad one raises SettingsError there. `decorators` wrap the answering view,
    the first outermost. `page` adds the chat page: True at the blueprint's own root, a text at that path of the app.
    """
    hooks = Hooks(authorize, build_messages, before_wait, client_factory, on_finish, error_text, make_id)
    folders: dict[str, Any] = {"static_folder": "static", "static_url_path": "/assets", "template_folder": "templates"}
    blueprint = Blueprint(name, __name__, **folders)

    def mount(state: BlueprintSetupState) -> None:
        mounts = state.app.extensions.setdefault(EXTENSION, {})
        made = Mount(cast(Flask, state.app), hooks, overrides)
        mounts[f"{state.name_prefix}.{state.name}".lstrip(".")] = made
        if made.settings.gateway:
            state.add_url_rule("/v1/chat/completions", "chat_completions", decorated(chat_completions), **asking)
            state.add_url_rule("/v1/models", "models", decorated(models))
        cast(Flask, state.app).cli.commands.setdefault(str(commands.name), commands)

    def decorated(view: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            view = decorator(view)
        return view

    asking: dict[str, Any] = {"methods": ["POST", "OPTIONS"], "provide_automatic_options": False}
    blueprint.record(mount)
    blueprint.add_url_rule("/get-response", "get_response", decorated(get_response), **asking)
    blueprint.add_url_rule("/chat", "chat", decorated(chat), **asking)
    blueprint.add_url_rule("/chat/<path:chat_id>/stream", "chat_stream", chat_stream)
    blueprint.add_url_rule("/healthz", "healthz", healthz)
    if page:
        add_page(blueprint, page, _mount)
    blueprint.after_request(_identify)
    blueprint.teardown_request(_teardown)
    return blueprint


def _mount() -> Mount:
    return cast(Mount, current_app.extensions[EXTENSION][request.blueprint])


def healthz() -> Response:
    """200 while this worker takes answers; on kept-alive connections 503 while it stops."""
    draining = _mount().draining
    body = {"status": "draining" if draining else "ok"}
    return Response(json.dumps(body) + "\n", 503 if draining else 200, content_type="application/json")


def get_response() -> Response:
    """Answers one conversation, in the format that Accept names."""
    return _in_dialect(OWN)


def chat() -> Response:
    """The same for the AI SDK's `useChat`: UI message stream v1, or text where Accept asks for it."""
    return _in_dialect(UI)


def chat_stream(chat_id: str) -> Response:
    """Where `useChat` looks for an answer that still runs: there is none, as long as no log keeps answers."""
    return Response(status=204)


def chat_completions() -> Response:
    """The same for OpenAI's own clients."""
    return _in_dialect(OPENAI)


def models() -> Response:
    """The models that the gateway offers, as OpenAI lists them."""
    return _in_dialect(OPENAI, _models)


def _in_dialect(dialect: Dialect, view: Callable[[Mount, str, Dialect], Response] | None = None) -> Response:
    mount = _mount()
    answer_id = mount.make_id()
    headers = request.environ[HEADERS] = {"X-Response-Id": answer_id}
    try:
        origin = check_site(_named(SITE_HEADERS), request.host, mount.settings.origins)
        headers.update(cors_headers(origin))
        return _preflight(origin) if request.method == "OPTIONS" else (view or _answered)(mount, answer_id, dialect)
    except StreamChatError as error:
        return _told(mount, error, answer_id, dialect)
    except HTTPException as exception:
        aborted = from_abort(exception)
        if aborted is None:
            raise
        return _told(mount, aborted, answer_id, dialect)


def _named(names: Sequence[str]) -> dict[str, str]:
    """Those of the request's headers that it has: reading all of them costs more."""
    return {name: request.headers[name] for name in names if name in request.headers}


def _models(mount: Mount, answer_id: str, dialect: Dialect) -> Response:
    mount.user(request)
    names = dict.fromkeys([mount.settings.model, *mount.settings.models])
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "streamchat"} for name in names]
    return Response(json.dumps({"object": "list", "data": listed}) + "\n", content_type="application/json")


def _preflight(origin: str | None) -> Response:
    response = Response(status=204, headers=preflight_headers(origin))
    del response.headers["Content-Type"]  # of nothing: WSGI forbids it
    return response


def _identify(response: Response) -> Response:
    """Every response has an id: the shop's own pages for an abort or a bug too."""
    response.headers.update(request.environ.get(HEADERS) or {"X-Response-Id": _mount().make_id()})
    return response


def _answered(mount: Mount, answer_id: str, dialect: Dialect) -> Response:
    # Before the hook, which may read the body too. Werkzeug cuts a chunked body off at its limit and says nothing.
    request.max_content_length = mount.settings.max_body_bytes + 1
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    user = mount.user(request)
    body = _body(mount.settings.max_body_bytes)
    asked, encoder = dialect.read(body, mount.settings, request.headers.get("Accept"))
    caller = Caller.from_environ(request.environ)
    answer = mount.answer(answer_id, user, asked, encoder, caller, request.accept_languages.best)
    request.environ[ANSWER] = answer
    return _streamed(answer, encoder)


def _body(most: int) -> bytes:
    """Also where the application has opened the body before, with a limit of its own or none."""
    error = PayloadTooLarge(f"The body is larger than {most} bytes.")
    if (request.content_length or 0) > most:
        raise error
    try:
        body = request.get_data()
    except RequestEntityTooLarge:
        raise error from None
    if len(body) > most:
        raise error
    return body


def _streamed(answer: Answer, encoder: Encoder) -> Response:
    body = answer.stream()
    try:
        next(body)  # waits until the status is decided, and arms the generator's cleanup
    except StreamChatError as error:
        answer.close(error)
        raise
    except BaseException:
        answer.close(Interrupted())
        raise
    response = _response(body, encoder)
    response.call_on_close(answer.close)
    # An after_request function may drop the response, and no close() comes: then its end is the end of the answer.
    weakref.finalize(response, answer.close).atexit = False
    return response


def _response(body: Iterator[bytes], encoder: Encoder) -> Response:
    if encoder.whole:
        return Response(b"".join(body), content_type=encoder.content_type, headers=ERROR_HEADERS)
    headers = STREAM_HEADERS | encoder.headers
    return StreamResponse(stream_with_context(body), content_type=encoder.content_type, headers=headers)


def _told(mount: Mount, error: StreamChatError, answer_id: str, dialect: Dialect) -> Response:
    if isinstance(error, CallerGone):
        Caller.from_environ(request.environ).hang_up()  # one that only half closed must see no end either
        return Response(status=error.status)
    words = mount.error_text(error, request.accept_languages.best)
    document, content_type = dialect.tell(error, words, answer_id)
    response = Response(json.dumps(document) + "\n", error.status, ERROR_HEADERS, content_type=content_type)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 11.6.1 asks for it
    return response


def _teardown(exception: BaseException | None) -> None:
    """Where an after_request function raised, the response is dropped unseen: the answer ends here."""
    answer = request.environ.get(ANSWER)
    if exception is not None and answer is not None:
        answer.close(Interrupted())
