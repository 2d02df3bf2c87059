"""The blueprint: HTTP requests become plain values, answers become WSGI responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

from flask import Blueprint, Flask, Response, request
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import RequestEntityTooLarge

from .background import accept
from .cli import commands
from .dialects import OPENAI, OWN, UI, Dialect
from .errors import PayloadTooLarge, UnsupportedMediaType
from .hangup import Caller
from .hooks import Hooks
from .ledger import Record
from .mount import Mount
from .page import add_page
from .probing import diagnostics_stream
from .reading import RESUMABLE, accepted, cancel_response, chat_stream, replayed, response, response_stream
from .responses import ANSWER, EXTENSION, current_mount, identify, in_dialect, streamed, teardown
from .schema import ChatRequest
from .upstream import ClientFactory


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
    enqueue: Callable[[str], None] | None = None,
    decorators: Sequence[Callable[[Any], Any]] = (),
    page: bool | str = False,
    **overrides: Any,
) -> Blueprint:
    """A blueprint with `POST /get-response` and `GET /healthz`, to be registered under any prefix.

    `overrides` are settings without their prefix, such as model="gpt-4.1"; they win over app.config. Settings are
    read when the blueprint is registered; a bad one raises SettingsError there. `decorators` wrap the answering view,
    the first outermost. `page` adds the chat page: True at the blueprint's own root, a text at that path of the app.
    """
    hooks = Hooks(authorize, build_messages, before_wait, client_factory, on_finish, error_text, make_id, enqueue)
    folders: dict[str, Any] = {"static_folder": "static", "static_url_path": "/assets", "template_folder": "templates"}
    blueprint = Blueprint(name, __name__, **folders)

    def mount(state: BlueprintSetupState) -> None:
        mounts = state.app.extensions.setdefault(EXTENSION, {})
        full_name = f"{state.name_prefix}.{state.name}".lstrip(".")
        made = mounts[full_name] = Mount(cast(Flask, state.app), hooks, overrides, full_name)
        if made.settings.gateway:
            state.add_url_rule("/v1/chat/completions", "chat_completions", decorated(chat_completions), **asking)
            state.add_url_rule("/v1/models", "models", decorated(models))
        if made.settings.diagnostics:
            state.add_url_rule("/diagnostics/stream", "diagnostics_stream", diagnostics_stream, methods=["POST"])
        cast(Flask, state.app).cli.commands.setdefault(str(commands.name), commands)

    def decorated(view: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            view = decorator(view)
        return view

    asking: dict[str, Any] = {"methods": ["POST", "OPTIONS"], "provide_automatic_options": False}
    reading: dict[str, Any] = asking | {"methods": ["GET", "OPTIONS"]}
    blueprint.record(mount)
    blueprint.add_url_rule("/get-response", "get_response", decorated(get_response), **asking)
    blueprint.add_url_rule("/chat", "chat", decorated(chat), **asking)
    blueprint.add_url_rule("/chat/<path:chat_id>/stream", "chat_stream", decorated(chat_stream), **reading)
    blueprint.add_url_rule("/responses/<id>", "response", decorated(response), **reading)
    blueprint.add_url_rule("/responses/<id>/stream", "response_stream", decorated(response_stream), **reading)
    blueprint.add_url_rule("/responses/<id>/cancel", "cancel_response", decorated(cancel_response), **asking)
    blueprint.add_url_rule("/healthz", "healthz", healthz)
    if page:
        add_page(blueprint, page, current_mount)
    blueprint.after_request(identify)
    blueprint.teardown_request(teardown)
    return blueprint


def healthz() -> Response:
    """200 while this worker takes answers; on kept-alive connections 503 while it stops."""
    draining = current_mount().draining
    body = {"status": "draining" if draining else "ok"}
    return Response(json.dumps(body) + "\n", 503 if draining else 200, content_type="application/json")


def get_response() -> Response:
    """Answers one conversation, in the format that Accept names."""
    return in_dialect(OWN, _answered)


def chat() -> Response:
    """The same for the AI SDK's `useChat`: UI message stream v1, or text where Accept asks for it."""
    return in_dialect(UI, _answered)


def chat_completions() -> Response:
    """The same for OpenAI's own clients."""
    return in_dialect(OPENAI, _answered)


def models() -> Response:
    """The models that the gateway offers, as OpenAI lists them."""
    return in_dialect(OPENAI, _models)


def _models(mount: Mount, answer_id: str, dialect: Dialect) -> Response:
    mount.user(request)
    names = dict.fromkeys([mount.settings.model, *mount.settings.models])
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "streamchat"} for name in names]
    return Response(json.dumps({"object": "list", "data": listed}) + "\n", content_type="application/json")


def _answered(mount: Mount, answer_id: str, dialect: Dialect) -> Response:
    # Before the hook, which may read the body too. Werkzeug cuts a chunked body off at its limit and says nothing.
    request.max_content_length = mount.settings.max_body_bytes + 1
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    user = mount.user(request)
    body = _body(mount.settings.max_body_bytes)
    asked, encoder = dialect.read(body, mount.settings, request.headers.get("Accept"))
    locale, key = request.accept_languages.best, request.headers.get("Idempotency-Key")
    if asked.background:
        return accepted(mount, accept(mount, answer_id, user, asked, locale, key), answer_id)
    caller = Caller.from_environ(request.environ)
    answer = mount.answer(answer_id, user, asked, encoder, caller, locale, key)
    if isinstance(answer, str):
        return replayed(mount, mount.find_by_key(answer, user), -1, encoder, {"Idempotency-Replayed": "true"})
    request.environ[ANSWER] = answer
    return streamed(answer, encoder, RESUMABLE if answer.resumable and not encoder.whole else {})


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
