"""One blueprint mounted in one app: its settings, the shop's hooks, and what this process holds for it.

What belongs to a process (clients, watchers) is made at the first answer, after gunicorn has forked.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from flask import Flask, Request

from .access import user_of_token
from .admission import Admission
from .answer import Answer
from .encoders import Encoder
from .errors import NotFound, SettingsError, StreamChatError, Unauthorized
from .hangup import Caller
from .hooks import Hooks
from .ledger import Record, answer_finished, answer_started, log_record
from .log import Log
from .loop import choose_loop
from .metrics import check_metrics, open_figures
from .order import Order
from .process import Process
from .prompt import Prompt
from .schema import ChatRequest
from .settings import Settings, read_environ
from .store import Kept
from .stores import check_store
from .tracing import check_tracing, open_spans
from .upstream import check_credentials

logger = logging.getLogger("streamchat")


class Mount:
    """`app.extensions["streamchat"][name]`."""

    def __init__(self, app: Flask, hooks: Hooks, overrides: Mapping[str, Any], name: str = "streamchat") -> None:
        self.name = name  # of the blueprint; of its queue, too
        self.settings = Settings.from_mapping(app.config, overrides)
        self.hooks = hooks
        self._app = app
        self._process: Process | None = None
        self._lock = threading.Lock()
        check_access(self.settings, hooks.authorize is not None)
        check_credentials(hooks.client_factory)
        check_store(self.settings, choose_loop())
        self._figures = open_figures(self.settings)
        # Not receivers of the signals: a shop's receiver that raises keeps later ones from being called.
        self._observers = [each for each in (self._figures, open_spans(self.settings)) if each is not None]

    @property
    def process(self) -> Process:
        """Made once in each process."""
        process = self._process
        if process is None or process.pid != os.getpid():
            with self._lock:
                if self._process is None or self._process.pid != os.getpid():
                    self._process = Process(self.settings, self.hooks, self.name, self._figures)
                    self.admission = Admission(self.settings, self._process.log)
                process = self._process
        return process

    @property
    def draining(self) -> bool:
        return self._process is not None and self._process.live.draining

    @property
    def keeps_worker(self) -> bool:
        """Whether answers still run that the stopping worker waits for."""
        return self._process is not None and self._process.live.keeps_worker

    def make_id(self) -> str:
        return self.hooks.make_id() if self.hooks.make_id is not None else f"resp_{secrets.token_hex(16)}"

    def user(self, request: Request) -> str | None:
        """Who asks; None where everybody may. Raises Unauthorized, or what the shop's hook aborts with."""
        if self.hooks.authorize is not None:
            user = self.hooks.authorize(request)
            if user is None or user == "":  # Flask-Login's get_id() of nobody is None
                raise Unauthorized
            return str(user)
        if self.settings.tokens:
            return user_of_token(request.headers.get("Authorization"), self.settings.tokens)
        return None

    def answer(
        self,
        answer_id: str,
        user: str | None,
        asked: ChatRequest,
        encoder: Encoder,
        caller: Caller,
        locale: str | None = None,
        key: str | None = None,
    ) -> Answer | str:
        """An answer that has its slot and is being opened; or the id of the one that the Idempotency-Key got before.

        Raises Draining, Overloaded, TooManyStreams, BudgetExhausted, IdempotencyMismatch or StoreDown.
        """
        order = self.order(answer_id, user, asked, locale)
        client = self.process.upstream.client()
        answer = self.new_answer(order, encoder, caller)
        try:
            admitted = self.admission.admit(answer, asked, key)
        except BaseException:
            answer.withdraw()
            raise
        if admitted != answer_id:
            answer.withdraw()
            return admitted
        try:
            self.begin(answer, client)
        except BaseException:
            answer.close()
            raise
        return answer

    def order(self, id: str, user: str | None, asked: ChatRequest, locale: str | None) -> Order:
        prompt = Prompt(self._messages(asked, user), asked.model, asked.params)
        return Order(id, user, prompt, lambda error: self.error_text(error, locale))

    def new_answer(self, order: Order, encoder: Encoder, caller: Caller) -> Answer:
        process = self.process
        with_text = order.notice is not None and order.notice.with_text
        return Answer(
            order,
            self.settings,
            encoder,
            caller,
            process.live,
            process.loop,
            self._told,
            keep_text=with_text or self.hooks.on_finish is not None or self.settings.tracing_text,
        )

    def begin(self, answer: Answer, client: Any) -> None:
        """Tells the app, and asks the upstream."""
        order, upstream = answer.order, self.process.upstream
        for each in self._observers:
            self._guarded(partial(each.begin, order.id, order.prompt, client))
        model = order.prompt.model
        self._guarded(lambda: answer_started.send(self._app, id=order.id, user=order.user, model=model))
        self.release_before_wait()  # after the receivers, which may ask a database too
        answer.begin(lambda each: upstream.open(client, order.prompt, each.cancellation, each.tally.trail))

    def carry(self, id: str) -> None:
        """Tells the carrier of a job, where there is one. A worker finds what was not carried."""
        if self.hooks.enqueue is not None:
            enqueue = self.hooks.enqueue
            self._guarded(lambda: enqueue(id))
        elif self.process.carrier is not None:
            self.process.carrier.enqueue(id)

    def context(self) -> AbstractContextManager[object]:
        """The app's, for what runs beside its requests."""
        return self._app.app_context()

    @property
    def log(self) -> Log:
        """Raises NotFound where this mount keeps nothing."""
        log = self.process.log
        if log is None:
            raise NotFound("Answers are not kept here: STREAMCHAT_STORE_URL turns the response log on.")
        return log

    def find(self, id: str, user: str | None) -> Kept:
        """Raises NotFound where the user has no such answer, StoreDown."""
        kept = self.log.find(id)
        if kept is None or kept.user != user:
            raise NotFound
        return kept

    def find_by_key(self, id: str, user: str | None) -> Kept:
        """The answer that an Idempotency-Key got before. The key outlives it where it is forgotten within a day.

        Raises as `find` does, and says then what to do about it.
        """
        try:
            return self.find(id, user)
        except NotFound:
            raise NotFound(
                "The answer to this Idempotency-Key is no longer kept. Send a new key to ask again."
            ) from None

    def latest(self, user: str | None, chat: str) -> Kept | None:
        """The newest answer of a user's chat. The chat's id is the client's: without a user it is nobody's."""
        log = self.process.log
        if log is None or user is None:
            return None
        id = log.store.latest(user, chat)
        return log.find(id) if id is not None else None

    def release_before_wait(self) -> None:
        """Lets go what the request took from a pool: see `before_wait`."""
        (self.hooks.before_wait or self._close_database)()

    def _messages(self, asked: ChatRequest, user: str | None) -> Sequence[Any]:
        if self.hooks.build_messages is not None:
            return self.hooks.build_messages(asked, user)
        system = self.settings.system_prompt
        turns = asked.wire or [{"role": turn.role, "content": turn.content} for turn in asked.messages]
        return [{"role": "system", "content": system}, *turns] if system else turns

    def _close_database(self) -> None:
        """The default of before_wait: whoever waits for a model holds no connection of Flask-SQLAlchemy's pool."""
        database = self._app.extensions.get("sqlalchemy")
        if database is not None:
            database.session.close()

    def cancel(self, id: str) -> None:
        """Stops an answer, wherever it is made. Raises StoreDown where that is not here."""
        self.tell(self.log.cancel(id))

    def tell(self, record: Record | None) -> None:
        """Of an answer that ended in its queue: nobody else tells of what nobody made."""
        if record is not None:
            self._told(record, "")

    def _told(self, record: Record, text: str) -> None:
        log_record(record)
        for each in self._observers:
            self._guarded(partial(each.end, record, text), BaseException)
        self._guarded(lambda: answer_finished.send(self._app, record=record), BaseException)
        if self.hooks.on_finish is not None:
            self._guarded(lambda: self._on_finish(record, text), BaseException)

    def _on_finish(self, record: Record, text: str) -> None:
        assert self.hooks.on_finish is not None
        with self._app.app_context():
            self.hooks.on_finish(record, text)

    def _guarded(self, task: Callable[[], object], caught: type[BaseException] = Exception) -> None:
        """What a shop's receiver raises must not touch the answer; a gevent.Timeout is no Exception."""
        try:
            task()
        except caught as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit, *self.process.loop.killed)):
                raise
            logger.exception("a hook of the application failed")

    def error_text(self, error: StreamChatError, locale: str | None) -> str:
        """What the caller reads of a failure; ours where the hook has no words, or fails."""
        if self.hooks.error_text is not None:
            try:
                return self.hooks.error_text(error.code, locale) or error.detail
            except Exception:
                logger.exception("a hook of the application failed")
        return error.detail

    def follow(
        self, is_stopping: Callable[[], bool], most: int, drain_seconds: float, connections: int | None = None
    ) -> None:
        """Called by conf/gunicorn.conf.py in each worker: warms up, caps, and listens for the end."""
        process = self.process
        process.connections = connections
        process.live.most = min(process.live.most, most)
        process.live.follow(is_stopping, drain_seconds)
        if self.hooks.client_factory is None:
            process.upstream.warm_up()
        if process.log is not None:
            process.loop.spawn(process.log.wake)

    def close(self) -> None:
        """Ends what the process holds. A worker that exits without the call leaves its lease to end by itself."""
        if self._process is not None:
            self._process.close()
            self._process = None


def check_access(settings: Settings, has_authorize: bool) -> None:
    """Raises SettingsError where anybody could spend the money without the app having said so."""
    if not has_authorize and not settings.tokens and not settings.public:
        raise SettingsError(
            "Nobody is asked who they are: "
            "pass authorize=..., or set STREAMCHAT_TOKENS, or set STREAMCHAT_PUBLIC to true."
        )


def check_environ(environ: Mapping[str, str]) -> None:
    """Raises SettingsError for what would stop wsgi.py, which has no hooks. For a server that is about to fork."""
    settings = Settings.from_mapping(read_environ(environ))
    check_access(settings, has_authorize=False)
    check_credentials(None)
    check_store(settings, choose_loop())
    check_tracing(settings)
    check_metrics(settings)
