"""Answers that nobody waits for: taken into a queue, claimed by a worker, made for those who read them in the log."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import replace

from flask import Flask

from .cancellation import Cancellation
from .encoders import choose_encoder
from .ending import broken
from .errors import Draining, Interrupted, LeaseLost, StoreDown, StreamChatError
from .hangup import Caller
from .jobs import Job, pack_job, unpack_job
from .live import RETRY_AFTER
from .log import Log
from .loop import NEVER, Loop
from .mount import Mount
from .order import Notice, Order
from .schema import ChatRequest
from .sender import Sender
from .sheet import Sheet
from .store import Entry, Kept

logger = logging.getLogger("streamchat")

BEAT = 1.0  # seconds between two looks into the queue and the outbox
SWEEP_AFTER = 2.0  # seconds that a job has to come by the carrier of its id, before a look finds it
AGAIN = 0.1  # seconds until the store is asked again
WRITTEN_WITHIN = 15.0  # seconds: a process that ends before would leave an answer that looks interrupted
TAKE_BACK_WITHIN = 60.0  # seconds
EXTENSION = "streamchat"


def accept(mount: Mount, id: str, user: str | None, asked: ChatRequest, locale: str | None, key: str | None) -> Kept:
    """Keeps what is asked for a worker; or the answer that the same Idempotency-Key got before, as it is now.

    Raises Draining, TooManyStreams, BudgetExhausted, IdempotencyMismatch, NotFound; StoreDown where it is not sure
    that the store has it: then it is taken back, unless its key finds it again.
    """
    if mount.draining:
        raise Draining(retry_after=RETRY_AFTER)
    log = mount.log
    order = replace(mount.order(id, user, asked, locale), notice=notice_of(mount, asked.webhook_url))
    try:
        admitted = mount.admission.queue(log, order, asked, key, pack_job(order.prompt, locale))
    except StoreDown:
        if key is None:
            loop = mount.process.loop
            loop.spawn(lambda: _take_back(mount, log, loop, id))
        raise
    if admitted != id:
        return mount.find_by_key(admitted, user)
    mount.carry(id)
    # As it was admitted: to ask the store again could fail, and who is told of a failure asks once more.
    return Kept(id, user, asked.chat, order.prompt.model, order.created_at, "queued", "", 0)


def notice_of(mount: Mount, target: str | None) -> Notice:
    settings = mount.settings
    return Notice(mount.name, settings.webhook_url if target is None else target, settings.webhook_text)


def _take_back(mount: Mount, log: Log, loop: Loop, id: str) -> None:
    """By the log of then: a mount that was closed meanwhile would open another."""
    until = time.monotonic() + TAKE_BACK_WITHIN
    while time.monotonic() < until:
        loop.pause(time.monotonic() + AGAIN)
        with contextlib.suppress(StoreDown):
            mount.tell(log.cancel(id))
            return


class Worker:
    """Makes the answers of one mount's queue and delivers its letters, in this process. Under gevent hundreds at once.

    Its answers have `background_timeout`, since no connection waits for them. To be made before the mount's first use.
    """

    def __init__(self, mount: Mount, sender: Sender | None = None) -> None:
        mount.settings = replace(mount.settings, total_timeout=mount.settings.background_timeout)
        self._mount = mount
        self._process = mount.process
        self._log = mount.log
        self._news = self._process.loop.bell()
        self._sender = sender or Sender(self._log, self._process.loop, mount.settings, mount.name, room=self._news.ring)
        self._making: set[str] = set()
        self._claiming = threading.Lock()  # two that counted the room together would both fill it
        self._stopping = False

    @property
    def busy(self) -> bool:
        """Whether answers are being made, or letters delivered."""
        return bool(self._making or self._sender.sending)

    def run(self) -> None:
        """Until `stop`. What the store does not answer is asked again at the next look."""
        carrier = self._process.carrier
        if carrier is not None:
            carrier.start(self.take, lambda: self._room > 0)
        while not self._stopping:
            try:
                self.look()
            except (StoreDown, LeaseLost):
                pass  # told by the lease
            except Exception:  # a bug: the next look may find others
                logger.exception("the worker failed")
            self._news.wait(time.monotonic() + BEAT)
        if carrier is not None:
            carrier.stop()

    def look(self) -> None:
        """Begins what waits, as far as there is room. Raises StoreDown, LeaseLost."""
        carried = self._mount.hooks.enqueue is not None or self._process.carrier is not None
        self._claim(time.time() - SWEEP_AFTER if carried else NEVER)
        self._sender.send_due()

    def take(self, id: str) -> None:
        """Begins one of which a carrier told. Raises StoreDown, LeaseLost."""
        self._claim(NEVER, id)

    @property
    def _room(self) -> int:
        """How many more may be begun."""
        return 0 if self._stopping else self._process.live.most - len(self._making)

    def _claim(self, before: float, id: str | None = None) -> None:
        store, queue = self._log.store, self._mount.name
        with self._claiming:
            if (room := self._room) <= 0:
                return
            for entry in self._log.lease.ask(lambda owner: store.claim(owner, queue, room, before, id)):
                self._making.add(entry.id)
                self._process.loop.spawn(lambda entry=entry: self._make(entry))  # type: ignore[misc]

    def _make(self, entry: Entry) -> None:
        try:
            perform(self._mount, entry)
        finally:
            self._making.discard(entry.id)
            self._news.ring()  # there is room, and perhaps a letter

    def stop(self) -> None:
        """Nothing is begun any more; what runs goes on. From a signal's handler, too."""
        self._stopping = True
        self._news.ring()

    def end(self) -> None:
        """Ends what still runs as interrupted."""
        for sheet in list(self._log.running.values()):
            sheet.cancellation.cancel(Interrupted())


def run(app: Flask, id: str, name: str = EXTENSION) -> None:
    """Makes one queued answer in the calling thread, for a task queue of the shop's own. Returns when it has ended.

    Nothing happens where another process has it, or it is over. Raises StoreDown, LeaseLost.
    """
    mount: Mount = app.extensions[EXTENSION][name]
    log = mount.log
    for entry in log.lease.ask(lambda owner: log.store.claim(owner, name, 1, NEVER, id)):
        sheet = perform(mount, entry)
        if sheet is not None:
            sheet.wait(WRITTEN_WITHIN)


def perform(mount: Mount, entry: Entry) -> Sheet | None:
    """Makes an answer that this process claimed; returns when it has ended. None where it was not to be made.

    It raises nothing for what becomes of the answer. One that is not begun waits again when this process has ended.
    """
    with mount.context():
        job = _job_of(entry)
        answer = mount.new_answer(_order(mount, entry, job), choose_encoder(None)(), Caller())
        sheet = mount.log.adopt(entry, answer.cancellation)
        if not _begun(mount, entry, answer.cancellation):
            mount.log.forget(sheet)
            answer.withdraw()
            return None
        answer.keep(sheet)
        try:
            answer.admit(is_counted=True)
            mount.begin(answer, mount.process.upstream.client())
        except Exception as error:
            answer.close(error if isinstance(error, StreamChatError) else broken(entry.id, error))
        else:
            answer.go_on()
        return sheet


def _job_of(entry: Entry) -> Job:
    """One of which nothing can be read asks for nothing: the model refuses it, and that is told."""
    try:
        return unpack_job(entry.request)
    except ValueError as error:
        broken(entry.id, error)
        return Job([], {})


def _order(mount: Mount, entry: Entry, job: Job) -> Order:
    notice = Notice(entry.queue, entry.target, mount.settings.webhook_text)
    prompt = job.prompt(entry.model)
    words = lambda error: mount.error_text(error, job.locale)  # noqa: E731
    return Order(entry.id, entry.user, prompt, words, notice, entry.created_at)


def _begun(mount: Mount, entry: Entry, cancellation: Cancellation) -> bool:
    """Whether the model may be asked: the store knows that nobody else will. False where the answer is over."""
    log = mount.log
    while cancellation.error is None:
        try:
            if log.store.begin(entry.owner, entry.id):
                return True
            kept = log.store.find(entry.id)  # a question before this one may have been heard, though not answered
            return kept is not None and (kept.status, kept.owner) == ("in_progress", entry.owner)
        except StoreDown:
            mount.process.loop.pause(time.monotonic() + AGAIN)
        except LeaseLost:
            log.lease.lose(entry.owner)
            return False
    return False
