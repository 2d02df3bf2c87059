"""A conversation becomes events of the model's answer. The only user of the openai package; its exceptions end here.

Nothing that the upstream says leaves this file but events, a status, a request id and a code word.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import openai

from .cancellation import Cancellation
from .connection import READ_BYTES
from .decoder import StreamDecoder
from .errors import (
    Interrupted,
    Overloaded,
    SettingsError,
    StreamChatError,
    UpstreamAuth,
    UpstreamMalformed,
    UpstreamTimeout,
)
from .events import Event
from .faults import error_of, from_status, safe_id, translate
from .ledger import Trail
from .loop import Loop
from .prompt import APIS, Prompt
from .sdk_transport import RelayedBody, SdkTransport, proxy_of
from .settings import Settings
from .template import ACCEPT, Template, learn
from .transport import BODY, CURRENT, Body, FastTransport

ClientFactory = Callable[[], openai.OpenAI]

SPARE_CONNECTIONS = 32  # answers that are ending while the next begin
MANY_BYTES = READ_BYTES // 2  # in one read: there may be more than the next read brings
CONCLUDE_SECONDS = 5.0  # how long the usage may take once the answer is whole
FIRST_BACKOFF = 0.5  # seconds; doubled each attempt, as the SDK does
LONGEST_BACKOFF = 8.0
# A malformed answer was made and paid for: the next one would be like it.
NEVER_RETRIED = (UpstreamAuth, Overloaded, UpstreamTimeout, UpstreamMalformed, Interrupted)


class Upstream:
    """Asks the model. One for each mounted blueprint and process; its client is made at the first answer."""

    def __init__(self, settings: Settings, loop: Loop, client_factory: ClientFactory | None) -> None:
        self._settings = settings
        self._loop = loop
        self._api = APIS[settings.upstream_api]
        self._factory = client_factory
        self._client: openai.OpenAI | None = None
        self._fast: FastTransport | None = None
        self._template: Template | None = None
        self._making = threading.Lock()

    def client(self) -> openai.OpenAI:
        """The client for one answer: the shop's factory is asked each time, in the request's own context."""
        if self._factory is not None:
            return self._factory()
        with self._making:  # it waits for a subprocess; two clients would be two pools
            self._client = self._client or self._make_client()
        return self._client

    def warm_up(self) -> None:
        """Before the first answer: what is made once is made, as far as it can be."""
        client = self.client()
        if self._fast is not None and client is self._client:
            with contextlib.suppress(Exception):  # told by the first answer, which meets it again
                self._learned(client)

    def _make_client(self) -> openai.OpenAI:
        client = openai.OpenAI(
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # servers of one's own want none
            max_retries=0,
            http_client=httpx2.Client(transport=self._transport(), trust_env=False),
        )
        client.default_headers  # noqa: B018  the SDK names the platform by a subprocess, once: not under an answer
        return client

    def _transport(self) -> httpx2.BaseTransport:
        wanted, proxy = self._settings.http, proxy_of(base_url())
        most = self._settings.max_streams + SPARE_CONNECTIONS
        if wanted == "fast" or (wanted == "auto" and proxy is None):
            self._fast = FastTransport(self._loop, most)
            return self._fast
        return SdkTransport(self._loop, most, proxy)

    def reap(self) -> None:
        """To be called now and then: closes connections that nobody needed for long. Never waits."""
        if self._fast is not None:
            self._fast.reap()

    def connections(self) -> Mapping[str, int]:
        """Those of our own transport by their state; of others nothing is known."""
        return self._fast.connections() if self._fast is not None else {}

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def open(self, client: openai.OpenAI, prompt: Prompt, cancellation: Cancellation, trail: Trail) -> Reply:
        """Asks, again where that can help, until the upstream's headers are here.

        Raises the cancellation's reason, or an UpstreamFailure or Overloaded; one deadline covers all attempts.
        """
        until = time.monotonic() + self._settings.first_token_timeout
        while True:
            trail.attempts += 1
            reply = self._ask(client, prompt, cancellation, trail, until)
            if isinstance(reply, Reply):
                return reply
            cancellation.check()
            pause = self._pause(reply, trail.attempts)
            if pause is None or time.monotonic() + pause >= until:
                raise reply
            cancellation.sleep(pause)

    def _pause(self, failure: StreamChatError, attempts: int) -> float | None:
        """Seconds until the next attempt; None where there is to be none."""
        if attempts > self._settings.max_retries or not failure.retryable or isinstance(failure, NEVER_RETRIED):
            return None
        backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** (attempts - 1)) * random.uniform(0.75, 1.0)
        return max(backoff, failure.retry_after or 0)

    def _ask(
        self, client: openai.OpenAI, prompt: Prompt, cancellation: Cancellation, trail: Trail, until: float
    ) -> Reply | StreamChatError:
        """One attempt. What failed is returned, to have no exception of the SDK, which holds the key, as context."""
        try:
            if client is self._client and self._fast is not None:
                return self._repeated(self._fast, client, prompt, cancellation, trail, until)
            return self._posted(client, prompt, cancellation, trail, until)
        except StreamChatError as error:
            failure: StreamChatError = error
        except Exception as error:
            failure = translate(error, trail)
        cancellation.drop()
        return failure

    def _repeated(
        self,
        fast: FastTransport,
        client: openai.OpenAI,
        prompt: Prompt,
        cancellation: Cancellation,
        trail: Trail,
        until: float,
    ) -> Reply:
        """Sends what the SDK would send, without asking it again."""
        template = self._learned(client)
        asked = self._api.body(prompt, self._settings.max_output_tokens, template.route.host)
        connect_by = min(until, time.monotonic() + self._settings.connect_timeout)
        body = fast.ask(template.route, template.request(asked), cancellation, connect_by, until)
        headers = body.headers()
        if 200 <= body.status < 300:
            return self._reply(prompt, body.status, headers, body, cancellation, trail)
        try:
            error = error_of(b"".join(body))
        finally:
            body.close()
        raise from_status(body.status, headers, error, trail)

    def _learned(self, client: openai.OpenAI) -> Template:
        if self._template is None:
            self._template = learn(client, self._api.path)
        return self._template

    def _posted(
        self, client: openai.OpenAI, prompt: Prompt, cancellation: Cancellation, trail: Trail, until: float
    ) -> Reply:
        """Has the SDK send it, by its own HTTP or a shop's client."""
        token = CURRENT.set(cancellation)
        try:
            response = self._post(client, prompt, until)
        finally:
            CURRENT.reset(token)
        body: Body | None = response.extensions.get(BODY)
        body = body or RelayedBody(self._loop, response.request, response, cancellation)
        return self._reply(prompt, response.status_code, response.headers, body, cancellation, trail)

    def _post(self, client: openai.OpenAI, prompt: Prompt, until: float) -> httpx2.Response:
        settings, left = self._settings, max(0.01, until - time.monotonic())
        connect = min(settings.connect_timeout, left)
        return client.post(
            self._api.path,
            body=self._api.body(prompt, settings.max_output_tokens, client.base_url.host),
            cast_to=httpx2.Response,
            stream=True,
            stream_cls=openai.Stream[Any],
            options={
                "headers": ACCEPT,
                "timeout": httpx2.Timeout(connect=connect, read=left, write=left, pool=connect),
                "max_retries": 0,
                "follow_redirects": False,  # that would send the conversation elsewhere, and be a second paid call
            },
        )  # type: ignore[return-value]  # cast_to decides; the overload promises stream_cls

    def _reply(
        self,
        prompt: Prompt,
        status: int,
        headers: Mapping[str, str],
        body: Body,
        cancellation: Cancellation,
        trail: Trail,
    ) -> Reply:
        trail.status = status
        trail.request_id = safe_id(headers)
        reply = Reply(body, self._api.decoder(prompt), cancellation, trail)
        kind = headers.get("content-type", "text/event-stream").partition(";")[0].strip().lower()
        if kind != "text/event-stream" or headers.get("content-encoding", "identity") != "identity":
            reply.close()
            raise UpstreamMalformed
        return reply


class Reply:
    """The upstream's answer, being read. Its owner closes it, once."""

    def __init__(self, body: Body, decoder: StreamDecoder, cancellation: Cancellation, trail: Trail) -> None:
        self._body = body
        self._cancellation = cancellation
        self._trail = trail
        self._decoder = decoder
        self._conclude_by: float | None = None
        self.ahead = False

    def read(self, until: float) -> list[Event] | None:
        """Events, [] where the bytes completed none, None at the monotonic time `until`. The last one is Finish.

        Raises the cancellation's reason, before anything that came after it is decoded, or an UpstreamFailure.
        """
        if self._decoder.failure is not None:  # it stood behind the events of the last read: no waiting for more
            self._cancellation.check()
            return self._decoded(b"")
        concluding = self._decoder.concluding
        try:
            data = self._body.read(min(until, self._usage_due()) if concluding else until)
            failure = None
        except Exception as error:
            data, failure = b"", translate(error, self._trail)
        if self._cancellation.error is not None:
            raise self._cancellation.error
        if concluding and (failure is not None or time.monotonic() >= self._usage_due()):
            return self._decoder.conclude()  # whole, without its usage
        if failure is not None:
            raise failure
        if data is None:
            return None
        self.ahead = len(data) >= MANY_BYTES
        return self._decoded(data)

    def _usage_due(self) -> float:
        """Counted from when the answer is whole, whatever comes after that."""
        if self._conclude_by is None:
            self._conclude_by = time.monotonic() + CONCLUDE_SECONDS
        return self._conclude_by

    def _decoded(self, data: bytes) -> list[Event]:
        try:
            return self._decoder.feed(data)
        except StreamChatError as failure:
            self._trail.code = self._decoder.error_code or self._trail.code
            failure.__context__ = None  # what lies under it may quote the upstream
            raise

    def close(self) -> None:
        if self._decoder.done:  # the caller has read all by now: waiting for the body's end holds nothing up
            self._body.drain()
        self._body.close()


def base_url() -> str:
    """Where the SDK's own client goes."""
    return os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"


def check_credentials(client_factory: ClientFactory | None) -> None:
    """Raises SettingsError where no upstream is named, or the key cannot stand in a header."""
    key = os.environ.get("OPENAI_API_KEY", "")
    if client_factory is None and not key and not os.environ.get("OPENAI_BASE_URL"):
        raise SettingsError(
            "No upstream is named: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own, "
            "or pass client_factory."
        )
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise SettingsError(
            "OPENAI_API_KEY holds a space, a line break or a character that no key has; check where it is set."
        )
